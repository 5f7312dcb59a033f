"""A stage on a machine: whether it fits, what it takes, and the best mesh that a search finds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from lwm_core.attention_cost import StrategyCost
from lwm_core.errors import LwmError
from lwm_core.protocols import Stage
from lwm_core.rope import RopeSpec, first_base_violation
from lwm_core.rope_scalings import base_bound_theta
from lwm_plan.hardware import Machine
from lwm_plan.job import Job, Placed, place
from lwm_plan.memory import Memory, least, memory
from lwm_plan.timing import Timing, attention_cost, timing

GATHERED_SHARE = 1 / 16
"""Of a device's memory, what gathered keys and values may take, as the trainers have it."""
NEAR = 0.9
"""Of a device's memory, from where on a stage that fits is warned of: the count is right within 15%."""
BFLOAT16 = 2
"""Bytes of an element, for which the peaks are told."""
COMPARED = ("attention", "offload")
"""Policies whose memory is held against the TPU compiler's."""


@dataclass(frozen=True)
class Evaluated:
    """A mesh that divides, and what it takes."""

    placed: Placed
    cost: StrategyCost
    memory: Memory
    timing: Timing
    reasons: tuple[str, ...]
    machine: Machine

    @property
    def fits(self) -> bool:
        """Whether the device's memory is enough."""
        return self.memory.total <= self.machine.device.memory

    @property
    def mesh(self) -> str:
        """As a recipe writes it."""
        return ",".join(str(size) for size in self.placed.sizes.values())

    @property
    def strategy(self) -> str:
        """Its name, with the ranks that exchange heads."""
        return f"usp, inner {self.cost.inner}" if self.cost.strategy == "usp" else self.cost.strategy

    @property
    def mfu(self) -> float:
        """Model FLOP/s over the peak."""
        return self.timing.model_flops / (self.timing.seconds * self.machine.peak_flops)

    @property
    def tokens_per_second(self) -> float:
        """Of all devices."""
        return self.placed.stage.batch_tokens / self.timing.seconds

    @property
    def stage_seconds(self) -> float:
        """Of all steps."""
        return self.placed.stage.steps * self.timing.seconds

    def first_too_much(self) -> tuple[str, int, float] | None:
        """The part with which memory runs out, its bytes, and what was left for it; none where all fit."""
        left = self.machine.device.memory
        for name, size in self.memory.parts.items():
            if size > left:
                return name, size, left
            left -= size
        return None


def evaluate(job: Job, stage: Stage, machine: Machine, mesh: str | None = None) -> Evaluated:
    """``stage`` on its own mesh or on ``mesh``.

    Raises:
        ShapeError: the mesh does not divide.
        UnsupportedError: the strategy does not go with the heads.
    """
    return _evaluated(place(job, stage, machine.devices, mesh), machine)


