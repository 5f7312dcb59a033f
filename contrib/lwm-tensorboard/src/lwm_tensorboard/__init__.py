"""lwm_tensorboard: a run's metrics as TensorBoard events. Importing this package loads nothing."""

__version__ = "0.1.0"
