"""The black box over HTTP: docs/service.md.

refusal.py    why a request is not answered: status, code, message and remedy
accounts.py   terms of accounts, and whether they cover a request
store.py      accounts, ledger and defences' calls in an SQLite file
bodies.py     images from the bodies of requests, within limits
answering.py  a call: admitted, answered, written down
managing.py   the command line of accounts
web.py        routes, keys and errors, by FastAPI
patience.py   connections that ask nothing, by uvicorn
running.py    the server's processes
"""
