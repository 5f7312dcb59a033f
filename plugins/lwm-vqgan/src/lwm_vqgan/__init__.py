"""lwm_vqgan: pictures and video to codes and back. Importing this package loads nothing."""

__version__ = "0.1.0"
