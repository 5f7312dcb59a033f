"""Seconds of a training step by a roofline: arithmetic at a share of the peak, memory traffic, and transfers that no
arithmetic hides.

A roofline is a bound from below: stalls, imbalance of documents, input and host are not in it. The shares of the peak
are assumptions (``hardware.py``) or, of a machine that a file describes, measured; ``--explain`` prints them.

Shapes: T a device's tokens of a micro-batch, E hidden size, H query heads, D head dim, L layers, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import isqrt

from lwm_core.attention_cost import (
    STRATEGIES,
    MachineRates,
    StrategyCost,
    choose_strategy,
    strategy_cost,
)
from lwm_core.model import training_flops_per_token
from lwm_plan.hardware import Machine
from lwm_plan.job import Placed, part
from lwm_plan.memory import FLOAT, parameter_bytes, units
from lwm_plan.transfers import RECOMPUTED, Transfer, link, transfers

HIDDEN = 0.01
"""Of the step: what may be exposed of a transfer that is said to hide."""
STREAM_PASSES = 60
"""Arrays of the stream's size that a layer reads or writes in HBM, forward and backward together."""
OPTIMIZER_PASSES = 8
"""Times that the optimizer goes over the parameters: reads them, their gradients (twice, for the norm) and two moments,
and writes parameters and moments."""


@dataclass(frozen=True)
class Timing:
    """A step's seconds and operations.

    Args:
        model_flops: of all devices, without recomputation: what MFU counts.
        executed_flops: of all devices, with it.
        matrices, attention, update: seconds of arithmetic or of the memory traffic that takes longer.
        transfers: by axis; axes of one device are left out.
    """

    model_flops: float
    executed_flops: float
    matrices: float
    attention: float
    update: float
    transfers: tuple[Transfer, ...]

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.matrices + self.attention + self.update + sum(one.exposed for one in self.transfers)


def attention_cost(placed: Placed, machine: Machine, free: float | None = None) -> tuple[StrategyCost, tuple[str, ...]]:
    """One layer's attention by the strategy that the job names, or by the cheapest; and why.

    Args:
        free: bytes for gathered keys and values; looked at where the strategy is free.

    Raises:
        UnsupportedError: the heads do not divide for the strategy.
        ShapeError: ``inner`` does not divide ``sp``.
    """
    job, ranks = placed.job, placed.sizes["sp"]
    rates = MachineRates(machine.device.attention_share * machine.device.peak_flops, link(placed, machine, "sp"))
    if ranks == 1:
        return strategy_cost("ring", placed.shape, 1, rates, job.layout), ("one device holds the whole sequence",)
    if job.strategy == "auto":
        choice = choose_strategy(placed.shape, ranks, rates, job.layout, free, STRATEGIES)
        return choice.cost, choice.reasons
    inner = job.inner or next(size for size in range(isqrt(ranks), 0, -1) if ranks % size == 0)
    return strategy_cost(job.strategy, placed.shape, ranks, rates, job.layout, inner), ("the recipe names it",)


def recomputed_elements(placed: Placed) -> int:
    """Matrix elements of a layer on a device that are multiplied again on the way back: all but the last product of a
    layer, whose result nothing on the way back needs; with no policy, those after attention, in slices of tokens."""
    elements = placed.job.matrix_elements(placed.sizes["tp"])
    if placed.job.remat in RECOMPUTED:
        return sum(elements.values()) - elements["down_proj"]
    if placed.job.token_chunk:
        return elements["o_proj"] + elements["gate_proj"] + elements["up_proj"]
    return 0


def executed_matrix_flops(placed: Placed) -> float:
    """Of matrix products of a step, all devices: 6 a token and element, 2 more for each that is recomputed, 8 for the
    head's, whose logits are always made again."""
    model, tp = placed.job.model, placed.sizes["tp"]
    layer = 6 * sum(placed.job.matrix_elements(tp).values()) + 2 * recomputed_elements(placed)
    head = 8 * part(model.vocabulary.size, tp) * model.hidden_size
    return float(placed.stage.batch_tokens * tp * (model.num_layers * layer + head))


def matrix_traffic(placed: Placed) -> float:
    """Bytes of a device's memory that a step's matrix products and what stands around them read and write."""
    job, stream = placed.job, units(placed)[0]
    layer = sum(job.matrix_elements(placed.sizes["tp"]).values()) * FLOAT
    return float(job.model.num_layers * placed.stage.accumulate * (STREAM_PASSES * stream + 4 * layer))


def model_flops(placed: Placed) -> float:
    """Of a step, all devices, without recomputation, causal attention counted half."""
    return _flops_per_token(placed.job.model, placed.stage.seq_len) * placed.stage.batch_tokens


_flops_per_token = lru_cache(maxsize=64)(training_flops_per_token)


def timing(placed: Placed, cost: StrategyCost, machine: Machine) -> Timing:
    """One step of ``placed`` with attention as ``cost`` has it."""
    job, stage, device = placed.job, placed.stage, machine.device
    layers, micro = job.model.num_layers, stage.accumulate
    matrix_flops = executed_matrix_flops(placed)
    again = 2 / 7 if job.remat == "full" else 0.0  # seven products, two of them forward
    attention = (1 + again) * cost.compute * layers * micro
    arithmetic = matrix_flops / placed.devices / (device.matrix_share * device.peak_flops)
    matrices = max(arithmetic, matrix_traffic(placed) / device.memory_bandwidth)
    update = OPTIMIZER_PASSES * parameter_bytes(placed) / device.memory_bandwidth
    executed = matrix_flops + attention * device.attention_share * device.peak_flops * placed.devices
    found = Timing(
        model_flops(placed), executed, matrices, attention, update,
        transfers(placed, cost, machine, matrices, attention),
    )  # fmt: skip
    marked = tuple(replace(one, hides=one.exposed <= HIDDEN * found.seconds) for one in found.transfers)
    return replace(found, transfers=marked)
