"""LLM weights, well rounded."""

__version__ = "0.1.0"
