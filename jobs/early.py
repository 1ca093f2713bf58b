"""Imported first by every script, since importing torch takes seconds: a signal meanwhile ends it with one line.

Later `ending.script` takes over. Signals that are ignored, as under nohup, stay ignored.
"""

import os
import signal
import sys

SAVED = 75  # exit code: progress is saved, the same command with --resume goes on (EX_TEMPFAIL of sysexits.h)
STOP_NAMES = ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP")  # those of utils.STOP_SIGNALS, which needs torch


def _end(number: int, frame: object) -> None:
    os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())
    os._exit(SAVED)


# In a script only: whoever imports a script has signals of its own.
_started = getattr(sys.modules["__main__"], "__file__", None) or ""
if os.path.dirname(os.path.abspath(_started)) == os.path.dirname(os.path.dirname(os.path.abspath(__file__))):
    for _name in STOP_NAMES:
        if hasattr(signal, _name) and signal.getsignal(getattr(signal, _name)) != signal.SIG_IGN:
            signal.signal(getattr(signal, _name), _end)
    # torch's C++ code would print its stack where another process of the job is gone; the error is raised all the same.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
