"""What each axis of a mesh sends in a step, and how much of it no arithmetic hides.

Bytes are those that a device sends in the step that the trainer ``jax`` compiles, and are held against the TPU
compiler's own, axis by axis (docs/benchmarks/aot.json). A product that waits for a gather, or makes what is scattered,
the compiler runs as a ring of permutes beside the product (*collective matmul*, XLA's windowed einsum): n devices then
pass parts on n times, or once more, where a plain gather or scatter sends n - 1.

Shapes: T a device's tokens of a micro-batch, E hidden size, V vocabulary, L layers, n devices of an axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from lwm_core.attention_cost import StrategyCost
from lwm_plan.hardware import Machine
from lwm_plan.job import BACK, Placed, part
from lwm_plan.memory import FLOAT, parameter_bytes

RECOMPUTED = ("full", "attention", "offload")
"""Policies that run a layer's products again on the way back."""
LOOPED = 8
"""Ranks of ``tp`` from which on the compiler leaves a collective matmul a loop; below, it unrolls it and drops parts
that need not be sent."""
RINGED = range(8, 33)
"""Devices among which the sums of gradients are made by collective matmuls. Among more, below :data:`SUMMED`, they are
scattered plainly, but for that of the feed-forward's last matrix, which is summed whole."""

SUMMED = 256
"""Devices that share parameters out from which on the compiler sums gradients whole instead of scattering them: a
device's part of a matrix is then 16 columns of 4,096 or fewer. Seen for 256 and 512; among 128 they were scattered."""
GATHERED_BY_SUMS = ("v4", "v5p")
"""Kinds for which it then gathers by sums, too: a layer's in float32, and the head, twice a slice of the loss, in the
type that is computed with."""
OTHERWISE = "v6e"
"""The kind for which it scatters every gradient plainly between :data:`RINGED` and :data:`SUMMED`, gathers the head
twice there, and the stream once more a layer where ``tp`` is below :data:`LOOPED`: seen in one step, at 32K on 256."""


@dataclass(frozen=True)
class Transfer:
    """What one axis sends in a step.

    Args:
        axis: of the mesh, or several.
        what: ``attention``: keys and values, or heads; ``stream``: gathered and summed over ``tp``; ``parameters``:
            gathered, their gradients scattered; ``copies``: gradients of parameters that are not shared out.
        bytes: that a device sends.
        seconds: that takes alone.
        exposed: seconds of it that no arithmetic hides.
        hides: whether what is exposed is too little of the step to count (:data:`lwm_plan.timing.HIDDEN`).
    """

    axis: str
    what: str
    bytes: float
    seconds: float
    exposed: float
    hides: bool = True


def link(placed: Placed, machine: Machine, axis: str) -> float:
    """Bytes a second in one direction along ``axis``: the last axes of a mesh lie within an island of GPUs."""
    order = ("sp", "tp", "fsdp", "dp")
    span = 1
    for inner in order[: order.index(axis) + 1]:
        span *= placed.sizes[inner]
    device = machine.device
    return device.link if not device.island or span <= device.island else device.network


