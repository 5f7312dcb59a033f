"""What is static about one attention: where the tokens lie, who may see whom, and which kernel computes it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
from torch import Tensor

from lwm_core.attention import AttentionMask, needed_hops
from lwm_core.layout import SequenceLayout
from lwm_torch_ring.attention.accumulate import Saved, State
from lwm_torch_ring.attention.blocks import Plan
from lwm_torch_ring.attention.kernels.contract import Kernel
from lwm_torch_ring.attention.peers import Neighbourhood


class Movement(NamedTuple):
    """How keys come to the queries, and how their gradients go home: what a strategy is.

    Shapes, of one rank: q ``[B,C,H,D]``; k, v ``[B,C,K,D]``.
    """

    absorb: Callable[[Tensor, Tensor, Tensor, AttentionSpec, Plan], State]
    """(q, k, v, spec, plan) → the state after the queries have seen all keys."""
    gradients: Callable[[Saved, Tensor, Tensor, AttentionSpec, Plan], tuple[Tensor, Tensor, Tensor]]
    """(saved, k, v, spec, plan) → dq float32, and dk and dv of the keys here in the dtype of k."""


_specs: WeakValueDictionary[str, AttentionSpec] = WeakValueDictionary()
_numbers = count()


@dataclass(frozen=True, eq=False)
class AttentionSpec:
    """Known to operators of torch by its ``handle``, as long as somebody holds it.

    Args:
        movement: the strategy.
        peers: ``layout.world × inner`` processes, of which ``inner`` neighbours, having exchanged their heads for
            tokens (see ``ulysses.py``), are one rank of the layout.
        layout: how tokens are dealt to ranks.
        seq_len: tokens of the whole sequence.
        mask: which keys a query may see.
        kernel: computes the tiles.
        gather_heads: key-value heads that ``allgather`` fetches at a time.
    """

    movement: Movement
    peers: Neighbourhood
    layout: SequenceLayout
    seq_len: int
    mask: AttentionMask
    kernel: Kernel
    gather_heads: int | None = None
    handle: str = field(init=False)
    _last: list[Any] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        object.__setattr__(self, "handle", f"attention-{next(_numbers)}")
        _specs[self.handle] = self

    @staticmethod
    def of(handle: str) -> AttentionSpec:
        """The spec of a handle."""
        return _specs[handle]

    @property
    def world(self) -> int:
        """Ranks of the layout."""
        return self.layout.world

    @property
    def rank(self) -> int:
        """This process's."""
        return self.peers.ring.rank

    @cached_property
    def hops(self) -> tuple[int, ...]:
        """The hops of a ring that bring something."""
        return needed_hops(self.mask, self.layout, self.seq_len)

    @cached_property
    def _undocumented(self) -> Plan:
        return self._plan(None)

    def _plan(self, segments: Any | None) -> Plan:
        kernel = self.kernel
        return Plan(
            self.mask, self.layout, self.seq_len, self.rank, kernel.chunk, kernel.limit, segments,
            kernel.packed is not None,
        )  # fmt: skip

    def plan(self, segments: Tensor | None) -> Plan:
        """The tiles of this rank's queries; ``segments [B,S/n]`` of this process, of n that hold the sequence.

        All ranks' ids are gathered first and brought to the host: tiles are worked out before anything is computed. The
        last plan is kept and found again by the tensor itself, so that the layers of a model, and its backward pass,
        share it; a tensor that was changed in place is another one. All ranks run the same program, so that all find a
        plan or none does.
        """
        if segments is None:
            return self._undocumented
        version = None if segments.is_inference() else segments._version
        if self._last and version is not None and self._last[0]() is segments and self._last[1] == version:
            found: Plan = self._last[2]
            return found
        gathered, pending = self.peers.everyone.gather(segments)
        pending.wait()
        ids = gathered.transpose(0, 1).flatten(1).cpu().numpy()
        plan = self._plan(np.ascontiguousarray(ids[:, self.layout.inverse(self.seq_len)]))
        self._last[:] = weakref.ref(segments), version, plan
        return plan
