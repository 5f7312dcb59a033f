"""What an attention plugin gives: a factory, the backend it builds, and a harness in NumPy for the kit.

Shapes: B batch, S sequence, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from lwm_core.attention import AttentionMask
from lwm_core.attention_cost import AttentionShape
from lwm_core.layout import SequenceLayout

Array = Any
"""An array of the plugin's own framework, opaque to the core."""


@dataclass(frozen=True)
class AttentionAxes:
    """Which mesh axes carry what: rows over ``batch``, heads over ``heads``, tokens over ``seq``."""

    batch: tuple[str, ...] = ("dp", "fsdp")
    heads: str = "tp"
    seq: str = "sp"


@runtime_checkable
class AttentionBackend(Protocol):
    """Attention bound to a mesh and a sequence length."""

    layout: SequenceLayout

    def attend(self, q: Array, k: Array, v: Array, mask: AttentionMask, segment_ids: Array | None = None) -> Array:
        """Differentiable attention of ``q [B,S,H,D]`` over ``k, v [B,S,K,D]``, tokens in the layout's order.

        JAX takes and gives global arrays inside jit; Torch takes this rank's shards. Raises UnsupportedError for what
        is not supported.
        """
        ...


@runtime_checkable
class AttentionHarness(Protocol):
    """A backend on real devices or processes, NumPy in and out, natural order: what the conformance kit drives."""

    def forward(
        self,
        q: NDArray[Any],
        k: NDArray[Any],
        v: NDArray[Any],
        mask: AttentionMask,
        segment_ids: NDArray[np.integer] | None = None,
    ) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """``out [B,S,H,D]`` and natural-log ``lse [B,S,H]``."""
        ...

    def backward(
        self,
        q: NDArray[Any],
        k: NDArray[Any],
        v: NDArray[Any],
        mask: AttentionMask,
        dout: NDArray[Any],
        segment_ids: NDArray[np.integer] | None = None,
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """``dq, dk, dv`` of ``sum(out · dout)``."""
        ...

    def close(self) -> None:
        """End the workers."""
        ...


@dataclass(frozen=True)
class AttentionChoice:
    """Options in which nothing is left to be chosen, and a line about each alternative that was looked at."""

    options: Any
    reasons: tuple[str, ...] = ()


@runtime_checkable
class AttentionFactory(Protocol):
    """The factory object of a ``lwm.attention.v1`` plugin."""

    def resolve(self, options: Any, shape: AttentionShape, mesh: Any, axes: AttentionAxes) -> AttentionChoice:
        """Replace what ``options`` leave to the plugin by what suits the trainer's mesh; ``shape`` has all heads.

        A trainer calls it first and hands the result's options to ``layout`` and ``build``. Raises ShapeError or
        UnsupportedError where nothing suits.
        """
        ...

    def layout(self, options: Any, seq_len: int, world: int) -> SequenceLayout:
        """The layout of a sequence over ``world`` ranks; raises ShapeError for a length that does not divide."""
        ...

    def build(self, options: Any, mesh: Any, axes: AttentionAxes, seq_len: int) -> AttentionBackend:
        """The backend on the trainer's own mesh."""
        ...

    def harness(self, options: Any, world: int) -> AttentionHarness:
        """The backend on ``world`` devices that the harness sees to itself."""
        ...
