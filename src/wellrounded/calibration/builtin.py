"""Text that every Python installation carries: English and code of the standard library, for when no data is named."""

from __future__ import annotations

import ast
import functools
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

PASSAGE = 4000  # characters, about two windows of 512 tokens, so that windows meet both kinds of passage
PROOF_EVERY = 10  # one passage in ten is kept out of `text()`
SHORTEST_DOCSTRING = 200

# The two lists share no module: a docstring must not come back inside the code, for held-out text has to be new text.
ENGLISH_MODULES = (
    "base64", "bdb", "bz2", "cmd", "code", "codeop", "compileall", "configparser", "contextlib", "difflib", "doctest",
    "fileinput", "fractions", "functools", "graphlib", "gzip", "inspect", "ipaddress", "logging", "lzma", "mimetypes",
    "numbers", "optparse", "pkgutil", "queue", "random", "re", "shelve", "shutil", "smtplib", "socket", "socketserver",
    "statistics", "string", "subprocess", "textwrap", "threading", "timeit", "traceback", "turtle", "typing", "uuid",
    "venv", "wave", "zipapp",
)  # fmt: skip
CODE_MODULES = (
    "_pydatetime", "ast", "bisect", "calendar", "collections", "copy", "csv", "dataclasses", "datetime", "dis", "enum",
    "filecmp", "getopt", "gettext", "hashlib", "heapq", "netrc", "pickle", "platform", "plistlib", "pprint", "pyclbr",
    "sched", "selectors", "shlex", "tarfile", "tempfile", "tokenize", "trace", "types", "warnings", "weakref",
    "zipfile",
)  # fmt: skip


def text() -> str:
    """English and code in turn, more than a million characters, the same on every call of one Python installation."""
    return "\n\n".join(passage for i, passage in enumerate(_passages()) if i % PROOF_EVERY != PROOF_EVERY - 1)


def proof_text() -> str:
    """The passages that `text()` leaves out, for proving a result whose own data is too short to hold any out."""
    return "\n\n".join(_passages()[PROOF_EVERY - 1 :: PROOF_EVERY])


@functools.cache
def _passages() -> tuple[str, ...]:
    """Passages of both kinds, merged so that each kind is spread evenly from first to last."""
    english = _cut(_once(_english()))
    code = _cut(source for name in CODE_MODULES if (source := _source(name)))
    placed = [((i + 0.5) / len(kind), passage) for kind in (english, code) for i, passage in enumerate(kind)]
    return tuple(passage for _, passage in sorted(placed))


def _english() -> Iterator[str]:
    """The language reference, its longest chapters first because shorter topics repeat parts of them; docstrings."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions ship Python without its documentation
        topics = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        yield topics[name]
    for name in ENGLISH_MODULES:
        if source := _source(name):
            yield "\n\n".join(_docstrings(source))


def _docstrings(source: str) -> list[str]:
    """The longer docstrings of a module, in the order of its lines; read, never imported, so nothing runs."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    found = (ast.get_docstring(node) or "" for node in nodes)
    return [docstring for docstring in found if len(docstring) >= SHORTEST_DOCSTRING]


def _source(name: str) -> str | None:
    """The source code of a standard-library module, or None where this Python does not have it as a file.

    Looked up where the library is installed and nowhere else: a `code.py` beside the user's script is not ours to read.
    """
    library = Path(sysconfig.get_path("stdlib"))
    for path in (library / f"{name}.py", library / name / "__init__.py"):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return None


def _once(texts: Iterable[str]) -> Iterator[str]:
    """The texts without the paragraphs that stood in an earlier one: repeats would leak into held-out text."""
    seen: set[str] = set()
    for whole in texts:
        paragraphs = []
        for paragraph in whole.split("\n\n"):
            key = " ".join(paragraph.split())
            if len(key) < 40 or key not in seen:  # headings may come back
                paragraphs.append(paragraph)
            seen.add(key)
        yield "\n\n".join(paragraphs)


def _cut(texts: Iterable[str]) -> list[str]:
    """The texts in passages of about `PASSAGE` characters, broken between paragraphs only."""
    passages = []
    for whole in texts:
        passage: list[str] = []
        size = 0
        for paragraph in whole.split("\n\n"):
            passage.append(paragraph)
            size += len(paragraph) + 2
            if size >= PASSAGE:
                passages.append("\n\n".join(passage))
                passage, size = [], 0
        if size > PASSAGE // 4:  # a crumb is not worth a passage
            passages.append("\n\n".join(passage))
    return passages
