"""Texts to measure on that nobody calibrated on, and the windows that everybody calibrates on.

Prose is Alice's Adventures in Wonderland and the proceedings of a workshop of the Library of Congress, both in the
public domain, out of the test data in Brotli's source package on PyPI. Code is modules of this Python's standard
library. WikiText comes from a file.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

GRAM = 13  # tokens in a row that two texts do not share by chance
BROTLI = "Brotli==1.2.1"
STORIES = {  # member of the archive: sha256
    "brotli-1.2.1/tests/testdata/alice29.txt": "7467306ee0feed4971260f3c87421154a05be571d944e9cb021a5713700c38f0",
    "brotli-1.2.1/tests/testdata/lcet10.txt": "5314ba1dbb03f471df88bec6cd120a938ef60d0fd3511c5c1dce61bf7463245f",
}
MODULES = (  # none of which wellrounded's built-in calibration text is made of
    "argparse", "asyncio/base_events", "asyncio/streams", "asyncio/tasks", "concurrent/futures/thread", "decimal",
    "email/_header_value_parser", "email/message", "ftplib", "http/client", "http/cookiejar", "http/server", "imaplib",
    "importlib/_bootstrap_external", "json/decoder", "json/encoder", "locale", "mailbox", "multiprocessing/managers",
    "multiprocessing/pool", "os", "pathlib", "pdb", "posixpath", "pydoc", "sqlite3/dump", "ssl", "sysconfig",
    "unittest/case", "unittest/mock", "urllib/parse", "urllib/request", "xml/dom/minidom", "xml/etree/ElementTree",
)  # fmt: skip


def prose(folder: Path) -> str:
    """The two texts, a paragraph to a line; their archive is fetched by pip into `folder` if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob("brotli-*.tar.gz")):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", BROTLI]
        if subprocess.run([*command, "-d", str(folder)], stdout=sys.stderr).returncode:
            sys.exit(f"prose: pip cannot download the source of {BROTLI}; name a text of your own: --prose FILE")
    with tarfile.open(next(folder.glob("brotli-*.tar.gz"))) as archive:
        return "\n\n".join(_story(archive, member, digest) for member, digest in STORIES.items())


def _story(archive: tarfile.TarFile, member: str, digest: str) -> str:
    file = archive.extractfile(member)
    content = file.read() if file else b""
    if (seen := hashlib.sha256(content).hexdigest()) != digest:
        sys.exit(f"prose: {member} has the digest {seen}, expected {digest}")
    paragraphs = content.decode("ascii", errors="replace").replace("\r\n", "\n").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())


def code() -> str:
    """The sources of `MODULES`, those that this Python has, as they are."""
    library = Path(sysconfig.get_path("stdlib"))
    places = [place for name in MODULES for place in (library / f"{name}.py", library / name / "__init__.py")]
    return "\n\n".join(path.read_text(encoding="utf-8") for path in places if path.is_file())


def tokens(tokenizer: Any, text: str) -> np.ndarray:
    """int64 [tokens] of the whole text, with whatever the tokenizer puts in front of one."""
    return np.array(tokenizer(text, verbose=False)["input_ids"], dtype=np.int64)


def beginning(tokenizer: Any) -> int | None:
    """The token that it puts in front of every text; None if it does not."""
    first = tokenizer("a")["input_ids"][0]
    return first if first in tokenizer.all_special_ids else None


class Cut(NamedTuple):
    """Windows of one text, int64 [windows, length] each, of which no two share a token."""

    calibration: np.ndarray
    proof: np.ndarray  # for wellrounded's own proof of its result
    further: np.ndarray  # for what trains on more than it calibrates on


def calibration(ids: np.ndarray, length: int, count: int, begin: int | None = None) -> Cut:
    """So many windows spread evenly over a stream, and others from between them, each begun by `begin`.

    wellrounded holds out a tenth of its windows, at most 16.
    """
    if len(ids) < 2 * length * count:
        sys.exit(f"calibration text: {len(ids):,} tokens, {count} windows of {length} need {2 * length * count:,}")
    starts = [i * (len(ids) - length) // max(count - 1, 1) for i in range(count)]
    proof = [start + length for start in starts[: min(16, max(1, count // 9))]]
    stretches = zip(starts, [*starts[1:], len(ids)])
    between = [place for first, stop in stretches for place in range(first + length, stop - length + 1, length)]
    further = [place for place in between if place not in set(proof)]
    cut = (np.stack([ids[place : place + length] for place in chosen]) for chosen in (starts, proof, further))
    return Cut(*(begun(windows, begin) for windows in cut))


def with_further(cut: Cut, most: int) -> np.ndarray:
    """int64 [tokens]: a stream that wellrounded divides into those calibration windows, and `most` further ones.

    What it calibrates on lies evenly in a text, what it proves its result on at its end, what is further in between.
    """
    count, length = cut.calibration.shape
    each = -(-most // count)
    further = np.resize(cut.further[np.arange(most) * len(cut.further) // most], (count, each, length))
    woven = np.concatenate([cut.calibration[:, None], further], 1).reshape(-1, length)
    proof = np.resize(cut.proof, (min(16, max(1, (len(woven) + 1) // 9)), length))
    return np.concatenate([woven, woven[:1], proof]).flatten()  # one window between them belongs to neither


def begun(windows: np.ndarray, begin: int | None) -> np.ndarray:
    """The same windows with `begin` for the first token of each: what a model sees of a text when it is one."""
    if begin is not None:
        windows[:, 0] = begin
    return windows


def disjoint(
    ids: np.ndarray, length: int, count: int, calibration: np.ndarray, name: str, begin: int | None = None
) -> tuple[np.ndarray, int]:
    """int64 [count, length], spread evenly over a stream cut into windows, and how many of those were passed over.

    Each begins with `begin`. Passed over are windows that share `GRAM` tokens in a row with a calibration window.
    """
    whole = ids[: len(ids) // length * length].reshape(-1, length)
    known = {gram for window in calibration for gram in _grams(window)}
    new = [window for window in whole if not any(gram in known for gram in _grams(window))]
    if len(new) < count:
        sys.exit(
            f"{name}: {len(new)} of {len(whole)} windows of {length} are new text, asked for {count}; ask for fewer"
        )
    return begun(np.stack([new[i * len(new) // count] for i in range(count)]), begin), len(whole) - len(new)


def _grams(window: np.ndarray) -> Iterator[bytes]:
    content, size = np.ascontiguousarray(window).tobytes(), window.itemsize
    return (content[at * size : (at + GRAM) * size] for at in range(len(window) - GRAM + 1))


def digest(content: str | np.ndarray) -> str:
    """The first 16 digits of the sha256 of a text, or of windows."""
    raw = content.encode() if isinstance(content, str) else np.ascontiguousarray(content).tobytes()
    return hashlib.sha256(raw).hexdigest()[:16]
