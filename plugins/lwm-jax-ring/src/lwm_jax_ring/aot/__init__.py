"""Ahead of time: the step of a stage through the real TPU compiler, on a machine without a TPU."""
