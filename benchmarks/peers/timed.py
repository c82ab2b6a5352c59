"""Runs a command and notes what it took: python timed.py NOTE COMMAND... writes seconds, peak memory and exit code.

Peak memory is the largest resident set of the command's processes (of one, not of their sum). A process starts out
with its parent's peak to its name, so the one that starts the command has to be as small as this one.
"""

from __future__ import annotations

import json
import os
import sys
import time


def main() -> None:
    """Start, wait, note."""
    note, *command = sys.argv[1:]
    started = time.perf_counter()
    child = os.posix_spawnp(command[0], command, os.environ)
    _, status, used = os.wait4(child, 0)
    seconds, code = time.perf_counter() - started, os.waitstatus_to_exitcode(status)
    with open(note, "w") as file:  # noqa: PTH123 - pathlib would be a larger process
        json.dump({"seconds": seconds, "peak_rss_bytes": used.ru_maxrss * 1024, "code": code}, file)
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
