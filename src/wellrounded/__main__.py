"""`python -m wellrounded` is the command line."""

import os
import sys

from .cli import main

if __name__ == "__main__":
    code = main()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # One of many processes: while the interpreter winds up, a thread of gloo's may abort one that has succeeded
        # ("terminate called without an active exception"), and torchrun would then end all others.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