@lru_cache(maxsize=4096)
def slices(tokens: int, rows: int, chunk: int | None) -> int:
    """Into how many equal slices of at most ``chunk`` tokens the trainer cuts a device's ``rows`` of ``tokens``."""
    if chunk is None:
        return 1
    limit = min(max(1, chunk // rows), tokens)
    return tokens // next(size for size in range(limit, 0, -1) if tokens % size == 0)


def stream_parts(placed: Placed, kind: str = "") -> int:
    """Parts, each 1/n of a device's ``[T,E]``, that a layer sends over the n ranks of ``tp``.

    Gathered are: the stream before the projections and before the feed-forward, twice where it is recomputed; on the
    way back the gradients of both results. Scattered are sums: after attention, twice where it is recomputed, and the
    projections' of the way back. Collective matmuls are: what leaves the feed-forward, and on its way back what enters
    it by the gate and by the other matrix, and the gradient of what left it, for the product with the matrix and again
    for the matrix' own gradient. A layer that is recomputed whole, not in slices of tokens, has three of the gathers
    once more.
    """
    job, n = placed.job, placed.sizes["tp"]
    plain = 6
    if job.remat in RECOMPUTED:
        whole = slices(placed.stage.seq_len // placed.sizes["sp"], placed.rows, job.token_chunk) == 1
        plain = 12 if whole else 9
    plain += kind == OTHERWISE and n < LOOPED and RINGED.stop <= placed.sharing < SUMMED
    ringed = 3 * (n + 1) + n + (n + 1) if n >= LOOPED else (n + 1) + 2 * n + (n - 1)
    return plain * (n - 1) + ringed


@dataclass(frozen=True)
class Stream:
    """What goes over ``tp``, in bytes: ``accumulate · (layers · a layer's + the loss')``."""

    layer: float
    loss: float


def stream(placed: Placed, kind: str = "") -> Stream:
    """By a layer and by the loss, which gathers the stream twice and scatters a float32 sum; of a micro-batch."""
    job, n = placed.job, placed.sizes["tp"]
    piece = placed.tokens * job.model.hidden_size / n
    return Stream(
        stream_parts(placed, kind) * job.element_bytes * piece, (2 * job.element_bytes + FLOAT) * (n - 1) * piece
    )


def stream_bytes(placed: Placed, kind: str = "") -> float:
    """Sent over ``tp`` in a step by devices of this kind."""
    found = stream(placed, kind)
    return placed.stage.accumulate * (placed.job.model.num_layers * found.layer + found.loss)


@dataclass(frozen=True)
class Shared:
    """What goes over the axes that share parameters out, in bytes.

    ``accumulate · (layers · (gathered + slices · scattered) + loss_slices · head)``.
    """

    gathered: float
    scattered: float
    slices: int
    head: float
    loss_slices: int


def shared(placed: Placed, kind: str = "") -> Shared:
    """Of a micro-batch.

    A layer's are gathered forward and backward in the type that is computed with. Their float32 gradients are scattered
    as they are summed, after every slice of tokens. The head is gathered three times and scattered once in every slice
    of the loss. So where few devices share; for more see :data:`RINGED`, :data:`SUMMED` and :data:`OTHERWISE`.

    Args:
        kind: of device.
    """
    job, stage, tp, n = placed.job, placed.stage, placed.sizes["tp"], placed.sharing
    model, local = job.model, stage.seq_len // placed.sizes["sp"]
    elements = job.matrix_elements(tp)
    back = sum(size for name, size in elements.items() if name in BACK)
    out = sum(elements.values()) - back
    head = part(model.vocabulary.size, tp) * model.hidden_size
    share = (n - 1) / n
    gathered, scattered = 2 * (out + back) * job.element_bytes * share, FLOAT * (out + back) * share
    heads = 3 * head * job.element_bytes * share, FLOAT * head * share
    if n >= SUMMED:  # a sum sends twice what scattering does, and twice what gathering does
        scattered, heads = 2 * scattered, (heads[0], 2 * heads[1])
        if kind in GATHERED_BY_SUMS:
            gathered = 2 * 2 * FLOAT * (out + back) * share
            heads = 2 * 2 * head * job.element_bytes * share, heads[1]
    elif n >= RINGED.stop and kind == OTHERWISE:
        heads = heads[0] * 2 / 3, heads[1]
    elif n >= RINGED.stop:
        scattered += FLOAT * elements["down_proj"] * share
    elif n in RINGED:
        scattered += FLOAT * out * 2 / n
    return Shared(
        gathered, scattered, slices(local, placed.rows, job.token_chunk), sum(heads),
        slices(local, placed.rows, job.loss_chunk),
    )  # fmt: skip


def parameters_bytes(placed: Placed, kind: str = "") -> float:
    """Sent over the axes that share parameters out in a step, by devices of this kind."""
    one, layers = shared(placed, kind), placed.job.model.num_layers
    return placed.stage.accumulate * (layers * (one.gathered + one.slices * one.scattered) + one.loss_slices * one.head)


def transfers(
    placed: Placed, cost: StrategyCost, machine: Machine, matrices: float, attention: float
) -> tuple[Transfer, ...]:
    """What each axis sends, and how much of it the arithmetic that stands beside it leaves exposed.

    Args:
        matrices, attention: seconds of a step's arithmetic.
    """
    job, sizes = placed.job, placed.sizes
    device = machine.device
    both = device.both_ways / device.link

    def made(axis: str, what: str, sent: float, beside: float) -> Transfer:
        seconds = sent / (both * link(placed, machine, axis.split("+")[0]))
        return Transfer(axis, what, sent, seconds, max(0.0, seconds - beside))

    def named(shared: bool) -> str:
        axes = ("dp", "fsdp", "sp")
        return "+".join(one for one in axes if (one in job.shard_parameters) == shared and sizes[one] > 1)

    found = []
    if sizes["sp"] > 1:
        times = job.model.num_layers * placed.stage.accumulate
        times *= 1.0 if job.remat != "full" else 1.25  # forward sends a quarter of it once more
        seconds = times * cost.sent / link(placed, machine, "sp")
        found.append(Transfer("sp", "attention", times * cost.sent, seconds, times * cost.exposed))
    if sizes["tp"] > 1:
        found.append(made("tp", "stream", stream_bytes(placed, device.name), matrices))
    if placed.sharing > 1:
        found.append(made(named(True), "parameters", parameters_bytes(placed, device.name), matrices + attention))
    copies = placed.devices // sizes["tp"] // placed.sharing
    if copies > 1:
        sent = 2 * parameter_bytes(placed) * (copies - 1) / copies
        found.append(made(named(False), "copies", sent, 0.0))  # they are whole when nothing is left to do
    return tuple(found)


def by_axes(found: tuple[Transfer, ...]) -> dict[str, float]:
    """Bytes that a device sends in a step, all transfers over the same axes together."""
    sent: dict[str, float] = {}
    for one in found:
        sent[one.axis] = sent.get(one.axis, 0.0) + one.bytes
    return sent
