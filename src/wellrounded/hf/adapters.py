"""PEFT on experts that are taken apart: they are linear layers, whatever transformers makes of them elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from typing import Any

from ..model.experts import Experts


def leave_apart() -> None:
    """Let PEFT put adapters on experts that are taken apart as on any linear layer.

    It would rename what is asked for, and what an adapter's file holds, to the fused parameters that a model of this
    type has otherwise. Models with fused experts are served as before; doing it again changes nothing.
    """
    if find_spec("peft") is None:
        return
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:
        return  # an older one, which renames nothing
    for name, given in (
        ("convert_peft_config_for_transformers", "peft_config"),
        ("convert_peft_adapter_state_dict_for_transformers", "adapter_state_dict"),
    ):
        original = getattr(conversion, name, None)
        if original is not None and not hasattr(original, "leaves_apart"):
            setattr(conversion, name, _leaving(original, given))


def _leaving(original: Callable, given: str) -> Callable:
    @wraps(original)
    def convert(*args: Any, **kwargs: Any) -> Any:
        model = next((one for one in (*args, *kwargs.values()) if hasattr(one, "named_modules")), None)
        if model is not None and any(isinstance(module, Experts) for module in model.modules()):
            return kwargs.get(given)  # as it is; of a configuration nobody looks at what comes back
        return original(*args, **kwargs)

    convert.leaves_apart = True  # type: ignore[attr-defined]
    return convert
