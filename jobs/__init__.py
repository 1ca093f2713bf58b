"""Several processes as one job, the machine that a script runs on, and how scripts end.

place.py      which process of how many this is
meeting.py    how the processes of a job meet
machine.py    device, precision, threads, and where runs go: `set_up` for scripts
exchange.py   shares of a batch, gathering, and gradients of the whole batch
batchnorm.py  batch norm over all processes' images, on CPUs
ending.py     one-line errors, exit codes, signals, and the end of a job

exchange.py and ending.py are for training, attacks and evaluation; scripts use ending.py (`script`), machine.py
(`Machine`, `Threads`, `set_up`) and place.py (`Processes`). jobs itself imports settings and utils only.
"""
