"""lwm_torch_ring: LWM on Torch. Importing this package does not load torch."""

__version__ = "0.1.0"
