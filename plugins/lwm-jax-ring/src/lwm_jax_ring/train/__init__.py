"""The trainer ``jax``: optimizer steps on a mesh, evaluation, checkpoints."""
