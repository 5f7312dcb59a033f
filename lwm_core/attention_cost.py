"""What sharded attention costs by the physics: floating point operations, bytes sent, and which of them hide.

Pure functions of shapes and of a machine's two rates; both frameworks choose a strategy by them and the planner tells
what a run will cost. A hop of a ring hides behind its compute where a rank's tokens outweigh FLOPS ÷ bandwidth
(arXiv 2310.01889, section 3); what does not hide is *exposed*, and the cheapest strategy is the one that exposes least.

Symbols: n ranks, c = S/n tokens a rank, H query heads, K key-value heads, D head dim, u ranks that exchange heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import lcm

import numpy as np
from numpy.typing import NDArray

from lwm_core.attention import AttentionMask, needed_hops
from lwm_core.errors import ShapeError, UnsupportedError
from lwm_core.layout import LayoutKind, SequenceLayout

STRATEGIES: tuple[str, ...] = ("ring", "usp", "ulysses", "allgather")
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5  # matrix products a pair of tokens and head: QKᵀ, PV; and five to go back
CAUSAL = AttentionMask("causal")
GRADIENT_BYTES = 4  # dK and dV travel in float32


@dataclass(frozen=True)
class AttentionShape:
    """One layer's attention on one group of ranks.

    Args:
        seq_len: tokens S of the whole sequence.
        heads, kv_heads: H and K of one tensor-parallel rank.
        head_dim: D.
        rows: sequences at a time.
        element_bytes: of q, k, v and out.
        document: mean tokens of a document; none: one document fills the sequence.
        mask: which keys a query may see.
    """

    seq_len: int
    heads: int
    kv_heads: int
    head_dim: int
    rows: int = 1
    element_bytes: int = 2
    document: int | None = None
    mask: AttentionMask = CAUSAL

    @property
    def pairs(self) -> float:
        """Query-key pairs of one head and row, where documents all have the mean length."""
        document = min(self.document or self.seq_len, self.seq_len)
        window = min(self.mask.window or document, document)
        if self.mask.kind == "full":
            return float(self.seq_len) * document
        # Every query sees its window, but for the first of a document, which see what there is.
        seen = window * (document - window) + window * (window + 1) / 2
        return seen * self.seq_len / document

    def flops(self, products: int) -> float:
        """Floating point operations of ``products`` matrix products over all pairs, heads and rows."""
        return 2.0 * products * self.pairs * self.heads * self.head_dim * self.rows


@dataclass(frozen=True)
class MachineRates:
    """What a device computes and what it sends to a neighbour.

    Args:
        flops: floating point operations a second that an attention kernel reaches.
        bandwidth: bytes a second, in one direction.
    """

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class StrategyCost:
    """Of one layer, forward and backward together, on the busiest device.

    Args:
        strategy: its name; ``inner`` is u, 1 where no heads are exchanged.
        compute: seconds of arithmetic.
        exposed: seconds of communication that nothing hides.
        sent: bytes that a device sends.
        held: bytes of keys and values that a device holds at once.
    """

    strategy: str
    inner: int
    compute: float
    exposed: float
    sent: float
    held: float

    @property
    def seconds(self) -> float:
        """Compute and what is exposed beside it."""
        return self.compute + self.exposed


def repeated_kv_heads(heads: int, kv_heads: int, ranks: int) -> int:
    """Key-value heads after they are repeated so that ``ranks`` divides them.

    Raises:
        UnsupportedError: query heads do not divide over the ranks, or copies of key-value heads over query heads.
    """
    total = lcm(kv_heads, ranks)
    if heads % ranks or heads % total:
        raise UnsupportedError(
            f"{heads} query and {kv_heads} key-value heads cannot be dealt to {ranks} ranks; use a number that the "
            "query heads divide by, and that the key-value heads divide by or are divided by"
        )
    return total


def imbalance(layout: LayoutKind, shape: AttentionShape, world: int) -> float:
    """The busiest rank's work over the mean: nearly 2 for one causal document in contiguous order, else near 1."""
    causal = shape.mask.kind != "full" and shape.mask.window is None
    if layout != "contiguous" or not causal or world == 1:
        return 1.0
    document = min(shape.document or shape.seq_len, shape.seq_len)
    return 2.0 - 1.0 / world if document == shape.seq_len else 1.0


