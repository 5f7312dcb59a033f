"""Attention over the ``sp`` axis of a device mesh."""