def _evaluated(placed: Placed, machine: Machine) -> Evaluated:
    cost, reasons = attention_cost(placed, machine, GATHERED_SHARE * machine.device.memory)
    return Evaluated(placed, cost, memory(placed, cost), timing(placed, cost, machine), reasons, machine)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def meshes(job: Job, stage: Stage, devices: int) -> Iterator[str]:
    """Meshes that could divide; what is left of the devices is ``fsdp``, or ``dp`` where the model may be copied."""
    model = job.model
    cut = (model.num_heads, model.hidden_size, model.intermediate_size)
    for tp in (size for size in _divisors(devices) if not any(dimension % size for dimension in cut)):
        for sp in _divisors(devices // tp):
            rest = devices // tp // sp
            if (stage.rows // stage.accumulate) % rest == 0:
                yield f"1,{rest},{tp},{sp}"
                if rest > 1:
                    yield f"{rest},1,{tp},{sp}"


def tried(job: Job, stage: Stage, machine: Machine, room: float | None = None) -> list[Evaluated]:
    """Every mesh that divides, the fastest first, attention by the cheapest strategy of each.

    Of equals the one with fewer ranks of ``sp`` and then of ``tp`` comes first.

    Args:
        room: share of the memory that may be taken; none: what does not fit is there too.
    """
    limit = None if room is None else room * machine.device.memory
    free = replace(job, strategy="auto", inner=None)
    found = []
    for mesh in meshes(job, stage, machine.devices):
        try:
            placed = place(free, stage, machine.devices, mesh)
            if limit is not None and least(placed) > limit:
                continue
            one = _evaluated(placed, machine)
        except LwmError:
            continue  # heads or length do not divide over this one
        if limit is None or one.memory.total <= limit:
            found.append(one)
    return sorted(found, key=lambda one: (one.timing.seconds, one.placed.sizes["sp"], one.placed.sizes["tp"]))


def search(job: Job, stage: Stage, machine: Machine) -> Evaluated | None:
    """The fastest mesh that fits, or, where none does, the one that needs least memory; none where none divides."""
    found = tried(job, stage, machine)
    return next((one for one in found if one.fits), None) or min(found, key=lambda one: one.memory.total, default=None)


@lru_cache(maxsize=64)
def _violation(rope: RopeSpec, head_dim: int, seq_len: int) -> int | None:
    return first_base_violation(rope, head_dim, seq_len)


def rope_warning(rope: RopeSpec, head_dim: int, seq_len: int) -> str | None:
    """What the bound on the base says of ``seq_len``, if it is not kept (arXiv 2405.14591)."""
    first = _violation(rope, head_dim, seq_len)
    if first is None:
        return None
    return (
        f"RoPE: theta = {rope.theta:g} does not keep Σ_i cos(m·theta^(-2i/{head_dim})) ≥ 0 up to m = {seq_len:,}: it "
        f"is negative first at m = {first:,}, beyond which a random key attracts more than a similar one; the fit "
        f"0.0424·L^1.628 asks for {base_bound_theta(seq_len):.2g}"
    )


def _of_mesh(job: Job, chosen: Evaluated) -> list[str]:
    """What was not held against a compiler, and what does not divide."""
    found = []
    tp, device = chosen.placed.sizes["tp"], chosen.machine.device
    if job.model.intermediate_size % tp or job.model.hidden_size % tp:
        found.append(f"tp = {tp} does not divide the hidden or feed-forward size: every device multiplies all of it")
    if chosen.placed.sizes["sp"] > 1 and chosen.cost.strategy != "ring":
        found.append(f"{chosen.cost.strategy}: its buffers are counted by the code, not held against a compiler")
    if device.island:
        found.append("memory is counted as the TPU's compiler lays it out; a GPU's may differ")
    return found


def warnings(job: Job, stage: Stage, machine: Machine, chosen: Evaluated | None) -> tuple[str, ...]:
    """All that should be known about a stage besides its figures."""
    found = [rope_warning(stage.rope, job.model.head_dim, stage.seq_len)]
    if job.trainer != "jax":
        found.append(f"trainer {job.trainer!r}: memory is counted as the trainer 'jax' lays it out")
    if job.remat not in COMPARED:
        found.append(f"remat {job.remat!r}: counted by the code, not held against a compiler")
    if job.model.num_kv_heads != job.model.num_heads:
        found.append("grouped-query heads: memory was held against one compiled step alone")
    if job.element_bytes != BFLOAT16 and not machine.device.measured:
        found.append("compute_dtype is not bfloat16: the times are those of bfloat16 products")
    if job.remat == "offload":
        found.append("remat 'offload': the time to and from the host's memory is not in the step")
    if chosen is not None:
        found += _of_mesh(job, chosen)
        share = chosen.memory.total / chosen.machine.device.memory
        if NEAR < share <= 1:
            found.append(f"memory is {share:.0%} full, and the count is right within 15%: compile it (lwm aot) first")
        found += [
            f"{one.what} over {one.axis} takes {one.seconds:.3g} s, of which {one.exposed:.3g} s hide behind nothing"
            for one in chosen.timing.transfers
            if not one.hides
        ]
    return tuple(one for one in found if one is not None)
