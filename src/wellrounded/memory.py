"""How much memory this process has used at its peak."""

from __future__ import annotations

import sys


def peak_rss_bytes() -> int:
    """The largest resident set so far, in bytes; 0 where the platform does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
