"""The command `softprompt`, also as `python -m softprompt`."""

import os
import sys
from typing import NoReturn

from softprompt import interrupts


def entry() -> NoReturn:
    """Runs the command; a signal ends it with one line and its exit code, whenever it comes."""
    interrupts.exit_at_once()
    from softprompt.cli import main  # after signals are handled

    try:
        code = main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    if code in interrupts.CODES.values():  # all is saved: no thread is waited for
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    entry()
