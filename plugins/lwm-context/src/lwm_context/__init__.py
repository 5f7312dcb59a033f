"""lwm_context: context-extension schedules and RoPE scalings. Importing this package loads nothing."""

__version__ = "0.1.0"
