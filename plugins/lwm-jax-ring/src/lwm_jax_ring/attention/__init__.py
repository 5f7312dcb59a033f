"""Attention ``jax-ring``: strategies over the ``sp`` axis of a mesh, kernels behind one block contract."""
