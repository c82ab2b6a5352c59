"""transformers' GPTQConfig: what a user's means here, and one for what a checkpoint's configuration says."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import replace
from functools import wraps
from typing import Any

import transformers

from .. import kernels
from ..errors import UsageError
from ..presets import preset
from ..request import NONE, Request

LISTS = "modules_in_block_to_quantize"
GIVEN = "_given"  # on a user's configuration: the arguments that were given; on one of ours, the whole Request

# How kernels of other tools were chosen. Each of them here: a choice of ours, or none.
READS_THE_FILE = "reference"
OTHER_KERNELS = (
    "marlin", "marlin_fp16", "exllama", "exllama_v1", "exllama_v2", "exllama_eora", "triton", "machete", "bitblas",
    "cuda", "ipex", "torch_fused", "torch_int8", "torch_aten", "cutlass", "gemm",
)  # fmt: skip
OLD_SWITCHES = ("use_exllama", "disable_exllama", "exllama_config", "use_cuda_fp16", "use_triton", "disable_exllamav2")

# Arguments of GPTQConfig that change nothing here, and why.
WITHOUT_MEANING = {
    "act_group_aware": "columns are always rounded in the order of their importance",
    "cache_block_outputs": "they always are",
    "max_input_length": "no kernel here has buffers of that kind",
    "pad_token_id": "windows are packed, or carry a mask",
    "module_name_preceding_first_block": "it is found by running the model",
    "block_name_to_quantize": "the decoder blocks are found in the model",
    "format": "v1 is written for symmetric codes, which most tools read, and v2 for asymmetric ones",
    "checkpoint_format": "v1 is written for symmetric codes, which most tools read, and v2 for asymmetric ones",
    "meta": "it describes the tool that quantizes",
    "static_groups": "groups are always settled before the first column is rounded",
    "use_cuda_fp16": "every kernel computes in the dtype of its input",
}


class GPTQConfig(transformers.GPTQConfig):
    """What config.json says, whole: transformers' class would drop `dynamic` and every other key it does not know.

    It must carry the name of its parent: transformers compares class names when a configuration is passed for a model
    that is quantized already, and then takes `backend` from that one. What the file says about kernels was meant for
    another machine and is not followed.
    """

    def __init__(self, bits: int, kernel: str | None = None, **kwargs: Any) -> None:
        self._stored = {"bits": bits, **kwargs}
        super().__init__(bits=4)  # its checks are those of another tool; a file is checked by formats.config
        vars(self).update(self._stored, backend=kernel)

    def to_dict(self) -> dict[str, Any]:
        """The stored keys as they were; calibration data and tokenizers never belong into config.json."""
        return {"quant_method": "gptq", **{k: v for k, v in self._stored.items() if k not in ("dataset", "tokenizer")}}


def remembering(original: Any) -> Any:
    """transformers' `GPTQConfig.__init__`, which then remembers what was given, old switches included.

    It also lets `modules_in_block_to_quantize` be given without the optimum package.
    """
    signature = inspect.signature(original)

    @wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        if type(self) is not transformers.GPTQConfig:
            original(self, *args, **kwargs)
            return
        bound = signature.bind(self, *args, **kwargs).arguments
        lists = bound.pop(LISTS, None)
        rest = bound.pop("kwargs", {})
        bound.pop("self")
        original(self, **bound, **{k: v for k, v in rest.items() if k not in OLD_SWITCHES})
        self.modules_in_block_to_quantize = lists
        given = {**bound, **rest, **({LISTS: lists} if lists else {})}
        self.backend = _kernel_of_switches(given)
        setattr(self, GIVEN, given)

    return __init__


def forgetting(original: Any) -> Any:
    """transformers' `GPTQConfig.to_dict`, without what `remembering` keeps."""

    @wraps(original)
    def to_dict(self: Any) -> dict[str, Any]:
        remembered = self.__dict__.pop(GIVEN, None)
        try:
            return original(self)
        finally:
            if remembered is not None:
                setattr(self, GIVEN, remembered)

    return to_dict


def _kernel_of_switches(given: dict[str, Any]) -> str:
    backend = given.get("backend")
    if backend is None and (given.get("use_exllama") is False or given.get("disable_exllama") is True):
        return READS_THE_FILE
    return backend.lower() if isinstance(backend, str) else "auto"


def kernel_of(backend: str | None) -> str | None:
    """The kernel that a GPTQConfig's `backend` asks for, None for a free choice.

    Raises UsageError for a name that neither we nor other tools know.
    """
    if backend is None or backend in ("auto", "auto_trainable"):
        return None
    ours = [kernel.NAME for kernel in kernels.table()]
    if backend in ours:
        return backend
    if backend == "torch":
        return READS_THE_FILE
    if backend in OTHER_KERNELS:
        _say(f"backend={backend!r} is another tool's kernel; each layer takes the best that fits, of {', '.join(ours)}")
        return None
    raise UsageError(f"backend={backend!r} was asked for; there are auto, {', '.join(ours)}")


def asking(request: Request, kernel: str | None = None) -> transformers.GPTQConfig:
    """A GPTQConfig for `from_pretrained` that asks for exactly this."""
    config = transformers.GPTQConfig(bits=request.bits, backend=kernel)
    setattr(config, GIVEN, request)
    return config


def request_of(config: transformers.GPTQConfig) -> Request:
    """The quantization that a user's GPTQConfig asks for; what has no meaning here is said in one warning.

    GPTQConfig's own defaults are no wishes: where an argument was not given, wellrounded's default holds.
    """
    usual = {p.name: p.default for p in inspect.signature(transformers.GPTQConfig).parameters.values()}
    differing = {k: v for k, v in vars(config).items() if k in usual and v != usual[k]}
    given = getattr(config, GIVEN, differing)
    if isinstance(given, Request):
        return given
    idle = [f"{name} ({reason})" for name, reason in WITHOUT_MEANING.items() if given.get(name) is not None]
    known = {*usual, *OLD_SWITCHES, *WITHOUT_MEANING, "quant_method"}
    idle += [f"{name} (unknown)" for name in given if name not in known]
    if idle:
        _say(f"without meaning here, and ignored: {', '.join(idle)}")

    def wish(name: str, default: Any) -> Any:
        return default if given.get(name) is None else given[name]

    usual_settings = preset("default").settings
    return Request(
        bits=config.bits,
        group_size=wish("group_size", None),
        sym=config.sym,
        act_order=config.desc_act,
        calibration=_calibration(config.dataset),
        length=wish("model_seqlen", None),
        endings=_flat(config.modules_in_block_to_quantize),
        settings=replace(
            usual_settings,
            damping=wish("damp_percent", usual_settings.damping),
            true_sequential=wish("true_sequential", usual_settings.true_sequential),
        ),
        batch=wish("batch_size", None),
        min_tokens=1,
    )


def _calibration(dataset: Any) -> Any:
    if dataset is None:
        return NONE
    return "c4" if dataset == "c4-new" else dataset


def _flat(lists: Any) -> tuple[str, ...]:
    return tuple(name for entry in lists or () for name in ([entry] if isinstance(entry, str) else entry))


def _say(what: str) -> None:
    warnings.warn(f"GPTQConfig: {what}", UserWarning, stacklevel=2)
