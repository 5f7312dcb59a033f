"""What the conformance kit leaves to a backend: its merge, what it sends, what it holds, what it refuses."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_threads import Largest, Sent, Street, neighbours, together

from lwm_core.attention import AttentionMask
from lwm_core.errors import ShapeError, UnsupportedError
from lwm_core.protocols import AttentionAxes
from lwm_core.reference import attention_backward, attention_forward
from lwm_core.testing import relative_l2
from lwm_torch_ring.attention import allgather, ring
from lwm_torch_ring.attention.accumulate import Saved, State, merge
from lwm_torch_ring.attention.backend import TorchRing, factory
from lwm_torch_ring.attention.blocks import Plan
from lwm_torch_ring.attention.kernels import aten
from lwm_torch_ring.attention.options import AttentionOptions
from lwm_torch_ring.attention.spec import AttentionSpec
from lwm_torch_ring.attention.strategies import (
    STRATEGIES,
    attention_spec,
    choose_kernel,
    inner_ranks,
    make_kernel,
)

HERE = Path(__file__).parent
CAUSAL = AttentionMask("causal")
CPU = torch.device("cpu")


def alone(length: int, **options: Any) -> TorchRing:
    """The backend in this process."""
    return factory.build(AttentionOptions(**options), None, AttentionAxes(), length)


def normal(seed: int, *shape: int) -> Any:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


# -- the merge ---------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(order=st.permutations(range(5)), hidden=st.sets(st.integers(0, 4)), seed=st.integers(0, 1000))
def test_parts_merge_in_any_order(order: list[int], hidden: set[int], seed: int) -> None:
    """Parts may come in any order and some may have seen nothing; nothing at all gives 0 and −inf."""
    random = np.random.default_rng(seed)
    scores, v = random.standard_normal((5, 8)) * 30, random.standard_normal((5, 8, 4))
    scores[list(hidden)] = -np.inf
    state = State(torch.zeros(1, 1, 1, 4), torch.full((1, 1, 1), -math.inf))
    for part in order:
        top = scores[part].max()
        weights = np.exp(scores[part] - top) if np.isfinite(top) else np.zeros(8)
        lse = top + np.log(weights.sum()) if np.isfinite(top) else -np.inf
        out = weights @ v[part] / weights.sum() if np.isfinite(top) else np.zeros(4)
        merge(state, torch.tensor(out).float().view(1, 1, 1, 4), torch.tensor(lse).float().view(1, 1, 1))
    if len(hidden) == 5:
        assert not state.out.any() and torch.isneginf(state.lse).all()
        return
    weights = np.exp(scores - scores.max())
    expected = np.einsum("pk,pkd->d", weights, v) / weights.sum()
    assert relative_l2(state.out[0, 0, 0], expected) < 1e-5
    assert abs(float(state.lse) - (scores.max() + np.log(weights.sum()))) < 1e-4


# -- what is sent ------------------------------------------------------------------------------------------------------


def _spec(street: Street, rank: int, options: AttentionOptions, length: int, mask: AttentionMask) -> AttentionSpec:
    inner = inner_ranks(options, street.world)
    kernel = make_kernel(options, CPU, torch.bfloat16, 16)
    return attention_spec(options, neighbours(street, rank, inner), length, mask, kernel)


def sent(world: int, length: int, mask: AttentionMask = CAUSAL, kv_heads: int = 4, **options: Any) -> Sent:
    """What rank 0 sends, forward and backward, in bfloat16."""
    street, chosen = Street(world), AttentionOptions(**options)

    def run(rank: int) -> None:
        spec = _spec(street, rank, chosen, length, mask)
        q, k, v = (
            normal(n, 1, length // world, heads, 16).bfloat16().requires_grad_()
            for n, heads in enumerate((4, kv_heads, kv_heads))
        )
        segments = torch.ones(1, length // world, dtype=torch.int32)
        out, _ = STRATEGIES[chosen.strategy].attention(q, k, v, segments, spec, lse=False)
        out.float().sin().sum().backward()

    together(world, run)
    return street.sent


def test_one_rank_sends_nothing() -> None:
    for strategy in ("ring", "ulysses", "usp"):
        assert not any(what == "post" for what, _ in sent(1, 64, strategy=strategy))


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_keys_travel_in_their_own_dtype_and_gradients_in_float32(world: int) -> None:
    """n−1 transfers of K with V in each pass, n of dK with dV, the last of them finished."""
    expected = {("post", "bfloat16"): 2 * (world - 1) + 1, ("post", "float32"): world - 1}
    assert sent(world, 192) == expected


def test_hops_out_of_the_window_are_not_sent() -> None:
    """A window of less than a rank's tokens needs one hop of eight; in zigzag halves the neighbours on either side."""
    window = AttentionMask("causal", window=16)
    near = sent(8, 256, window, layout="contiguous")
    assert near == {("post", "bfloat16"): 3, ("post", "float32"): 1}
    folded = sent(8, 256, window, layout="zigzag")
    assert folded == {("post", "bfloat16"): 5, ("post", "float32"): 2}


