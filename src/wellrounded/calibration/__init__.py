"""Calibration data: what the user names becomes token windows, and a part kept apart to prove the result on.

`gather` is the door. Behind it: `sources` reads data sets, files and lists into rows, `rows` turns rows into tokens,
`windows` cuts tokens, `builtin` is the text used when nothing is named. `chats` and `pictures` know what
chats are made of, and what becomes of the pictures in them.
"""

from .chats import Processor
from .mixture import ENOUGH, Calibration, SourceUse, gather
from .rows import beginning, begun, tokenize
from .sources import KNOWN, Source, parse
from .windows import Windows

__all__ = [
    "ENOUGH",
    "KNOWN",
    "Calibration",
    "Processor",
    "Source",
    "SourceUse",
    "Windows",
    "beginning",
    "begun",
    "gather",
    "parse",
    "tokenize",
]
