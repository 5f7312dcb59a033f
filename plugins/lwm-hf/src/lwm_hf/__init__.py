"""lwm_hf: Hugging Face tokenizers for LWM. Importing this package loads nothing."""

__version__ = "0.1.0"
