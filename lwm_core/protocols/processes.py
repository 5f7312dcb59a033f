"""The processes that run one training together."""

from __future__ import annotations

from typing import Any, Protocol


class Processes(Protocol):
    """The processes of one run. Every one of them calls every method, at the same time and in the same order.

    A call waits as long as rank 0 works alone, which may be minutes (an evaluation's own work, a checkpoint's
    checksums, a report), so it has no short timeout of its own. That a process has died is to be noticed from its
    connection or from a heartbeat, and raises an ``LwmError`` that names its rank. Any value is small, but for a
    prompt's ids.
    """

    @property
    def rank(self) -> int:
        """The number of this process, from 0. Rank 0 speaks, writes and decides; the others follow."""
        ...

    @property
    def world(self) -> int:
        """How many there are."""
        ...

    def share(self, value: Any) -> Any:
        """Rank 0's value, which JSON can hold, on every rank; what the others pass is not looked at."""
        ...

    def largest(self, value: int) -> int:
        """The largest of all ranks' values, each from 0 to below 2**62."""
        ...


class SoleProcess:
    """A process without siblings."""

    rank = 0
    world = 1

    def share(self, value: Any) -> Any:
        """The value itself."""
        return value

    def largest(self, value: int) -> int:
        """The value itself."""
        return value


ALONE = SoleProcess()
"""What a trainer of one process has for ``processes``."""
