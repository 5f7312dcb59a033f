"""lwm_tiny_base: the weights of a small base model. Importing this package loads nothing."""

__version__ = "0.1.0"
