"""The two verbs of the package, for Python code: quantize and evaluate. The command line calls the same functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from . import __version__, evaluation, rotating
from . import calibration as data
from .budget import Budget
from .checkpoint import Source, Writer
from .contest import Beaten, Contest, prepare
from .core.gptq import Settings
from .core.recipe import Recipe
from .errors import UsageError
from .memory import keep_few_products, shown
from .pipeline import Progress
from .prediction import Forecast
from .report import Report
from .request import Request, chosen_device, limit, refuse_longer
from .runlog import RunLog, one_line
from .store import Follower
from .team import Lost, Team
from .torchrun import joined


def quantize(
    model: Any,
    out: str | Path,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    sym: bool = True,
    act_order: bool = False,
    bpw: float | None = None,
    size: int | str | None = None,
    measurement: str | Path | None = None,
    calibration: Any = None,
    samples: int = 128,
    length: int | None = None,
    seed: int = 0,
    ignore: Sequence[str] = (),
    only: Sequence[str] = (),
    lm_head: bool = False,
    recipe: Recipe | None = None,
    preset: str = "default",
    settings: Settings | None = None,
    tokenizer: Any = None,
    device: str = "auto",
    max_memory: int | str | None = None,
    force: bool = False,
    fresh: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Report:
    """Quantize `model` into the directory `out`, which is complete when this returns, and say how good the result is.

    model        a hub id, a directory, a .gguf file, or a transformers model in memory (left untouched)
    bits         4 by default
    group_size   columns that share a scale; by default 128 if it divides every layer's inputs, else 64, else 32
    bpw, size    instead of bits and group_size, how large the result may be: bits per weight of the quantized layers,
                 scales and zeros included, or bytes (text like "4.2GB") of all files. Each layer gets what serves the
                 model best, if that is better than one scheme for all: both are tried (docs/budget.md)
    measurement  for these, the file with what each layer needs, read if it exists and else written; by default
                 `out`.measurement.json
    calibration  a data set's name, a path, texts, chats, token ids, or several `wr.parse(...)`; by default text that
                 comes with Python; "none" rounds plainly, without data. Chats may hold pictures (docs/architectures.md)
    tokenizer    for a model in memory; or a processor, which chats with pictures need (a directory's own is found)
    samples, length, seed   how many windows of how many tokens: 512, or as many as the model can read
    ignore       regular expressions; a weight in whose name one is found stays dense
    only         regular expressions; a weight in whose name none is found stays dense
    lm_head      quantize the output head too; if it is tied to the embeddings, these stay as they are
    preset       how much is done for accuracy: "fast", "default" or "best" (docs/accuracy.md)
    settings     single steps, instead of a preset
    recipe       schemes layer by layer, instead of bits, group_size, sym, act_order, ignore and only
    max_memory   bytes, or text like "4GiB", that the run may use (of a GPU's memory, where one computes): it keeps less
                 in memory then, or refuses to start; by default what is free
    force        replace `out` if it exists;  fresh: start over instead of going on with an unfinished run

    Raises UsageError for a request that cannot be carried out, NumericsError for NaN or Inf in weights or
    activations (naming the layer), CheckpointError for damaged files or a full disk. Finished blocks are kept, and
    `out`.log tells what happened.
    """
    keep_few_products()
    out = Path(out).expanduser()
    budget = _budget(
        bpw, size, measurement, bits=bits, group_size=group_size, recipe=recipe, asym=not sym or None,
        act_order=act_order or None,
    )  # fmt: skip
    request = Request(
        bits=4 if bits is None else bits, group_size=group_size, sym=sym, act_order=act_order,
        calibration=calibration, samples=samples, length=length, seed=seed, ignore=ignore, only=only,
        lm_head=lm_head, recipe=recipe, preset=preset, settings=settings, device=chosen_device(device),
        max_memory=max_memory,
    )  # fmt: skip
    with joined(request.device) as (team, own_device):
        team.first_does(lambda: _check(model, out, force))
        request = replace(request, device=own_device)
        if not team.first:
            return _follow(request, _opened(model, tokenizer, trust_remote_code), out, team)
        asked = one_line(model, out, {field.name: getattr(request, field.name) for field in fields(request)})
        with RunLog(out, asked) as log:
            opened = partial(_opened, model, tokenizer, trust_remote_code)
            if request.rotates and team.size == 1:
                opened = rotating.prepare(request, opened, out, fresh, log.telling(progress))
            if budget is None:
                return _lead(request, opened(), out, team, force, fresh, log, progress)
            if team.size > 1:
                raise UsageError(f"{budget} were asked of {team.size} processes; choosing what a layer gets takes one")
            contest = prepare(budget, request, opened, out, measurement, log.telling(progress))
            return _compete(contest, opened, out, force, fresh, log, progress)


def _budget(bpw: float | None, size: int | str | None, measurement: Any, **others: Any) -> Budget | None:
    """What was asked for; None if it was not a budget. `others` are options that exclude one, None if not given."""
    if bpw is None and size is None:
        if measurement is not None:
            raise UsageError(
                f"measurement={str(measurement)!r} was asked for, which serves bpw or size; give one of them"
            )
        return None
    budget = Budget(bpw, size)
    if given := ", ".join(name for name, value in others.items() if value is not None):
        raise UsageError(f"{budget} were asked for together with {given}, which the budget decides; leave one out")
    return budget


def _compete(
    contest: Contest, opened: Callable[[], Source], out: Path, force: bool, fresh: bool, log: RunLog,
    progress: Callable[[Progress], None],
) -> Report:  # fmt: skip
    """Write the mixture, or the uniform scheme if that turns out to be better."""
    again = fresh or contest.discards(out)
    try:
        return _lead(contest.chosen.request, opened(), out, Team(), force, again, log, progress, contest.judge)
    except Beaten as beaten:
        log.say(str(beaten))
    return _lead(contest.chosen.request, opened(), out, Team(), force, True, log, progress, contest.judge)


def _lead(
    request: Request, source: Source, out: Path, team: Team, force: bool, fresh: bool, log: RunLog,
    progress: Callable[[Progress], None], judge: Callable[[Report], None] = lambda report: None,
) -> Report:  # fmt: skip
    """The run, as the process that writes carries it out, if `judge` has nothing against its result."""
    run = request.run(source, team)
    writer = team.first_does(lambda: Writer(out, run.request() | {"version": __version__}, force, fresh))
    assert writer is not None
    log.keep = writer.worth_keeping
    try:
        team.agree((writer.finished, writer.complete))
        if writer.complete:
            log.say("an earlier run had finished all but tidying up")
            return team.agree(log.done(Report.read(out)))
        if writer.finished:
            log.say(f"going on after {', '.join(writer.finished)}")
        if said := run.settle(writer.run):
            log.say(said)
        writer.note_run(run.noted())
        log.say(f"in memory: {run.work.room}; {shown(run.foretold_bytes)} foretold")
        report = log.done(run.write(writer, log.telling(progress), judge))
        with suppress(Lost):  # the result is there, whatever has become of the others
            team.agree(report)
        return report
    except BaseException:
        writer.abandon()
        raise
    finally:
        log.keep = writer.worth_keeping


def _follow(request: Request, source: Source, out: Path, team: Team) -> Report:
    """The run, as another process of the team carries it out: nothing is written, nothing said."""
    run = request.run(source, team)
    team.meet()
    finished, complete = team.agree(({}, False))
    if complete:
        return team.agree(run.report)
    store = Follower(out, finished)
    try:
        run.quantize(store)
        return team.agree(run.report)  # when the first one has finished
    finally:
        store.leave()


def _opened(model: Any, tokenizer: Any, trust_remote_code: bool) -> Source:
    from .hf.source import open_source

    return model if isinstance(model, Source) else open_source(model, tokenizer, trust_remote_code)


def _check(model: Any, out: Path, force: bool) -> None:
    Writer.check(out, force)
    _refuse_overlap(model, out)


def forecast(model: Any, *, trust_remote_code: bool = False, **options: Any) -> Forecast:
    """What quantizing `model` would take: memory, disk, output, time, from its shapes alone, in seconds.

    options  those of `quantize` that decide it: bits, group_size, ..., samples, length, device, max_memory

    Of a model on the hub only the headers are downloaded, and no calibration data is gathered. Raises UsageError as
    `quantize` does, also if `max_memory` does not suffice.
    """
    from .hf.headers import open_headers

    unknown = options.keys() - {field.name for field in fields(Request)}
    if unknown:
        raise UsageError(f"{', '.join(sorted(unknown))}: asked of a forecast, which knows no such option")
    return Request(**options).forecast(open_headers(model, trust_remote_code))


def merge(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    dense: bool = False,
    calibration: Any = None,
    force: bool = False,
    trust_remote_code: bool = False,
    **options: Any,
) -> Report | None:
    """Merge a PEFT adapter into the dequantized weights of its base, and quantize the sum into the directory `out`.

    base     the model it was trained on, if it is not where the adapter says; a quantized one or a dense one
    dense    write the sum as a dense model instead, in the base's own dtype; then there is no report
    calibration, options   as for `quantize`; unless they say otherwise, each layer gets the scheme that it had

    Raises UsageError if there is no such adapter or base, or if options for quantizing come with `dense`.
    """
    from .hf.merge import merge as merge_dense

    out = Path(out).expanduser()
    Writer.check(out, force)
    if dense and (options or calibration is not None):
        asked = ", ".join([*options, *(["calibration"] if calibration is not None else [])])
        raise UsageError(f"{asked}: asked for together with a dense result, for which nothing is quantized; choose one")
    merged = merge_dense(adapter, base, trust_remote_code)
    if dense:
        merged.model.to(merged.dtype)
        writer = Writer(out, {"adapter": str(adapter), "base": merged.base}, force, fresh=True)

        def write(directory: Path) -> None:
            merged.model.save_pretrained(directory)
            if merged.tokenizer is not None:
                merged.tokenizer.save_pretrained(directory)

        writer.finish([], write)
        return None
    source = merged.source()
    source.label = f"{Path(merged.base).name} with {Path(adapter).name}"
    if not {"bits", "group_size", "sym", "act_order", "ignore", "only", "recipe", "bpw", "size"} & options.keys():
        options["recipe"] = merged.recipe
    return quantize(source, out, calibration=calibration, force=force, **options)


def evaluate(
    model: Any,
    text: str,
    *,
    against: Any = None,
    length: int | None = None,
    windows: int | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Perplexity of a model on `text`, and with `against` (its original) KL, top-1 agreement and both perplexities.

    Models are directories, hub ids, .gguf files or transformers models. The text is cut into consecutive windows of
    `length` tokens (1024, or as many as the model can read), of which the first `windows` are used; where a text begins
    with a token of its own, every window does, in the place of its first one. Of models that do
    not continue a text, what there is: KL and agreement, or the cosine of embeddings; they need `against`.
    """
    from .hf.load import load_with_tokenizer

    if isinstance(model, (str, Path)):
        model, own = load_with_tokenizer(model, trust_remote_code=trust_remote_code)
        tokenizer = tokenizer or own
    if tokenizer is None:
        raise UsageError("the model has no tokenizer; pass one")
    if isinstance(against, (str, Path)):
        against, _ = load_with_tokenizer(against, trust_remote_code=trust_remote_code)
    length = length or min(1024, limit(model) or 1024)
    refuse_longer(length, model)
    ids = data.tokenize(tokenizer, text)
    cut = data.begun(evaluation.cut(ids, length, windows), data.beginning(ids, tokenizer))
    return evaluation.evaluate(model, cut, against, progress) | {"length": length}


def _refuse_overlap(model: Any, out: Path) -> None:
    """A result inside its source would be copied into the next one; a source inside its result would be replaced."""
    if not isinstance(model, (str, Path)) or not Path(model).expanduser().exists():
        return
    source, target = Path(model).expanduser().resolve(), out.resolve()
    if source.is_relative_to(target) or target.is_relative_to(source):
        raise UsageError(f"{out} and the model {model} lie one inside the other; name a directory beside the model")
