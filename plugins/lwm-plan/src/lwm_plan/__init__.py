"""lwm_plan: what a stage of training takes on a machine. Importing this package loads nothing."""

__version__ = "0.1.0"
