"""A result written part by part, joined into shards on the way, and finished in one step.

While a run goes on, everything lies in `OUT.partial`, whose journal lists what is finished; `OUT` itself appears (or
is replaced) only when it is complete. A run that was stopped, at whatever moment, goes on from the journal.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import tensorfile as files
from .errors import CheckpointError, UsageError
from .journal import Journal, difference
from .places import JOURNAL, is_placed, link, nearest, partial_of, writing
from .tensorfile import TensorFile

SHARD_BYTES = 4 * 2**30
AMENDMENT = "amendment.part"


@dataclass
class Writer:
    """Builds a checkpoint in `OUT.partial` part by part, then turns it into `OUT`; no other process can meanwhile.

    request   what the run was asked for; a partial directory left by a different request is not continued
    finished  the parts that are there already, and what the run noted when it wrote them
    run       what else the run wanted to be told when it goes on; it may differ from request to request
    amended   what was noted when tensors of finished parts were replaced (see amend), None if none were
    complete  an earlier run had put the result in its place already, and was stopped tidying up: nothing is to be done
    scratch   a directory for the run's temporary files, to be made when needed; it goes when the run ends or starts

    Raises UsageError if another process is writing to OUT, or OUT cannot become the result.
    """

    out: Path
    request: dict[str, Any]
    force: bool = False
    fresh: bool = False
    finished: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    amended: Any = None
    complete: bool = False

    def __post_init__(self) -> None:
        self.partial = partial_of(self.out)
        self.scratch, self.ready, self.replaced = (self.partial / name for name in ("scratch", "ready", "replaced"))
        self._files: dict[str, TensorFile] = {}  # by part, in order: where it is now
        self._names: dict[str, list[str]] = {}  # by part that is in a shard: its tensors
        self._shards: list[Path] = []
        self._amendment: TensorFile | None = None
        self._finishing = False
        self.check(self.out, self.force)
        journal = self.partial / JOURNAL
        if self.partial.is_dir() and not journal.exists() and any(self.partial.iterdir()):
            raise self._in_the_way()
        with writing(self.partial):
            self._journal = Journal(journal)
        try:
            with writing(self.partial):
                self._open()
        except BaseException:
            self._journal.close()
            raise

    @staticmethod
    def check(out: Path, force: bool) -> None:
        """Raises UsageError if `out` cannot become the result; cheap, so that it can be asked before any work."""
        if Path.cwd().is_relative_to(out.resolve()):
            raise UsageError(f"{out} is where you are, and cannot be replaced from there; name a new directory")
        if out.is_mount():
            raise UsageError(f"{out} is a mount point, and cannot be replaced; name a new directory inside it")
        if out.exists() and not out.is_dir():
            raise UsageError(f"{out} is a file; name a directory for the result")
        if out.is_dir() and any(out.iterdir()) and not force and not is_placed(out):
            with suppress(OSError):
                partial_of(out).rmdir()  # empty: all that a run left that was killed when it had done everything else
            raise UsageError(f"{out} exists and is not empty; choose another directory or pass --force")
        home = nearest(out.absolute().parent)
        if not os.access(home, os.W_OK):
            raise UsageError(f"{out}: no permission to write in {home}; choose another directory")

    # ---- going on ----

    def _open(self) -> None:
        """Take over what is there: all of it, or nothing, or only the last steps are missing."""
        lines = self._journal.lines()
        placed = is_placed(self.out)
        differing = difference(lines[0]["request"], self.request) if lines else ""
        if placed and not differing and not self.fresh:
            self._clean()
            self.complete = True
            return
        finishing = any("finishing" in line for line in lines)
        gone = finishing and not self.ready.exists() and not self.out.exists()  # somebody took the result elsewhere
        if placed or gone or self.fresh or any("void" in line for line in lines):
            self._start_over(bool(lines))
            lines = []
        if not lines:
            if set(self.partial.iterdir()) - {self._journal.path}:
                raise self._in_the_way()
            self._note(request=self.request, pid=os.getpid(), what="unfinished; run the same command again to go on")
            return
        if differing:
            self._restore()
            raise UsageError(
                f"{self.partial} holds another request's unfinished run ({differing}); --fresh starts over"
            )
        self._note(pid=os.getpid())
        self._take_over(lines, finishing)
        if finishing and self.ready.exists():
            self._swap()
            self._clean()
            self.complete = True
        else:
            self._restore()

    def _in_the_way(self) -> UsageError:
        return UsageError(f"{self.partial} is in the way and is not from an earlier run; move it elsewhere")

    def _start_over(self, ours: bool) -> None:
        """Nothing counts any more, and nothing is left but an empty journal; an old result is back in its place."""
        if not ours:
            return
        self._restore()
        self._note(void=True)
        self._clear()
        self._journal.clear()
        self.check(self.out, self.force)

    def _restore(self) -> None:
        if self.replaced.exists() and not self.out.exists():
            self.replaced.rename(self.out)

    def _take_over(self, lines: list[dict[str, Any]], finishing: bool) -> None:
        """Where every part is; what the journal knows nothing of is half done, and goes."""
        at: dict[str, Path] = {}
        for line in lines:
            if "part" in line:
                self.finished[line["part"]] = line["notes"]
                at[line["part"]] = self.path_of(line["part"])
            elif "shard" in line:
                self._shards.append(self.partial / line["shard"])
                self._names |= line["parts"]
                at |= dict.fromkeys(line["parts"], self._shards[-1])
            elif "run" in line:
                self.run = line["run"]
            elif "amended" in line:
                self.amended = line["amended"]
        states = self.partial.glob("*.state")
        also = [self.partial / AMENDMENT] if self.amended is not None else []
        self._clear({*at.values(), self.replaced, *states, *also, *([self.ready] if finishing else [])})
        opened: dict[Path, TensorFile] = {}
        try:
            for path in (*also, *at.values()):
                opened[path] = opened.get(path) or TensorFile(path)
        except CheckpointError:
            raise CheckpointError(f"{path}: a finished part is missing or damaged; --fresh starts over") from None
        self._amendment = opened[also[0]] if also else None
        self._files = {part: opened[path] for part, path in at.items()}

    def _clear(self, but: Iterable[Path] = ()) -> None:
        keep = {*but, self._journal.path}
        for path in sorted(self.partial.iterdir()):
            if path not in keep:
                files.remove(path)

    def _clean(self) -> None:
        """Nothing is left; the journal, by which a run that is killed here goes on, last."""
        self._clear()
        self._journal.remove()
        with suppress(OSError):  # it may be another run's by now
            self.partial.rmdir()

    def abandon(self) -> None:
        """After an error: leave nothing behind, unless a part that was work to make, one with notes, is finished."""
        if not self.complete:
            with suppress(OSError):
                files.remove(self.scratch)
                if not self._finishing and not self.worth_keeping:
                    self._note(void=True)
            with suppress(OSError):
                if not self._finishing and not self.worth_keeping:
                    self._clean()
        self.close()

    def close(self) -> None:
        """Leave everything as it is, and let another run go on with it."""
        self._journal.close()

    @property
    def worth_keeping(self) -> bool:
        """Whether a part is finished that was work to make."""
        return self.complete or any(notes is not None for notes in self.finished.values())

    # ---- writing ----

    def _note(self, **entry: Any) -> None:
        self._journal.note(entry)

    def note_run(self, run: dict[str, Any]) -> None:
        """Remember what this run wants to be told as `run` when it goes on."""
        with writing(self._journal.path):
            self._note(run=run)
        self.run = run

    def path_of(self, part: str) -> Path:
        """Where a part lies until it is joined."""
        return self.partial / f"{part}.part"

    def add(self, part: str, tensors: dict[str, torch.Tensor], notes: Any = None) -> None:
        """Write one part and note it in the journal: from here on it is not lost. `notes` come back on resuming."""
        path = self.path_of(part)
        with writing(path):
            self._put(path, lambda place: files.write(place, tensors))
            written = TensorFile(path)
            self._note(part=part, notes=notes)
            self.finished[part], self._files[part] = notes, written
            self._roll()

    def _put(self, path: Path, make: Callable[[Path], None]) -> None:
        """A file that is whole, and on the disk, under its name."""
        half = path.with_suffix(".writing")
        try:
            make(half)
            half.replace(path)
            files.sync(self.partial)
        finally:
            half.unlink(missing_ok=True)  # half a file is of no use, and the disk may be full

    def read_part(self, part: str) -> dict[str, torch.Tensor]:
        """The tensors of a finished part."""
        file, newer = self._files[part], self._amendment
        names = self._names.get(part, file.entries)
        return {n: (newer if newer is not None and n in newer.entries else file).read(n) for n in names}

    def state(self, name: str) -> Path:
        """A file in which a step keeps what it needs to go on; it goes when the run has finished or starts over."""
        return self.partial / f"{name}.state"

    def amend(self, tensors: dict[str, torch.Tensor], notes: Any) -> None:
        """Replace tensors of finished parts by others of the same shapes and dtypes: all of them, or none.

        They lie in a file of their own until the result is finished. `notes`, not None, come back on resuming.
        Raises CheckpointError for a tensor that no finished part has.
        """
        there = {name for file in self._files.values() for name in file.entries}
        if strange := tensors.keys() - there:
            raise CheckpointError(f"{min(strange)} was to be replaced, and is in no finished part; please report this")
        path = self.partial / AMENDMENT
        with writing(path):
            self._put(path, lambda place: files.write(place, tensors))
            self._note(amended=notes)
            self.amended, self._amendment = notes, TensorFile(path)

    def amendment(self) -> dict[str, torch.Tensor]:
        """What was amended."""
        newer = self._amendment
        return {} if newer is None else {name: newer.read(name) for name in newer.entries}

    def _apply(self) -> None:
        """Write what was amended into the shards; whoever is stopped here does it again."""
        if newer := self.amendment():
            for shard in self._shards:
                files.overwrite(shard, newer)

    def _roll(self, last: bool = False) -> None:
        """Join what fills a shard. Where shards end depends on nothing but the parts' sizes and their order."""
        while parts := self._full(last):
            shard = self.partial / f"shard-{len(self._shards) + 1:05d}.safetensors"
            members = [self._files[part] for part in parts]
            self._put(shard, partial(files.join, members))
            joined, names = TensorFile(shard), {part: list(self._files[part].entries) for part in parts}
            self._note(shard=shard.name, parts=names)
            self._shards.append(shard)
            self._names |= names
            self._files |= dict.fromkeys(parts, joined)
            for member in members:
                member.path.unlink()

    def _full(self, last: bool) -> list[str]:
        """The parts of the next shard; none if it may still grow, unless it is to be the last."""
        group: list[str] = []
        size = 0
        for part in (part for part in self._files if part not in self._names):
            size += self._files[part].stamp.size
            if group and size > SHARD_BYTES:
                return group
            group.append(part)
        return group if last else []

    # ---- finishing ----

    def finish(self, parts: Iterable[str], write_rest: Callable[[Path], None]) -> Path:
        """Complete the shards, write everything else with `write_rest(directory)`, and move it all to OUT.

        `parts` are those that the result must have.
        """
        if self.complete:
            return self.out
        if missing := [part for part in parts if part not in self.finished]:
            raise CheckpointError(f"{self.out}: {missing[0]} was never written; please report this")
        with writing(self.ready):
            files.remove(self.scratch)
            if not self._finishing:
                self._roll(last=True)
                self._apply()
                files.remove(self.ready)
                self.ready.mkdir()
                self._place_shards()
                write_rest(self.ready)
                files.sync_tree(self.ready)
                files.sync(self.partial)
                self._note(finishing=True)
                self._finishing = True
            self._swap()
            self.complete = True
            self._clean()
        return self.out

    def _place_shards(self) -> None:
        """Shards under their final names, and an index if there are several; they take no room a second time."""
        total, weight_map = 0, dict[str, str]()
        for number, shard in enumerate(self._shards, 1):
            one = len(self._shards) == 1
            name = "model.safetensors" if one else f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            link(shard, self.ready / name)
            file = TensorFile(shard)
            total += file.stamp.size - file.start
            weight_map |= dict.fromkeys(file.entries, name)
        if len(self._shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (self.ready / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _swap(self) -> None:
        """What is at OUT gives way to `ready`, and comes back if that cannot take its place."""
        if self.out.exists():
            files.remove(self.replaced)
            self.out.rename(self.replaced)
        try:
            self.ready.rename(self.out)
        except OSError:
            if self.replaced.exists():
                self.replaced.rename(self.out)
            raise
        files.sync(self.out.parent)
        files.sync(self.partial)
