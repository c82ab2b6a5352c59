"""Which scheme each layer gets: an ordered list of patterns, the first match wins."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import UsageError
from .scheme import Scheme


@dataclass(frozen=True)
class Rule:
    """Layers whose full name matches `pattern` from its start (`re.match`) get `scheme`; None keeps them dense."""

    pattern: str
    scheme: Scheme | None

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UsageError(f"pattern {self.pattern!r} is not a regular expression: {error}") from None

    @classmethod
    def all_but(cls, endings: Iterable[str]) -> Rule:
        """A rule that keeps every layer dense whose name does not end with one of these, whole parts compared.

        >>> rule = Rule.all_but(["self_attn.q_proj"])
        >>> [bool(re.match(rule.pattern, name)) for name in ("h.0.self_attn.q_proj", "h.0.self_attn.kq_proj")]
        [False, True]
        """
        return cls(rf"(?!(?:.*\.)?(?:{'|'.join(map(re.escape, endings))})$)", None)


@dataclass(frozen=True)
class Recipe:
    """`scheme` for every layer, unless one of `rules` says otherwise.

    >>> recipe = Recipe(Scheme(bits=4), (Rule(r".*down_proj", Scheme(bits=8)), Rule(r".*router", None)))
    >>> recipe.scheme_of("model.layers.0.mlp.down_proj").bits
    8
    >>> recipe.scheme_of("model.layers.0.mlp.router") is None
    True
    """

    scheme: Scheme
    rules: tuple[Rule, ...] = ()

    def scheme_of(self, name: str) -> Scheme | None:
        """The scheme of the layer with this full name, or None if it stays dense."""
        for rule in self.rules:
            if re.match(rule.pattern, name):
                return rule.scheme
        return self.scheme

    @classmethod
    def of(cls, scheme: Scheme, ignore: Iterable[str] = (), only: Iterable[str] = ()) -> Recipe:
        """`scheme` for the layers in whose name one of `only` is found (anywhere, `re.search`), and none of `ignore`.

        >>> recipe = Recipe.of(Scheme(bits=4), ignore=["layers.0."], only=["mlp"])
        >>> [recipe.scheme_of(name) is None for name in ("h.layers.0.mlp.up", "h.layers.1.mlp.up", "h.layers.1.attn.q")]
        [True, False, True]
        """
        for pattern in (*ignore, *only):
            Rule(pattern, None)  # an error quotes what the user wrote, not what we make of it
        rest = [Rule(rf"(?!.*(?:{'|'.join(f'(?:{pattern})' for pattern in only)}))", None)] if only else []
        return cls(scheme, (*(Rule(f".*(?:{pattern})", None) for pattern in ignore), *rest))


def role_of(name: str) -> str:
    """The name with * for every number in it.

    >>> role_of("model.layers.3.mlp.experts.12.up_proj")
    'model.layers.*.mlp.experts.*.up_proj'
    """
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
