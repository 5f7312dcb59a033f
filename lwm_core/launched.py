"""What a launcher has told this process of its siblings: ``torchrun`` and its like set ``RANK`` and ``WORLD_SIZE``."""

from __future__ import annotations

import os

from lwm_core.errors import UsageError


def launched() -> tuple[int, int]:
    """(rank, world) of this process; (0, 1) unless both variables are set.

    Raises:
        UsageError: they are set and are no rank of a world.
    """
    words = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if not all(words):
        return 0, 1
    try:
        rank, world = (int(word) for word in words if word)
    except ValueError:
        rank, world = -1, 0
    if not 0 <= rank < world:
        raise UsageError(
            f"RANK={words[0]} and WORLD_SIZE={words[1]} are set, which is no rank of a world; start the command with "
            "torchrun, or unset them"
        )
    return rank, world


def launched_rank() -> int:
    """The rank of this process; rank 0 speaks for all."""
    return launched()[0]


def launched_world() -> int:
    """How many processes were started together."""
    return launched()[1]
