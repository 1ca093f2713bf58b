"""The reliability campaign: scripts that are killed and resumed, files of strangers, command lines that cannot be.

python -m tests.campaign [kills|files|lines] [--trials N] [--seed S] [--only NUMBER]

docs/reliability.md says what is tried and what counts as held.
"""