def test_what_the_other_strategies_send() -> None:
    """A gather a pass and a sum of float32 gradients, all in one or by heads; four exchanges; both where both are."""
    assert sent(4, 256, strategy="allgather") == {("gather", "bfloat16"): 2, ("scatter_sum", "float32"): 1}
    by_heads = sent(4, 256, strategy="allgather", gather_heads=3)
    assert by_heads == {("gather", "bfloat16"): 4, ("scatter_sum", "float32"): 2}
    assert sent(2, 256, strategy="ulysses") == {("exchange", "bfloat16"): 4}
    assert sent(4, 256, strategy="usp") == {
        ("exchange", "bfloat16"): 4, ("post", "bfloat16"): 3, ("post", "float32"): 1
    }  # fmt: skip


MOVEMENTS = {"ring": {}, "by heads": {"strategy": "allgather", "gather_heads": 1}}


@pytest.mark.parametrize("way", MOVEMENTS)
@pytest.mark.parametrize("world", [2, 4])
def test_a_transfer_is_posted_before_the_compute_that_hides_it(
    world: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Post, compute with what is here, wait: at every hop, on every rank, in both passes.

    What is posted is NaN until it is waited for, so that to compute with it too early would show in the results.
    """
    street, options = Street(world), AttentionOptions(**MOVEMENTS[way])
    place: dict[int, int] = {}

    for module in (ring, allgather):
        for name in ("absorb", "add_gradients"):
            plain = getattr(module, name)

            def noted(*given: Any, plain: Any = plain) -> Any:
                events = street.events[place[threading.get_ident()]]
                if events[-1:] != ["compute"]:  # of one hop, over several sources
                    events.append("compute")
                return plain(*given)

            monkeypatch.setattr(module, name, noted)

    def run(rank: int) -> tuple[list[str], list[str]]:
        place[threading.get_ident()] = rank
        spec = _spec(street, rank, options, 192, CAUSAL)
        q, k, v = (normal(n, 1, 192 // world, 4, 16) for n in range(3))
        events, plan = street.events[rank], spec.plan(None)
        state = spec.movement.absorb(q, k, v, spec, plan)
        forward = list(events)
        events.clear()
        saved = Saved(q, state.out, torch.ones_like(state.out), state.lse)
        gradients = spec.movement.gradients(saved, k, v, spec, plan)
        assert all(x.isfinite().all() for x in (state.out, state.lse, *gradients))
        return forward, events

    hop = ["post", "compute", "wait"]
    if way == "ring":  # the last hop forward sends nothing; then dK and dV follow, and go home
        expected = hop * (world - 1) + ["compute"], hop * world + ["post", "wait"]
    else:  # four heads one after the other: the next are on their way before these are computed with
        expected = (["post", *["wait", "post", "compute"] * 3, "wait", "compute"],) * 2
    assert together(world, run) == [expected] * world


@pytest.fixture(scope="module")
def world_of_four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What four real processes say; see ``torch_world.py``."""
    store = tmp_path_factory.mktemp("world") / "store"
    path = os.pathsep.join(entry for entry in sys.path if entry)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "torch_world.py"), str(rank), str(store)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
        )
        for rank in range(4)
    ]  # fmt: skip
    try:
        answers = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, stderr) in zip(processes, answers, strict=True):
        assert process.returncode == 0, stderr
    return [json.loads(stdout) for stdout, _ in answers]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ring", "allgather", "ulysses", "usp"])
def test_a_mesh_with_data_ranks_beside(world_of_four: list[dict[str, Any]], strategy: str) -> None:
    """Two rings side by side, each with rows of its own, and usp over all: as one process has it."""
    assert [told["rank"] for told in world_of_four] == [0, 1, 2, 3]
    assert all(told[strategy] < 1e-5 for told in world_of_four), [told[strategy] for told in world_of_four]


