"""lwm_vqgan: frames to codes and back. Importing this package loads nothing."""

__version__ = "0.1.0"
