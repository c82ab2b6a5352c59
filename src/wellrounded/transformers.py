"""`python -m wellrounded.transformers serve OUT`: transformers' own command line, with GPTQ on this engine.

Everything after the module's name goes to transformers. Its commands are processes of their own, in which nobody has
called `wellrounded.register()`; this one does. `serve` needs `pip install "transformers[serving]"`.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from .hf.register import register


def main() -> None:
    """What the `transformers` command does, registered."""
    (command, *_) = entry_points(group="console_scripts", name="transformers")
    register()
    command.load()()


if __name__ == "__main__":
    main()
