"""Strategy and kernel ``auto``: heads, mesh and rates decide, and the choice is told."""

from __future__ import annotations

import pytest
import torch

from lwm_core.attention_cost import AttentionShape
from lwm_core.errors import ShapeError, UnsupportedError
from lwm_core.protocols import AttentionAxes, AttentionChoice
from lwm_torch_ring.attention.auto import GATHERED_SHARE, resolve_strategy
from lwm_torch_ring.attention.backend import factory
from lwm_torch_ring.attention.harness import TorchRingHarness
from lwm_torch_ring.attention.options import AttentionOptions
from lwm_torch_ring.attention.ranks import close_pools
from lwm_torch_ring.attention.strategies import sequence_layout
from lwm_torch_ring.devices import DEVICES, DeviceRates, device_rates

AUTO = AttentionOptions(strategy="auto")
LLAMA = {"heads": 32, "kv_heads": 32, "head_dim": 128}


def choose(
    shape: AttentionShape, sp: int = 8, tp: int = 1, rates: DeviceRates = DEVICES["NVIDIA H100"]
) -> AttentionChoice:
    return resolve_strategy(AUTO, shape, sp, tp, sequence_layout, lambda: rates)


def test_long_sequences_hide_the_ring() -> None:
    # 131072 tokens a rank; an H100's NVLinks need 494.5e12 / 450e9, about 1100 of them (K = H).
    choice = choose(AttentionShape(1 << 20, **LLAMA))
    assert choice.options == AttentionOptions(strategy="ring")
    assert choice.reasons[0] == "chose ring"
    assert {reason.split(":")[0] for reason in choice.reasons} >= {"ring", "ulysses", "allgather", "usp with inner = 2"}


def test_short_sequences_exchange_heads() -> None:
    assert choose(AttentionShape(2048, **LLAMA)).options.strategy in ("ulysses", "usp")


def test_tensor_parallel_ranks_have_their_share_of_the_heads() -> None:
    shape = AttentionShape(12 * 1024, heads=8, kv_heads=8, head_dim=64)
    assert any("4 query and 4" in r for r in choose(shape, tp=2, sp=3).reasons if "cannot be dealt" in r)


def test_keys_that_do_not_fit_leave_gathering_out() -> None:
    shape = AttentionShape(1 << 14, heads=1, kv_heads=1, head_dim=128)
    whole = 2 * shape.seq_len * 128 * 2
    for memory, fits in ((whole / GATHERED_SHARE, True), (0.99 * whole / GATHERED_SHARE, False)):
        (reason,) = [r for r in choose(shape, rates=DeviceRates(1e14, 1e11, memory)).reasons if r[:9] == "allgather"]
        assert ("exposed" in reason) == fits


def test_a_length_that_zigzag_cannot_deal_still_finds_a_strategy() -> None:
    choice = choose(AttentionShape(24, heads=8, kv_heads=8, head_dim=64))  # 3 tokens a rank: no two halves
    assert choice.options.strategy == "ulysses"
    with pytest.raises(ShapeError, match="'auto' finds none that fits: ring: "):
        choose(AttentionShape(25, heads=8, kv_heads=8, head_dim=64))


def test_a_gpu_of_unknown_rates_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, known in (("NVIDIA H100 80GB HBM3", True), ("NVIDIA A100-SXM4-80GB", True), ("Axon 9", False)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        if known:
            assert device_rates(torch.device("cuda", 0)) in DEVICES.values()
            continue
        with pytest.raises(UnsupportedError, match="does not know the rates of 'Axon 9'; expected one of NVIDIA A100"):
            device_rates(torch.device("cuda", 0))


def test_one_process_names_its_kernel() -> None:
    shape = AttentionShape(64, **LLAMA)
    choice = factory.resolve(AUTO, shape, None, AttentionAxes())
    assert choice.options == AttentionOptions(strategy="ring", kernel="cpu-flash")
    assert choice.reasons[:2] == ("chose ring: one device holds the whole sequence", "chose kernel cpu-flash")
    assert any(reason.startswith("kernel cuda-flash: it needs an NVIDIA GPU") for reason in choice.reasons)
    named = AttentionOptions(kernel="math")
    assert factory.resolve(named, shape, None, AttentionAxes()) == AttentionChoice(named)
    with pytest.raises(UnsupportedError, match="'auto' is not resolved"):
        factory.build(AUTO, None, AttentionAxes(), 64)


@pytest.mark.slow
@pytest.mark.parametrize(("seq_len", "heads"), [(4, 4), (8192, 1)])
def test_ranks_choose_alike(seq_len: int, heads: int) -> None:
    """Two processes that measure for themselves build one strategy between them, and are right.

    Two tokens a rank hide no transfer on any machine, so heads are exchanged; one head cannot be.
    """
    import numpy as np

    from lwm_core.attention import AttentionMask
    from lwm_core.reference import attention_forward
    from lwm_core.testing import relative_l2

    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((1, seq_len, heads, 16)).astype(np.float32) for _ in range(3))
    try:
        out, _ = TorchRingHarness(AUTO, 2).forward(q, k, v, AttentionMask("causal"))
    finally:
        close_pools()
    assert relative_l2(out, attention_forward(q, k, v, AttentionMask("causal"))[0]) < 1e-6
