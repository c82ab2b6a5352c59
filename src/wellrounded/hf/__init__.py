"""The only rooms that know Hugging Face's libraries."""
