"""Keeps Hugging Face's libraries from talking over the command line."""

from __future__ import annotations

import os
import warnings


def quiet() -> None:
    """Their progress bars and advice would drown ours; their errors still show. For the commands only."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
