"""Bytes that a device needs for a training step, by what they are for.

The layout is that of the trainer ``jax``: float32 parameters, gradients and moments shared out over
``shard_parameters`` and ``tp``; a layer's parameters gathered in float32 while it runs; the residual stream cut by
columns over ``tp``; layers scanned, each keeping what its rematerialisation policy says; the loss in slices. What a
layer's backward pass holds at once is counted in arrays of the stream's size. How many the compiler keeps alive,
:data:`LOCAL_ARRAYS` and :data:`RING_ARRAYS`, was read off compiled steps of LWM-7B (docs/benchmarks/aot.json), which
have as many key-value heads as query heads; the split over stream, queries and keys follows the arrays that the code
makes.

Shapes: T a device's tokens of a micro-batch, E hidden size, F feed-forward, H query heads, K key-value heads, D head
dim, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from lwm_core.attention_cost import StrategyCost
from lwm_core.model import ModelConfig, canonical_shapes
from lwm_plan.job import BACK, Placed, part

FLOAT = 4
"""Bytes of a parameter, a gradient, a moment, a logit."""
MOMENTS = 2
"""Of Adam."""
BATCH_ARRAYS = 5
"""Tokens, targets, segments, positions, weights: four bytes a token each."""
PROGRAM = 64 * 2**20
"""Bytes of the program itself: 47 to 114 MiB in docs/benchmarks/aot.json."""
FEED_FORWARD_ARRAYS = 3
"""Gate, up and their product, of the tokens that are computed at a time."""


@dataclass(frozen=True)
class Arrays:
    """How many arrays of one layer are alive at once: of the stream, of all query heads, of all key-value heads."""

    stream: int
    query: int
    key: int


LOCAL_ARRAYS = Arrays(stream=9, query=7, key=8)
"""Backward of a layer with the sequence on one device: 24 in all where K = H.

Stream: input, its gradient and the next one's, float32 rows of the lookup, slices before and after they are joined.
Queries: q, out, dout, dq in float32 and in their own type; keys: K and V, both gradients in float32 and their own type.
"""
RING_ARRAYS = Arrays(stream=0, query=6, key=18)
"""Beside those, a ring's: K and V in hand and arriving, float32 dK and dV in hand, arriving and of the hop, float32 dq
of the hop, halves of a zigzag: 24 in all where K = H."""
OFFLOADED_RING_ARRAYS = Arrays(stream=-2, query=-2, key=-7)
"""Beside a ring's with ``remat = "offload"``, where the compiler lets go of more: 37 in all where K = H."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a device, by what for; ``host`` is the host's memory for it, and in no total."""

    parameters: int
    optimizer: int
    gradients: int
    batch: int
    activations: int
    gathered: int
    working: int
    attention: int
    logits: int
    program: int
    host: int

    @property
    def parts(self) -> dict[str, int]:
        """What the total is made of, in the order in which it fills up."""
        names = ("parameters", "optimizer", "gradients", "batch", "program", "gathered", "logits", "activations",
                 "working", "attention")  # fmt: skip
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> int:
        """All of the device."""
        return sum(self.parts.values())


def parameter_bytes(placed: Placed) -> int:
    """Of a device's share: an axis that does not divide its dimension is left out there, as the trainer does."""
    return _parameter_bytes(placed.job.model, placed.sizes["tp"], placed.sharing)


@lru_cache(maxsize=512)
def _parameter_bytes(model: ModelConfig, tp: int, over: int) -> int:
    total = 0
    for name, shape in canonical_shapes(model).items():
        fitted = [part(size, ranks) for size, ranks in zip(shape, _ranks(name, shape, tp, over), strict=True)]
        total += prod(fitted) * FLOAT
    return total


def _ranks(name: str, shape: Sequence[int], tp: int, over: int) -> tuple[int, ...]:
    """Into how many parts each dimension of a canonical parameter ``[out, in]`` is cut."""
    if len(shape) == 1:
        return (tp,) if name.endswith(".bias") else (1,)
    return (over, tp) if name.split(".")[-2] in BACK else (tp, over)


