"""A stage's real step (model, attention, chunked loss, optimizer, shardings) through the compiler of its devices.

What the compiler has made of it is read from the compiled program: bytes a device, transfers between devices, kernels.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util

from lwm_core.protocols import Collective, CompiledStep, Stage, TrainerContext
from lwm_jax_ring.aot.axes import groups, sent_bytes, served
from lwm_jax_ring.aot.program_text import Instruction, ProgramText, array_bytes
from lwm_jax_ring.aot.topology import topology_devices, usable_memory
from lwm_jax_ring.aot.values import largest_values
from lwm_jax_ring.model.network import Network
from lwm_jax_ring.train.optimizer import abstract_state
from lwm_jax_ring.train.options import TrainerOptions
from lwm_jax_ring.train.stage import StageProgram, stage_program

LARGEST = "largest parameters on a device, each with a gradient and two moments of its size:"
VALUES = (
    "largest values of the traced program, a device's part, of those whose layout it states; which of them are kept "
    "at once the compiler does not tell:"
)
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def compile_stage(
    network: Network, options: TrainerOptions, context: TrainerContext, stage: Stage, topology: str
) -> CompiledStep:
    """Compile the step of ``stage`` for every device of ``topology``.

    Raises:
        UsageError: the topology is unknown.
        UnsupportedError: the TPU compiler is not installed, or the attention's options do not fit.
        ShapeError: the mesh does not fit the devices.
    """
    devices = topology_devices(topology)
    program = stage_program(network, options, context, stage, devices)
    modalities = tuple(name for name, alpha in context.loss_weights.items() if alpha) or ("text",)
    kept: dict[str, Any] = {
        "topology": topology,
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "limit_bytes": usable_memory(devices[0]),
        "parameter_bytes": device_bytes(network.shapes, program.shardings),
    }
    began = time.perf_counter()
    step, shardings = traced(program, network, modalities)
    try:
        compiled = step.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        problem = str(error)
        if "RESOURCE_EXHAUSTED" not in problem:
            raise
        values = (f"  {value}" for value in largest_values(step.jaxpr.jaxpr, shardings))
        parameters = largest(network.shapes, program.shardings)
        told = "\n".join((out_of_memory(problem), LARGEST, *parameters, VALUES, *values))
        return CompiledStep(**kept, seconds=time.perf_counter() - began, problem=told)
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    text = ProgramText(compiled.as_text())
    return CompiledStep(
        **kept,
        seconds=seconds,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        host_bytes=memory.host_temp_size_in_bytes,
        collectives=collectives(text, program.mesh.shape),
        kernels=kernels(text),
        choices=tuple(f"attention {reason}" for reason in program.attention.reasons),
    )


def device_bytes(shapes: Any, shardings: Any) -> int:
    """Bytes that arrays of ``shapes`` take on one device."""
    sizes = jax.tree.map(lambda x, s: prod(s.shard_shape(x.shape)) * x.dtype.itemsize, shapes, shardings)
    return sum(jax.tree.leaves(sizes))


def largest(shapes: Any, shardings: Any, most: int = 5) -> list[str]:
    """The largest parameters on one device, a line each."""
    rows = []
    for path, leaf in traverse_util.flatten_dict(shapes).items():
        part = traverse_util.flatten_dict(shardings)[path].shard_shape(leaf.shape)
        size = prod(part) * leaf.dtype.itemsize / 2**30
        rows.append((size, f"  {size:.2f} GiB {'.'.join(path)} {leaf.dtype}{list(part)} of {list(leaf.shape)}"))
    return [line for _, line in sorted(rows, reverse=True)[:most]]


def traced(program: StageProgram, network: Network, modalities: tuple[str, ...]) -> tuple[Any, list[Any]]:
    """The step of ``program``, traced, and the shardings of its arguments in order; nothing is allocated."""
    parameters = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        network.shapes, program.shardings,
    )  # fmt: skip
    state = abstract_state(program.program.optimizer, parameters, program.mesh)
    given = parameters, state, program.abstract_batch(), jax.ShapeDtypeStruct((), jnp.float32)
    step = program.step.trace(*given, modalities)
    return step, [leaf.sharding for leaf in jax.tree.leaves(given)]


def collectives(text: ProgramText, sizes: Mapping[str, int]) -> tuple[Collective, ...]:
    """Transfers between devices: of one kind, type and axes together, the most bytes first.

    A product that waits for a gather, or makes what is scattered, may run as a loop whose rounds pass one part on and
    multiply another (*collective matmul*); what such a loop passes on are permutes.

    Args:
        text: the compiled program.
        sizes: of the mesh's axes, as the program numbers its devices.
    """
    devices = prod(sizes.values())
    found: dict[tuple[str, str, int, tuple[str, ...], int], int] = defaultdict(int)
    for one, computation, times in text.executed():
        kind = one.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        if computation.name.startswith("all-reduce-scatter"):  # how a TPU fuses a sum with the slice that is kept of it
            kind = "reduce-scatter"
        given = ", ".join(computation.instructions[name].type for name in one.operands)
        got = [] if one.opcode.endswith("-start") else [one.type]  # a start's type holds both sides
        largest = plain_type(max(given, *got, key=array_bytes) if got else given)
        joined = groups(one, devices)
        sent = sent_bytes(kind, array_bytes(given), joined, devices)
        found[kind, largest, array_bytes(largest), served(joined, sizes), sent] += times
    rows = [
        Collective(kind, shape, size, times, axes, sent) for (kind, shape, size, axes, sent), times in found.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.bytes * row.count))


def plain_type(kind: str) -> str:
    """``bf16[1,8]{1,0:T(8,128)}`` → ``bf16[1,8]``: a type without its layout in memory."""
    return re.sub(r"\{[^{}]*\}|/\*.*?\*/|[()]", "", kind)


def kernels(text: ProgramText) -> dict[str, int]:
    """How often each Pallas kernel runs."""
    found: dict[str, int] = defaultdict(int)
    for one, _, times in text.executed():
        if is_kernel(one):
            found[re.sub(r"[.\d]+$", "", one.name)] += times
    return dict(found)


def is_kernel(one: Instruction) -> bool:
    """Whether the instruction is a Pallas kernel."""
    return one.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in one.rest


class Permute(NamedTuple):
    """Permutes of one type in one computation, which are started together."""

    type: str
    bytes: int
    count: int
    hidden: bool  # whether a kernel runs between the start and the end


def permutes(text: ProgramText) -> list[Permute]:
    """Every ``collective-permute`` that runs, and whether a kernel hides it."""
    found = []
    for one, computation, times in text.executed():
        if one.opcode == "collective-permute":
            found.append(Permute(plain_type(one.type), array_bytes(one.type), times, False))
        elif one.opcode == "collective-permute-start":
            kind = computation.instructions[one.operands[0]].type
            names = list(computation.instructions)
            done = next(
                name for name, other in computation.instructions.items()
                if other.opcode == "collective-permute-done" and one.name in other.operands
            )  # fmt: skip
            between = names[names.index(one.name) : names.index(done)]
            hidden = any(is_kernel(computation.instructions[name]) for name in between)
            found.append(Permute(plain_type(kind), array_bytes(kind), times, hidden))
    return found


def out_of_memory(problem: str) -> str:
    """The compiler's message without what only its makers can read: the sums, and the largest buffers where told."""
    lines = [line.rstrip() for line in problem.splitlines()]
    return "\n".join(line for line in lines if line.strip())
