"""The conformance kit's way in: a strategy on gloo processes of this machine, NumPy in and out.

Shapes: B batch, S sequence, H query heads, K key-value heads, D head dim; natural order.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lwm_core.attention import AttentionMask
from lwm_core.errors import ShapeError
from lwm_torch_ring.attention.options import AttentionOptions
from lwm_torch_ring.attention.ranks import RankError, rank_pool
from lwm_torch_ring.attention.strategies import sequence_layout


class TorchRingHarness:
    """``world`` gloo processes with one thread each; NumPy in and out, natural order."""

    def __init__(self, options: AttentionOptions, world: int) -> None:
        self.options, self.world = options, world

    def _resolved(self, q: NDArray[Any], k: NDArray[Any], mask: AttentionMask) -> AttentionOptions:
        """What the ranks, who measure for themselves, make of strategy ``auto``: the layout depends on it."""
        if self.options.strategy != "auto":
            return self.options
        (rows, seq_len, heads, head_dim), kv_heads = q.shape, k.shape[2]
        shape = {"seq_len": seq_len, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "rows": rows}
        shape["element_bytes"] = q.itemsize
        header = {"do": "resolve", "options": self.options.model_dump_json(), "mask": asdict(mask), "shape": shape}
        told = {reply["options"] for reply, _ in rank_pool(self.world).ask(header, [{}] * self.world)}
        if len(told) != 1:
            raise RankError(f"torch-ring: the ranks chose apart: {' and '.join(sorted(told))}")
        return AttentionOptions.model_validate_json(told.pop())

    def _ask(
        self, do: str, mask: AttentionMask, arrays: dict[str, NDArray[Any]], segments: NDArray[Any] | None
    ) -> dict[str, NDArray[Any]]:
        if segments is not None:
            arrays = {**arrays, "segment_ids": np.asarray(segments, np.int32)}
        lengths = {array.shape[1] for array in arrays.values()}
        if len(lengths) != 1:
            raise ShapeError(f"torch-ring: arrays of {sorted(lengths)} tokens do not fit together; expected one length")
        (seq_len,) = lengths
        options = self._resolved(arrays["q"], arrays["k"], mask)
        layout = sequence_layout(options, seq_len, self.world)
        order, inverse = layout.permutation(seq_len), layout.inverse(seq_len)
        dealt = {name: np.split(array[:, order], self.world, axis=1) for name, array in arrays.items()}
        header = {"do": do, "options": options.model_dump_json(), "mask": asdict(mask), "seq_len": seq_len}
        shards = [{name: parts[rank] for name, parts in dealt.items()} for rank in range(self.world)]
        replies = [reply for _, reply in rank_pool(self.world).ask(header, shards)]
        return {name: np.concatenate([reply[name] for reply in replies], axis=1)[:, inverse] for name in replies[0]}

    def forward(
        self,
        q: NDArray[Any],
        k: NDArray[Any],
        v: NDArray[Any],
        mask: AttentionMask,
        segment_ids: NDArray[np.integer] | None = None,
    ) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """See ``lwm_core.protocols.AttentionHarness``; raises RankError where a rank died or hung."""
        reply = self._ask("forward", mask, {"q": q, "k": k, "v": v}, segment_ids)
        return reply["out"], reply["lse"]

    def backward(
        self,
        q: NDArray[Any],
        k: NDArray[Any],
        v: NDArray[Any],
        mask: AttentionMask,
        dout: NDArray[Any],
        segment_ids: NDArray[np.integer] | None = None,
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """See ``lwm_core.protocols.AttentionHarness``; raises RankError where a rank died or hung."""
        reply = self._ask("backward", mask, {"q": q, "k": k, "v": v, "dout": dout}, segment_ids)
        return reply["dq"], reply["dk"], reply["dv"]

    def close(self) -> None:
        """Nothing to drop; the rank processes stay for other options and end with this process."""
