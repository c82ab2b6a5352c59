"""A block as it was, beside the one that is being quantized: what its layers read and write there, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from .inputs import Aside, Bank, Hessians, Paired, Siblings, Witness
from .siblings import Batch, Kind, Place, run_to, staged
from .stream import Stream

Sets = Iterator[Siblings | Bank]
HELD_OUT = 8  # of so many windows one is held out: on those it is chosen how layers are solved


@dataclass(frozen=True)
class Twin:
    """A block that keeps the weights of the original model, and what is to be known of it.

    writers  layers that write to the residual stream, and how much of what they write arrives there
    weighs   whether a writer's tokens count by the residual that they join
    tracks   whether the residuals themselves are compared
    """

    block: nn.Module
    writers: dict[str, float] = field(default_factory=dict)
    weighs: bool = True
    tracks: bool = True


@dataclass
class Originals:
    """Runs a block and its twin in step over the same batches, as they have reached either, and compares.

    mine and theirs are the streams of the quantized model and of the original, `numbers` the batches on their way.
    """

    block: nn.Module
    twin: Twin
    mine: Stream
    theirs: Stream
    numbers: list[int]
    _read: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict, repr=False)
    _wrote: dict[tuple[nn.Module, int], torch.Tensor] = field(default_factory=dict, repr=False)  # in a block so far
    _at: dict[greenlet, int] = field(default_factory=dict, repr=False)  # which batch runs there
    _ready: dict[tuple[nn.Module, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, repr=False)

    def staged(
        self, sets: Callable[[Kind], Sets], batches: list[Batch], names: list[str], known: list[list[str]]
    ) -> Sets:
        """Siblings from `sets`, each compared; `batches` of the original have left the block in the end."""
        with self._told(), self._remembering():
            theirs = staged(self.twin.block, names, known, self.counted(batches), kind=Witness)
            mine = sets(self._kind)
            while True:
                if isinstance(other := next(theirs, None), Witness):
                    self._read[other.names[0]] = other.inputs
                if (one := next(mine, None)) is None:
                    break
                yield one
            for _ in theirs:
                pass

    def anew(self, sets: Callable[[Kind, Callable[[Place, int], None]], Sets], batches: list[Batch]) -> Sets:
        """The same batch by batch, where none waits; the original stays where it is."""
        batches = self.counted(batches)

        def before(place: Place, number: int) -> None:
            inputs = self._read[place.name] = {}

            def keep(x: torch.Tensor, mask: torch.Tensor | None) -> None:
                inputs[number] = x

            self._wrote.clear()  # of the batch before as well, which has been counted
            run_to(self.twin.block, place, [batches[number]], keep)

        with self._told():
            yield from sets(self._kind, before)

    def counted(self, batches: list[Batch]) -> list[Batch]:
        """The same, each with its place in the list known while it runs."""

        def numbered(number: int, run: Callable[[], None]) -> None:
            self._at[getcurrent()] = number
            run()

        return [(partial(numbered, number, run), mask) for number, (run, mask) in enumerate(batches)]

    def aside(self, names: list[str], batch: int, original: torch.Tensor) -> Aside:
        """What else is known of what a layer reads, `original` [..., in] in the twin: see Aside."""
        (name, *others), share = names, self.twin.writers.get(names[0], 0.0)
        if others or not share:
            return Aside()
        layer, number = self.twin.block.get_submodule(name), self.numbers[batch]
        before, added = self.theirs.hidden(number), self._wrote.get((self.twin.block, batch))
        if original.numel() // original.shape[-1] != before.numel() // before.shape[-1]:
            return Aside()  # not all tokens come here: an expert of a list
        weights = apart = None
        with torch.no_grad():
            if self.twin.weighs:
                written = share * self._output(layer, batch, original)
                written = written if added is None else written + added.reshape(written.shape)
                residual = (before.reshape(written.shape) + written).float()
                weights = 1 / residual.square().mean(-1).clamp_min(1e-12)
            if self.twin.tracks:
                apart = before - self.mine.hidden(number)
                if added is not None:
                    apart = apart + (added - self._wrote[self.block, batch]).reshape(apart.shape)
                apart = (apart / share).reshape(*original.shape[:-1], -1)
        return Aside(weights, apart)

    def _output(self, layer: nn.Module, batch: int, x: torch.Tensor) -> torch.Tensor:
        """What a layer of the twin gives for this input, without its hooks, which would stop it."""
        output = type(layer).forward(layer, x)
        if "forward" in vars(layer):  # see _remembering
            self._ready[layer, batch] = x, output
        return output

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        """While it lasts, no layer of the twin computes for a second time what is known by the time it is called."""

        def forward(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
            known, output = self._ready.pop((layer, self._at[getcurrent()]), (None, None))
            same = known is not None and known.data_ptr() == x.data_ptr() and known.shape == x.shape
            return output if same else type(layer).forward(layer, x)

        layers = [self.twin.block.get_submodule(name) for name in self.twin.writers if self.twin.weighs]
        for layer in layers:
            layer.forward = partial(forward, layer)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward
            self._ready.clear()

    def chosen_on(self, batch: int, x: torch.Tensor) -> torch.Tensor:
        """bool [...]: which rows of `x` [..., in] are held out: whole windows, the same however they are batched.

        The end of a window that is otherwise calibrated on would be too much like the rest.
        """
        sizes, number = [len(ids) for ids in self.mine.ids], self.numbers[batch]
        first, windows, rows = sum(sizes[:number]), sizes[number], x[..., 0].numel()
        every = min(HELD_OUT, sum(sizes))
        if rows % windows:  # what of them comes here is not known: an expert of a list
            held = torch.arange(rows, device=x.device) % HELD_OUT == HELD_OUT - 1
        else:
            held = torch.arange(first, first + windows, device=x.device) % every == every - 1
            held = (held & (every > 1)).repeat_interleave(rows // windows)
        return held.view(x.shape[:-1])

    def _kind(self, names: list[str], size: int, device: torch.device, hessians: Hessians) -> Paired:
        writes = len(names) == 1 and names[0] in self.twin.writers and self.twin.tracks
        outputs = self.theirs.hidden(self.numbers[0]).shape[-1] if writes and self.numbers else 0
        told = {"originals": self._read, "aside": self.aside, "chosen_on": self.chosen_on}
        return Paired(names, size, device, hessians, outputs=outputs, **told)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """While it lasts, what is written to the residual, here and in the twin, is added up."""

        def wrote(block: nn.Module, share: float, layer: nn.Module, args: tuple, output: torch.Tensor) -> None:
            batch = self._at[getcurrent()]
            hidden = self.theirs.hidden(self.numbers[batch])
            if output.numel() == hidden.numel():
                so_far, added = self._wrote.get((block, batch)), share * output.reshape(hidden.shape)  # some flatten it
                self._wrote[block, batch] = added if so_far is None else so_far + added

        blocks = [self.twin.block, *([self.block] if self.twin.tracks else [])]
        with ExitStack() as hooks:
            for name, share in self.twin.writers.items():
                for block in blocks:
                    handle = block.get_submodule(name).register_forward_hook(partial(wrote, block, share))
                    hooks.callback(handle.remove)
            yield