@pytest.mark.slow
def test_calls_of_torch_distributed(world_of_four: list[dict[str, Any]]) -> None:
    """The sends themselves: as counted between threads."""
    for told in world_of_four:
        assert told["ring calls"] == {"batch_isend_irecv bfloat16": 7, "batch_isend_irecv float32": 3}
        assert told["ulysses calls"] == {"all_to_all_single bfloat16": 4}


# -- how much is held --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["cpu-flash", "math"])
@pytest.mark.parametrize("mask", [CAUSAL, AttentionMask("full"), AttentionMask("causal", window=700)])
def test_no_tensor_grows_with_the_square_of_the_length(kernel: str, mask: AttentionMask) -> None:
    """Neither S×S nor a rank's C×C scores or masks: the largest are a chunk's square of all heads, or K and V."""
    world, length, heads, dim, chunk = 2, 4096, 2, 8, 128
    options = AttentionOptions(kernel=kernel, chunk=chunk)
    street, local, largest = Street(world), length // world, [0, 0]

    def run(rank: int) -> None:
        spec = _spec(street, rank, options, length, mask)
        q, k, v = (normal(n, 1, local, heads, dim) for n in range(3))
        segments = torch.from_numpy(np.repeat(np.arange(1, 9, dtype=np.int32), length // 8)[None])
        mine = segments[:, torch.from_numpy(spec.layout.rank_indices(length, rank)).long()]
        for ids in (None, mine):
            with Largest() as mode:  # as the operators do it, which hide it from a mode
                state = spec.movement.absorb(q, k, v, spec, spec.plan(ids))
                lse = state.lse.masked_fill(state.lse.isneginf(), math.inf)
                saved = Saved(q, state.out, torch.ones_like(state.out), lse)
                spec.movement.gradients(saved, k, v, spec, spec.plan(ids))
            largest[rank] = max(largest[rank], mode.elements)

    together(world, run)
    assert 0 < max(largest) <= max(heads * chunk**2, 2 * local * heads * dim) < local**2 / 16, largest


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ring", "allgather", "ulysses", "usp"])
def test_the_gradient_of_lse_is_refused(strategy: str) -> None:
    """Never a silent zero, and out's own gradient is not in the way of it."""
    street, options = Street(4), AttentionOptions(strategy=strategy)

    def run(rank: int) -> str:
        spec = _spec(street, rank, options, 64, CAUSAL)
        q, k, v = (normal(n, 1, 16, 4, 16).requires_grad_() for n in range(3))
        out, lse = STRATEGIES[strategy].attention(q, k, v, None, spec)
        with pytest.raises(UnsupportedError, match="lse has no gradient") as refusal:
            (out.sum() + lse.sum()).backward()
        return str(refusal.value)

    assert len(together(4, run)) == 4


def test_second_derivatives_are_refused() -> None:
    q, k, v = (normal(n, 1, 32, 2, 8).requires_grad_() for n in range(3))
    out = alone(32).attend(q, k, v, CAUSAL)
    (dq,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
    with pytest.raises(UnsupportedError, match="no second derivative"):
        dq.square().sum().backward()


@pytest.mark.parametrize("kernel", ["cpu-flash", "math"])
@pytest.mark.parametrize("length", [37, 101])
def test_lengths_that_no_chunk_divides(length: int, kernel: str) -> None:
    """A prime length in chunks of 16, forward and backward."""
    q, k, v, dout = (normal(n, 2, length, 2, 8) for n in range(4))
    for mask in (CAUSAL, AttentionMask("full"), AttentionMask("causal", window=5)):
        given = [x.clone().requires_grad_() for x in (q, k, v)]
        out = alone(length, kernel=kernel, chunk=16).attend(*given, mask)
        out.backward(dout)
        assert relative_l2(out.detach(), attention_forward(q, k, v, mask)[0]) < 1e-6
        for x, expected in zip(given, attention_backward(q, k, v, mask, dout), strict=True):
            assert relative_l2(x.grad, expected) < 1e-6


def test_queries_alone_may_need_a_gradient() -> None:
    q, k, v = (normal(n, 1, 32, 2, 8) for n in range(3))
    alone(32).attend(q.requires_grad_(), k, v, CAUSAL).sum().backward()
    expected, _, _ = attention_backward(q.detach(), k, v, CAUSAL, torch.ones_like(q))
    assert relative_l2(q.grad, expected) < 1e-6 and k.grad is None


# -- plans, compiled programs, checkpointing ---------------------------------------------------------------------------


def test_layers_share_the_plan_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worked out once for a tensor of ids and its backward pass, and again once the tensor is changed in place."""
    made = []
    plain = Plan.__init__
    monkeypatch.setattr(Plan, "__init__", lambda self, *args: (made.append(1), plain(self, *args))[1])
    backend, ids = alone(32), torch.ones(1, 32, dtype=torch.int32)
    q, k, v = (normal(n, 1, 32, 2, 8).requires_grad_() for n in range(3))
    out = backend.attend(backend.attend(q, k, v, CAUSAL, ids), k, v, CAUSAL, ids)
    out.sum().backward()
    assert len(made) == 1
    ids[:, 16:] = 2
    changed = backend.attend(q, k, v, CAUSAL, ids)
    assert len(made) == 2
    assert relative_l2(changed.detach(), attention_forward(*(x.detach() for x in (q, k, v)), CAUSAL, ids)[0]) < 1e-6


def test_checkpointing_can_keep_what_attention_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the operator's name, so that a ring does not run twice; a plain checkpoint runs it again."""
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    runs = []
    monkeypatch.setattr(ring, "start", lambda q, plain=ring.start: (runs.append(1), plain(q))[1])

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = operator is torch.ops.lwm_torch_ring.attention.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    backend = alone(32)

    def layer(q: Any, k: Any, v: Any) -> Any:
        return backend.attend(2 * q, k, v, CAUSAL).sin().sum()

    given = [normal(n, 1, 32, 2, 8).requires_grad_() for n in range(3)]
    checkpoint(
        layer, *given, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
    ).backward()
    assert len(runs) == 1
    checkpoint(layer, *given, use_reentrant=False).backward()
    assert len(runs) == 3


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_kernel_that_cannot_run_is_refused() -> None:
    q, k, v = (normal(n, 1, 32, 2, 8) for n in range(3))
    with pytest.raises(UnsupportedError, match=r"'cuda-flash' cannot be used: it needs an NVIDIA GPU, but .* cpu"):
        alone(32, kernel="cuda-flash").attend(q, k, v, CAUSAL)


def test_another_torch_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that binds the op otherwise, or is too old: auto says so and takes math, the name is refused."""
    for change in (lambda: monkeypatch.setitem(aten._BINDINGS, aten._CPU, ("query key value scale",)),
                   lambda: monkeypatch.setattr(torch, "__version__", "2.9.1")):  # fmt: skip
        with monkeypatch.context():
            change()
            aten._op.cache_clear()
            name, why = choose_kernel(AttentionOptions(), CPU, torch.float32, 64)
            assert name == "math" and any("kernel cpu-flash: torch" in line for line in why)
            with pytest.raises(UnsupportedError, match=r"torch 2.*; use kernel = 'math'"):
                choose_kernel(AttentionOptions(kernel="cpu-flash"), CPU, torch.float32, 64)
        monkeypatch.undo()
        aten._op.cache_clear()
    assert choose_kernel(AttentionOptions(), CPU, torch.float32, 64)[0] == "cpu-flash"


def test_wrong_shards_are_refused() -> None:
    backend = alone(32)
    q, k, v = (normal(n, 1, 32, 2, 8) for n in range(3))
    with pytest.raises(ShapeError, match="built for 32 tokens a process, got 16"):
        backend.attend(q[:, :16], k[:, :16], v[:, :16], CAUSAL)
    with pytest.raises(ShapeError, match="segment_ids"):
        backend.attend(q, k, v, CAUSAL, torch.ones(2, 32, dtype=torch.int32))
    with pytest.raises(UnsupportedError, match=r"segment_ids is torch\.float32"):
        backend.attend(q, k, v, CAUSAL, torch.ones(1, 32))
    with pytest.raises(UnsupportedError, match=r"k is torch\.bfloat16, q torch\.float32"):
        backend.attend(q, k.bfloat16(), v.bfloat16(), CAUSAL)
    with pytest.raises(ShapeError, match=r"usp with inner = 2 does not divide sp = 3"):
        factory.layout(AttentionOptions(strategy="usp", inner=2), 96, 3)