def _pairs_within(tokens: NDArray[np.float64], document: float | None, window: int | None) -> NDArray[np.float64]:
    """Causal pairs in a run of so many tokens: sum of (n − δ) · P(δ) over the lags δ that a query may look back.

    P(δ) = 1 − δ/document is the chance that a token and the δth before it are of one document, wherever documents of
    that mean length begin.
    """
    n, inverse = tokens, (0.0 if document is None else 1.0 / document)
    lags = np.minimum(n, min(window or np.inf, document or np.inf))
    first, second = lags * (lags - 1) / 2, (lags - 1) * lags * (2 * lags - 1) / 6  # sums of δ and δ²
    pairs: NDArray[np.float64] = n * lags - (1 + n * inverse) * first + second * inverse
    return pairs


def hop_shares(shape: AttentionShape, layout: LayoutKind, ranks: int) -> tuple[tuple[int, float], ...]:
    """(hop, its share of a round's work) for the hops that a ring needs: the busiest rank of each hop, in the mean over
    where documents may begin. Block-causal masks are taken for causal ones.

    What hides a transfer is the work of the hop beside it, and documents or a window leave nearly all to the first.
    """
    if ranks == 1:
        return ((0, 1.0),)
    document = float(shape.document) if shape.document and shape.document < shape.seq_len else None
    return _hop_shares(shape.seq_len, document, shape.mask, layout, ranks)


