"""Strategy ``auto``: heads, mesh and rates decide, and the choice is told."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from lwm_core.attention import AttentionMask
from lwm_core.attention_cost import AttentionShape
from lwm_core.errors import ShapeError, UnsupportedError
from lwm_core.mesh import MESH_AXES
from lwm_core.protocols import AttentionAxes
from lwm_jax_ring.attention.auto import GATHERED_SHARE
from lwm_jax_ring.attention.backend import factory
from lwm_jax_ring.attention.options import AttentionOptions
from lwm_jax_ring.devices import DEVICES, DeviceRates, device_rates

AUTO = AttentionOptions(strategy="auto")


def mesh(tp: int, sp: int) -> Mesh:
    return Mesh(np.array(jax.devices()[: tp * sp]).reshape(1, 1, tp, sp), MESH_AXES)


def choose(shape, tp=1, sp=8, rates=DEVICES["TPU v4"], options=AUTO):
    from lwm_jax_ring.attention.auto import resolve_strategy
    from lwm_jax_ring.attention.strategies import sequence_layout

    return resolve_strategy(options, shape, mesh(tp, sp), AttentionAxes(), sequence_layout, rates)


LLAMA = {"heads": 32, "kv_heads": 32, "head_dim": 128}


def test_a_named_strategy_is_left_alone():
    choice = factory.resolve(AttentionOptions(), AttentionShape(4096, **LLAMA), mesh(1, 8), AttentionAxes())
    assert (choice.options, choice.reasons) == (AttentionOptions(), ())


def test_long_sequences_hide_the_ring():
    # 131072 tokens a rank; an ICI link of v4 needs FLOPS / bandwidth = 137.5e12 / 45e9, about 3056 of them (K = H).
    choice = choose(AttentionShape(1 << 20, **LLAMA))
    assert choice.options == AttentionOptions(strategy="ring")
    assert choice.reasons[0] == "chose ring, for one document a row"
    assert {reason.split(":")[0] for reason in choice.reasons} >= {"ring", "ulysses", "allgather", "usp with inner = 2"}


def test_short_sequences_exchange_heads():
    # 512 tokens a rank: the ring's hops are not hidden, and dealing out heads sends a fraction of the bytes.
    assert choose(AttentionShape(4096, **LLAMA)).options.strategy in ("ulysses", "usp")


def test_short_documents_are_heard_of():
    """128 tokens a document leave most hops of a ring with nothing to do; the same rows as one document do not."""
    shape = AttentionShape(1 << 18, heads=3, kv_heads=3, head_dim=128)
    packed = AttentionOptions(strategy="auto", document=128)
    assert choose(shape).options.strategy == "ring"
    choice = choose(shape, options=packed)
    assert choice.options.strategy == "allgather" and choice.options.document is None
    assert choice.reasons[0] == "chose allgather, for documents of 128 tokens"
    with pytest.raises(ValueError, match="document belongs to strategy 'auto'"):
        AttentionOptions(strategy="ring", document=128)


def test_a_window_is_heard_of():
    """It leaves a ring of contiguous ranks one hop, which costs less than exchanging heads; stripes need all seven."""
    window = AttentionShape(1 << 17, **LLAMA, mask=AttentionMask("causal", window=4096))
    layouts = {name: AttentionOptions(strategy="auto", layout=name) for name in ("contiguous", "striped")}
    assert choose(window, options=layouts["contiguous"]).options.strategy == "ring"
    assert choose(window, options=layouts["striped"]).options.strategy in ("ulysses", "usp")


def test_heads_that_do_not_divide_leave_exchanging_out():
    choice = choose(AttentionShape(4096, heads=3, kv_heads=3, head_dim=64))
    assert choice.options.strategy in ("ring", "allgather")
    assert any("cannot be dealt to 8 ranks" in reason for reason in choice.reasons)


def test_tensor_parallel_ranks_have_their_share_of_the_heads():
    shape = AttentionShape(12 * 1024, heads=8, kv_heads=8, head_dim=64)
    assert choose(shape, tp=2, sp=4).options.strategy in ("ulysses", "usp")
    assert any("4 query and 4" in r for r in choose(shape, tp=2, sp=3).reasons if "cannot be dealt" in r)


def test_keys_that_do_not_fit_leave_gathering_out():
    shape = AttentionShape(1 << 14, heads=1, kv_heads=1, head_dim=128)
    whole = 2 * shape.seq_len * 128 * 2
    for memory, fits in ((whole / GATHERED_SHARE, True), (0.99 * whole / GATHERED_SHARE, False)):
        (reason,) = [r for r in choose(shape, rates=DeviceRates(1e14, 1e11, memory)).reasons if r[:9] == "allgather"]
        assert ("exposed" in reason) == fits


def test_a_length_that_zigzag_cannot_deal_still_finds_a_strategy():
    choice = choose(AttentionShape(24, heads=8, kv_heads=8, head_dim=64))  # 3 tokens a rank: no two halves
    assert choice.options.strategy == "ulysses"
    assert any(reason.startswith("ring: ") and "24" in reason for reason in choice.reasons)
    with pytest.raises(ShapeError, match="'auto' finds none that fits: ring: "):
        choose(AttentionShape(25, heads=8, kv_heads=8, head_dim=64))


def test_one_device_needs_no_rates():
    class Unknown:
        platform, device_kind = "axon", "Axon 9"

    assert choose(AttentionShape(64, **LLAMA), sp=1, rates=None).options == AttentionOptions(strategy="ring")
    with pytest.raises(UnsupportedError, match="does not know the rates of 'Axon 9'; expected one of TPU v4"):
        device_rates(Unknown(), 8)


def test_the_choice_on_this_machine_can_be_built():
    shape = AttentionShape(256, heads=8, kv_heads=4, head_dim=16)
    choice = factory.resolve(AUTO, shape, mesh(1, 8), AttentionAxes())
    backend = factory.build(choice.options, mesh(1, 8), AttentionAxes(), 256)
    assert choice.options.strategy != "auto" and backend.layout == factory.layout(choice.options, 256, 8)