def memory(placed: Placed, cost: StrategyCost) -> Memory:
    """Of one device of ``placed``, whose attention runs as ``cost`` says."""
    job, stage, tp = placed.job, placed.stage, placed.sizes["tp"]
    model, tokens = job.model, placed.tokens
    parameters = parameter_bytes(placed)
    chunk = min(tokens, job.token_chunk or tokens)
    activated, host = activations(placed)
    slices = chunk * (FEED_FORWARD_ARRAYS * part(model.intermediate_size, tp) + model.hidden_size) * job.element_bytes
    angles = tokens * model.head_dim * FLOAT  # cos and sin of half a head each
    # While gradients are summed over micro-batches there are those of the sum and of the micro-batch.
    gradients = parameters * (2 if stage.accumulate > 1 else 1)
    layer = sum(job.matrix_elements(tp).values()) * FLOAT
    # The new parameters stand beside the old ones until all are there.
    gathered = layer + parameters
    return Memory(
        parameters=parameters,
        optimizer=MOMENTS * parameters,
        gradients=gradients,
        batch=BATCH_ARRAYS * FLOAT * tokens * stage.accumulate,
        activations=activated,
        gathered=gathered,
        working=_bytes(placed, LOCAL_ARRAYS) + slices + angles,
        attention=attention_bytes(placed, cost),
        logits=min(tokens, job.loss_chunk) * part(model.vocabulary.size, tp) * FLOAT,
        program=PROGRAM,
        host=host,
    )


def least(placed: Placed) -> int:
    """Bytes that a step takes at least, whatever its attention does."""
    return (MOMENTS + 2) * parameter_bytes(placed) + activations(placed)[0]


def units(placed: Placed) -> tuple[int, int, int]:
    """Bytes of one array of the stream, of all query heads, and of all key-value heads of a device."""
    model, shape, tp = placed.job.model, placed.shape, placed.sizes["tp"]
    size = placed.tokens * placed.job.element_bytes
    return (
        size * part(model.hidden_size, tp),
        size * shape.heads * shape.head_dim,
        size * shape.kv_heads * shape.head_dim,
    )


def _bytes(placed: Placed, arrays: Arrays) -> int:
    stream, query, key = units(placed)
    return arrays.stream * stream + arrays.query * query + arrays.key * key


def kept(placed: Placed) -> tuple[dict[str, int], dict[str, int]]:
    """What a layer keeps for the backward pass, by name: on the device, and in the host's memory."""
    job = placed.job
    stream, query, key = units(placed)
    lse = placed.tokens * placed.shape.heads * FLOAT
    hidden = placed.tokens * part(job.model.intermediate_size, placed.sizes["tp"]) * job.element_bytes
    if job.remat == "offload":
        return {"lse": lse}, {"input": stream, "out": query}
    found = {"input": stream}
    if job.remat != "full":
        found |= {"out": query, "lse": lse}
    # With slices of tokens a policy keeps the slices' inputs alone; without, also what it names within them.
    if job.remat == "dots" and not job.token_chunk:
        found["products"] = 2 * stream + query + 2 * key + 2 * hidden
    if job.remat == "none":
        found["q, k, v"] = query + 2 * key
        if not job.token_chunk:
            found["norms, feed-forward"] = 4 * stream + 3 * hidden
    return found, {}


def activations(placed: Placed) -> tuple[int, int]:
    """What all layers keep for the backward pass: on the device, and in the host's memory."""
    device, host = (placed.job.model.num_layers * sum(one.values()) for one in kept(placed))
    return device, host


def attention_arrays(placed: Placed, cost: StrategyCost) -> Arrays | None:
    """What a strategy holds beside :data:`LOCAL_ARRAYS` while it runs backward; none where that is no sum of arrays."""
    # Exchanging heads has q, out, K, V and their gradients twice: as they came, and as they are dealt.
    exchanged = Arrays(0, 4, 4) if cost.strategy in ("ulysses", "usp") else Arrays(0, 0, 0)
    if placed.sizes["sp"] == 1:
        return Arrays(0, 0, 0)
    if cost.strategy == "ulysses":
        return exchanged
    if cost.strategy == "allgather":
        return None
    found = [RING_ARRAYS, exchanged]
    if placed.job.remat == "offload":
        found.append(OFFLOADED_RING_ARRAYS)
    return Arrays(*(sum(getattr(one, field) for one in found) for field in ("stream", "query", "key")))


def attention_bytes(placed: Placed, cost: StrategyCost) -> int:
    """Bytes of :func:`attention_arrays`; of an all-gather, K and V of all ranks and their float32 gradients before
    they are scattered."""
    arrays = attention_arrays(placed, cost)
    if arrays is None:
        return round(cost.held * (1 + FLOAT / placed.job.element_bytes))
    return _bytes(placed, arrays)