@lru_cache(maxsize=512)
def _hop_shares(
    seq_len: int, document: float | None, mask: AttentionMask, layout: LayoutKind, ranks: int
) -> tuple[tuple[int, float], ...]:
    """Of several ranks; shapes that differ in heads, rows or bytes alone have the same shares."""
    dealt = SequenceLayout(layout, ranks)
    length = -(-seq_len // dealt.multiple) * dealt.multiple
    hops = needed_hops(mask, dealt, length) if mask.window else tuple(range(ranks))
    if layout == "striped":  # every rank has a token of every stripe: all hops are alike
        return tuple((hop, 1 / len(hops)) for hop in hops)
    if mask.kind == "full" and document is None:
        return tuple((hop, 1 / len(hops)) for hop in hops)
    halves = 1 if layout == "contiguous" else 2
    run, rank = length / (ranks * halves), np.arange(ranks)
    # Pairs between two runs of one length that begin j runs apart, by inclusion and exclusion; 0 where keys are later.
    at = _pairs_within(np.arange(halves * ranks + 1, dtype=np.float64) * run, document, mask.window)
    apart = np.diff(at, prepend=0.0, n=2)
    if mask.kind == "full":
        apart[0] *= 2
    work = []
    for hop in hops:
        keys = (rank - hop) % ranks
        places = [(rank, keys)] if halves == 1 else [
            (q, k) for q in (rank, 2 * ranks - 1 - rank) for k in (keys, 2 * ranks - 1 - keys)
        ]  # fmt: skip
        between = (np.abs(q - k) if mask.kind == "full" else q - k for q, k in places)
        by_rank = np.stack([np.where(j >= 0, apart[np.maximum(j, 0)], 0.0) for j in between])
        work.append(float(by_rank.sum(axis=0).max()))
    return tuple((hop, one / sum(work)) for hop, one in zip(hops, work, strict=True))


def strategy_cost(
    strategy: str, shape: AttentionShape, world: int, rates: MachineRates, layout: LayoutKind = "zigzag", inner: int = 1
) -> StrategyCost:
    """The cost of ``strategy`` over ``world`` ranks; ``inner`` is looked at for ``usp`` only.

    A ring's transfers are hidden hop by hop: long hops do not hide what short ones leave exposed. A hop that jumps over
    others counts as one transfer.

    Raises:
        UnsupportedError: the strategy is unknown, or the heads do not divide over the ranks that exchange them.
        ShapeError: ``inner`` does not divide ``world``.
    """
    if strategy not in STRATEGIES:
        raise UnsupportedError(f"strategy {strategy!r} is unknown; expected one of {', '.join(STRATEGIES)}")
    inner = {"usp": inner, "ulysses": world}.get(strategy, 1)
    if world % inner:
        raise ShapeError(f"usp: inner = {inner} does not divide {world} ranks")
    kv_heads = repeated_kv_heads(shape.heads, shape.kv_heads, inner) if inner > 1 else shape.kv_heads
    tokens = shape.rows * shape.seq_len / world
    ranks = world // inner
    balance = imbalance(layout, shape, ranks)
    forward, backward = (
        shape.flops(products) / world * balance / rates.flops for products in (FORWARD_PRODUCTS, BACKWARD_PRODUCTS)
    )
    keys = 2 * tokens * kv_heads * shape.head_dim  # elements of K and V of a device
    key_bytes, gradient_bytes = keys * shape.element_bytes, keys * GRADIENT_BYTES
    if strategy == "allgather":
        sent = (world - 1) * (2 * key_bytes + gradient_bytes)
        return StrategyCost(strategy, 1, forward + backward, sent / rates.bandwidth, sent, world * key_bytes)
    queries = 2 * tokens * shape.heads * shape.head_dim * shape.element_bytes  # q and out, or dq and dout
    exchanged = 2 * (queries + key_bytes) * (inner - 1) / inner
    shares = [share for _, share in hop_shares(shape, layout, ranks)]
    hops = len(shares) - 1
    # Finished gradients go home in the dtype of the keys, when nothing is left to compute that could hide them.
    home = key_bytes if hops else 0.0
    exposed = (exchanged + home) / rates.bandwidth
    for hop, share in enumerate(shares) if hops else ():
        # Beside a hop's compute travel the next hop's keys, and backward the gradients of the hop before.
        keys_on, gradients_on = (key_bytes if hop < hops else 0.0), (gradient_bytes if hop else 0.0)
        exposed += max(0.0, keys_on / rates.bandwidth - forward * share)
        exposed += max(0.0, (keys_on + gradients_on) / rates.bandwidth - backward * share)
    held = key_bytes * (2 if hops else 1)  # what arrives beside what is in hand; exchanging heads changes neither
    sent = exchanged + hops * (2 * key_bytes + gradient_bytes) + home
    return StrategyCost(strategy, inner, forward + backward, exposed, sent, held)


@dataclass(frozen=True)
class StrategyChoice:
    """The strategy that exposes least, and a line about each that was looked at."""

    cost: StrategyCost
    reasons: tuple[str, ...]


def choose_strategy(
    shape: AttentionShape,
    world: int,
    rates: MachineRates,
    layout: LayoutKind = "zigzag",
    memory: float | None = None,
    strategies: Sequence[str] = STRATEGIES,
) -> StrategyChoice:
    """The strategy that takes the least time among those whose heads divide and whose gathered keys fit.

    Args:
        memory: bytes that a device has for gathered keys and values; none: they are not counted. The other strategies
            hold a rank's part of them, which its activations are made of anyway.
        strategies: names to choose from; of equals the first is taken.

    Raises:
        UnsupportedError: none is left; the message says why each fell out.
    """
    kept: list[StrategyCost] = []
    reasons: list[str] = []
    for strategy in strategies:
        sizes = [u for u in range(2, world) if world % u == 0] if strategy == "usp" else [1]
        if strategy == "usp" and not sizes:
            reasons.append(f"usp: {world} ranks cannot be split into exchanging and ringing ones")
        for inner in sizes:
            name = f"usp with inner = {inner}" if strategy == "usp" else strategy
            try:
                cost = strategy_cost(strategy, shape, world, rates, layout, inner)
            except UnsupportedError as error:
                reasons.append(f"{name}: {error}")
                continue
            if strategy == "allgather" and memory is not None and cost.held > memory:
                reasons.append(f"{name}: holds {cost.held:.3g} bytes of keys and values, more than {memory:.3g}")
                continue
            reasons.append(f"{name}: {cost.compute:.3g} s of compute and {cost.exposed:.3g} s exposed")
            kept.append(cost)
    if not kept:
        raise UnsupportedError(f"no attention strategy fits: {'; '.join(reasons)}")
    return StrategyChoice(min(kept, key=lambda cost: cost.seconds), tuple(reasons))
