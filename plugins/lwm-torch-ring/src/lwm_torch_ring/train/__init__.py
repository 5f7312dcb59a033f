"""The trainer ``torch``: optimizer steps on a mesh of processes, evaluation, checkpoints."""
