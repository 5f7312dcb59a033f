"""Floating point operations by hand, and against a count of the trainer's own jaxpr."""

from __future__ import annotations

from typing import Any

import pytest
from plan_cases import llama, stage

from lwm_plan.hardware import ATTENTION_SHARE, read_machine
from lwm_plan.job import Job, place
from lwm_plan.stage_plan import evaluate
from lwm_plan.timing import executed_matrix_flops, model_flops

ROWS, SEQ_LEN = 2, 256


def test_flops_of_a_small_model_by_hand() -> None:
    """``debug``: 2 layers, E 256, F 256, 2 heads of 128; 2 rows of 256 tokens."""
    placed = place(Job(llama(name="debug"), remat="attention"), stage(SEQ_LEN, ROWS, "1,1,1,1"), 1)
    layer = 4 * 256 * 256 + 3 * 256 * 256
    head = 32_000 * 256
    tokens = 512
    assert model_flops(placed) == tokens * (6 * (2 * layer + head) + 6 * 2 * 2 * 128 * 256)
    again = layer - 256 * 256  # all but the way down
    assert executed_matrix_flops(placed) == tokens * (2 * (6 * layer + 2 * again) + 8 * head)


def test_attention_is_seven_products_over_half_the_pairs() -> None:
    found = evaluate(Job(llama(name="debug")), stage(1 << 15, 1, "1,1,1,1"), read_machine("h100x1"))
    pairs = (1 << 15) * ((1 << 15) + 1) / 2
    flops = 7 * 2 * pairs * 2 * 128 * 2  # products; a multiplication and an addition; heads, head dim, layers
    assert found.timing.attention * ATTENTION_SHARE * 989e12 == pytest.approx(flops)
    assert found.timing.executed_flops == pytest.approx(executed_matrix_flops(found.placed) + flops)


def test_a_step_is_no_faster_than_its_operations_at_the_peak(compiled: list[dict[str, Any]]) -> None:
    """MFU is below 1, and twice the machine is at most twice as fast."""
    job = Job(llama(), strategy="ring")
    for row in compiled:
        given = stage(row["seq_len"], row["rows"], row["mesh"])
        found = evaluate(job, given, read_machine(row["topology"]))
        assert 0.2 < found.mfu < 0.75
        assert found.timing.executed_flops > found.timing.model_flops
    whole, half = (evaluate(job, stage(1 << 20, 8, "1,-1,16,4"), read_machine(n)) for n in ("v5p-1024", "v5p-512"))
    assert half.timing.seconds <= 2.001 * whole.timing.seconds


def _counted(jaxpr: Any, executed: float = 1.0) -> float:
    """Operations of the dot products of a jaxpr, loops as often as they run.

    Args:
        executed: the share of a choice's rounds in which it does not choose to do nothing.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = 1
            for axis in contracted:
                inner *= eqn.invars[0].aval.shape[axis]
            total += 2.0 * inner * eqn.outvars[0].aval.size
        if eqn.primitive.name == "cond":
            total += executed * max(_counted(branch.jaxpr, executed) for branch in eqn.params["branches"])
            continue
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            inside = getattr(value, "jaxpr", value)
            if hasattr(inside, "eqns"):
                total += times * _counted(inside, executed)
    return total


def _step(remat: str, token_chunk: int | None, seq_len: int, rows: int, attend: Any) -> Any:
    """The jaxpr of loss and gradients of the real network ``debug``."""
    jax = pytest.importorskip("jax")
    pytest.importorskip("lwm_jax_ring")
    import jax.numpy as jnp

    from lwm_core.rope import RopeSpec
    from lwm_jax_ring.model.llama import Chunks, Compute
    from lwm_jax_ring.model.loss import modality_sums
    from lwm_jax_ring.model.network import Network
    from lwm_jax_ring.model.rope import rope_tables

    model = llama(name="debug")
    network = Network(model, 0)
    rope = rope_tables(RopeSpec(1e4), model.head_dim, seq_len)
    how = Compute(dtype=jnp.float32, remat=remat, chunks=None if token_chunk is None else Chunks(token_chunk, 1, 1))

    def loss(parameters: Any, tokens: Any) -> Any:
        llama_ = network.merge(parameters)
        hidden, _ = llama_.hidden(tokens, jnp.broadcast_to(jnp.arange(seq_len), tokens.shape), rope, attend, how=how)
        weights = jnp.ones(tokens.shape, jnp.float32)
        return modality_sums(hidden, llama_.head, tokens, weights, model.vocabulary, ("text",), Chunks(128, 1, 1)).sum()

    tokens = jax.ShapeDtypeStruct((rows, seq_len), jnp.int32)
    return jax.make_jaxpr(jax.grad(loss))(network.shapes, tokens).jaxpr


@pytest.mark.parametrize(
    ("remat", "token_chunk"), [("none", None), ("none", 64), ("attention", None), ("attention", 64), ("full", None)]
)
def test_executed_matrices_are_those_of_the_trainers_jaxpr(remat: str, token_chunk: int | None) -> None:
    """Attention left out by one that multiplies nothing."""

    def attend(q: Any, k: Any, v: Any, given: Any) -> tuple[Any, None]:
        return q * k * v, None

    placed = place(Job(llama(name="debug"), remat=remat, token_chunk=token_chunk), stage(SEQ_LEN, ROWS, "1,1,1,1"), 1)
    found = _counted(_step(remat, token_chunk, SEQ_LEN, ROWS, attend))
    assert found == pytest.approx(executed_matrix_flops(placed), rel=1e-12)


@pytest.mark.parametrize("remat", ["attention", "full"])
def test_all_operations_of_a_step_are_those_of_the_trainers_jaxpr(remat: str) -> None:
    """With the real attention at a length at which it is most; of its blocks those that causal attention does not
    skip, which a test of ``jax-ring`` counts in the running program, are counted."""
    jax = pytest.importorskip("jax")
    pytest.importorskip("lwm_jax_ring")
    from lwm_core.attention import AttentionMask, executed_blocks
    from lwm_core.layout import SequenceLayout
    from lwm_core.protocols import AttentionAxes
    from lwm_jax_ring.attention.backend import factory
    from lwm_jax_ring.attention.options import AttentionOptions
    from lwm_jax_ring.train.stage import make_mesh

    length, block = 1 << 15, 256
    options = AttentionOptions(query_chunk=block, key_chunk=block)
    mesh = make_mesh(dict.fromkeys(("dp", "fsdp", "tp", "sp"), 1), jax.devices()[:1])
    backend = factory.build(options, mesh, AttentionAxes(), length)
    causal = AttentionMask()

    def attend(q: Any, k: Any, v: Any, given: Any) -> tuple[Any, None]:
        return backend.attend(q, k, v, causal, None), None

    layout = SequenceLayout("zigzag", 1)
    share = executed_blocks(causal, layout, length, block).sum() / (length // block) ** 2
    found = _counted(_step(remat, None, length, 1, attend), float(share))
    job = Job(llama(name="debug"), remat=remat, token_chunk=None, strategy="ring")
    planned = evaluate(job, stage(length, 1, "1,1,1,1"), read_machine("h100x1")).timing
    matrices = executed_matrix_flops(place(job, stage(length, 1, "1,1,1,1"), 1))
    print(
        f"{remat}: planned {planned.executed_flops:.4g}, counted {found:.4g}: {planned.executed_flops / found - 1:+.2%}"
    )
    assert planned.executed_flops > 2.5 * matrices
    assert planned.executed_flops == pytest.approx(found, rel=0.02)
