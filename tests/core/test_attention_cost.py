"""The physics of sharded attention, against counts by hand and the shapes of known results."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_core.attention import AttentionMask
from lwm_core.attention_cost import (
    STRATEGIES,
    AttentionShape,
    MachineRates,
    choose_strategy,
    hop_shares,
    imbalance,
    repeated_kv_heads,
    strategy_cost,
)
from lwm_core.errors import ShapeError, UnsupportedError
from lwm_core.layout import LayoutKind, SequenceLayout
from lwm_core.reference import visible

RATES = MachineRates(flops=400e12, bandwidth=100e9)
LONG = AttentionShape(seq_len=1 << 20, heads=32, kv_heads=32, head_dim=128)


@given(
    documents=st.integers(1, 6),
    length=st.integers(1, 12),
    window=st.none() | st.integers(1, 20),
    kind=st.sampled_from(["causal", "full"]),
)
def test_pairs_are_those_that_the_oracle_sees(documents: int, length: int, window: int | None, kind: str) -> None:
    mask = AttentionMask(kind, window if kind == "causal" else None)  # type: ignore[arg-type]
    shape = AttentionShape(documents * length, 1, 1, 8, document=length, mask=mask)
    ids = np.repeat(np.arange(1, documents + 1), length)[None]
    assert shape.pairs == visible(mask, documents * length, ids).sum()


def test_bytes_by_hand() -> None:
    """8 ranks, 1024 tokens each, 4 key-value heads of 64, bf16: K and V are 1 MiB, dK and dV 2 MiB."""
    shape = AttentionShape(seq_len=8192, heads=16, kv_heads=4, head_dim=64)
    mib = 1 << 20
    assert strategy_cost("ring", shape, 8, RATES).sent == (7 + 7) * mib + 7 * 2 * mib + mib
    assert strategy_cost("allgather", shape, 8, RATES).sent == (7 + 7) * mib + 7 * 2 * mib
    # q and out are 4 MiB; the key-value heads are repeated to 8; forward and backward move as much.
    assert strategy_cost("ulysses", shape, 8, RATES).sent == 2 * (4 + 2) * mib * 7 / 8
    assert strategy_cost("ring", shape, 1, RATES).sent == 0
    assert strategy_cost("ring", shape, 8, RATES).held == 2 * mib
    assert strategy_cost("allgather", shape, 8, RATES).held == 8 * mib


def test_usp_is_ulysses_inside_and_a_ring_across() -> None:
    usp = strategy_cost("usp", LONG, 8, RATES, inner=8)
    assert usp.sent == strategy_cost("ulysses", LONG, 8, RATES).sent
    assert strategy_cost("usp", LONG, 8, RATES, inner=1).sent == strategy_cost("ring", LONG, 8, RATES).sent
    assert strategy_cost("usp", LONG, 8, RATES, inner=2).inner == 2


def test_long_shards_hide_a_ring_and_short_ones_do_not() -> None:
    """The hiding condition, causal: 2 · FLOPS ÷ bandwidth tokens a rank forward; 8000 here. One transfer is never
    hidden: that of a rank's finished gradients."""
    home = 2 * (LONG.seq_len // 64) * 32 * 128 * 2 / RATES.bandwidth
    assert strategy_cost("ring", LONG, 64, RATES).exposed == pytest.approx(home)
    short = AttentionShape(seq_len=64 * 2048, heads=32, kv_heads=32, head_dim=128)
    assert strategy_cost("ring", short, 64, RATES).exposed > 1.1 * home / 8
    assert choose_strategy(short, 32, RATES).cost.strategy in ("ulysses", "usp")
    assert choose_strategy(LONG, 512, RATES).cost.strategy == "usp"  # too many ranks for 32 heads alone


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize(("document", "window"), [(None, None), (None, 9), (12, None), (12, 5), (40, 19)])
def test_hop_shares_are_the_pairs_that_the_oracle_sees(
    layout: LayoutKind, document: int | None, window: int | None
) -> None:
    """The busiest rank of each hop, by counting, in the mean over every place where documents may begin."""
    length, ranks, mask = 64, 4, AttentionMask("causal", window=window)
    own = SequenceLayout(layout, ranks).permutation(length).reshape(ranks, -1)
    pairs = np.zeros((ranks, ranks))  # [hop, rank]
    for offset in range(document or 1):
        ids = (np.arange(length) + offset) // (document or length) + 1
        seen = visible(mask, length, ids[None])[0]
        for rank in range(ranks):
            for hop in range(ranks):
                pairs[hop, rank] += seen[np.ix_(own[rank], own[rank - hop])].sum()
    expected = pairs.max(axis=1) / pairs.max(axis=1).sum()
    shape = AttentionShape(length, 1, 1, 8, document=document, mask=mask)
    shares = dict(hop_shares(shape, layout, ranks))
    assert [shares.get(hop, 0.0) for hop in range(ranks)] == pytest.approx(expected.tolist())


def test_a_window_shorter_than_a_rank_costs_one_hop() -> None:
    """128K tokens on 8 ranks, a window of 4096: keys of the rank before and of no other."""
    window = AttentionShape(1 << 17, heads=32, kv_heads=32, head_dim=128, mask=AttentionMask("causal", window=4096))
    keys = 2 * (1 << 14) * 32 * 128 * 2
    assert [hop for hop, _ in hop_shares(window, "contiguous", 8)] == [0, 1]
    cost = strategy_cost("ring", window, 8, RATES, "contiguous")
    assert cost.sent == 2 * keys + 2 * keys + keys  # there twice, float32 gradients after, and home
    assert choose_strategy(window, 8, RATES, "contiguous").cost.strategy == "ring"
    assert strategy_cost("ring", window, 8, RATES, "striped").sent == 7 * 4 * keys + keys


def test_what_one_hop_has_to_spare_hides_nothing_of_another() -> None:
    """Documents of a thousandth of a rank: all work is in hop 0, which can hide the first transfer and no further."""
    packed = AttentionShape(1 << 23, heads=8, kv_heads=8, head_dim=128, document=1024)
    keys = 2 * (1 << 20) * 8 * 128 * 2 / RATES.bandwidth
    (_, first), *rest = hop_shares(packed, "contiguous", 8)
    assert first > 0.999 and len(rest) == 7
    # Forward 7 transfers of keys; backward 7 of keys and 7 of gradients twice as large; what is finished goes home.
    cost = strategy_cost("ring", packed, 8, RATES, "contiguous")
    assert (7 + 7 + 14 + 1 - 2) * keys - 0.01 * keys < cost.exposed < (7 + 7 + 14 + 1) * keys


def test_short_documents_leave_nothing_to_hide_a_ring_behind() -> None:
    packed = AttentionShape(seq_len=1 << 17, heads=6, kv_heads=2, head_dim=128, document=1024)
    choice = choose_strategy(packed, 4, RATES)
    assert choice.cost.strategy != "ring"
    assert any("ulysses: 6 query and 2 key-value heads cannot" in reason for reason in choice.reasons)


def test_memory_rules_the_gather_out() -> None:
    packed = AttentionShape(seq_len=1 << 17, heads=6, kv_heads=2, head_dim=128, document=256)
    held = strategy_cost("allgather", packed, 5, RATES).held
    assert choose_strategy(packed, 5, RATES).cost.strategy == "allgather"
    assert choose_strategy(packed, 5, RATES, memory=held - 1).cost.strategy == "ring"
    assert choose_strategy(packed, 5, RATES, memory=1.0).cost.strategy == "ring", "a rank's own part is held anyway"
    with pytest.raises(UnsupportedError, match="no attention strategy fits: allgather: holds"):
        choose_strategy(packed, 5, RATES, memory=held - 1, strategies=("allgather",))


def test_contiguous_order_waits_for_its_last_rank() -> None:
    even, uneven = (strategy_cost("ring", LONG, 8, RATES, layout) for layout in ("zigzag", "contiguous"))
    assert uneven.compute == pytest.approx(even.compute * (2 - 1 / 8))
    assert imbalance("contiguous", AttentionShape(64, 1, 1, 8, mask=AttentionMask("full")), 8) == 1


@pytest.mark.parametrize(("heads", "kv_heads", "ranks", "expected"), [(32, 8, 4, 8), (32, 8, 16, 16), (12, 4, 6, 12)])
def test_repeated_heads(heads: int, kv_heads: int, ranks: int, expected: int) -> None:
    assert repeated_kv_heads(heads, kv_heads, ranks) == expected


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="unknown; expected one of"):
        strategy_cost("rign", LONG, 8, RATES)
    with pytest.raises(ShapeError, match="does not divide 8"):
        strategy_cost("usp", LONG, 8, RATES, inner=3)
    with pytest.raises(UnsupportedError, match="cannot be dealt"):
        strategy_cost("ulysses", LONG, 64, RATES)


@given(world=st.sampled_from([1, 2, 3, 4, 8, 64]), seq_len=st.integers(1, 64).map(lambda n: n * 4096))
def test_the_choice_is_the_cheapest(world: int, seq_len: int) -> None:
    shape = AttentionShape(seq_len, 32, 8, 128)
    choice = choose_strategy(shape, world, RATES)
    for strategy in STRATEGIES:
        if strategy == "usp" or (strategy == "ulysses" and 32 % world):
            continue
        assert choice.cost.seconds <= strategy_cost(strategy, shape, world, RATES).seconds
