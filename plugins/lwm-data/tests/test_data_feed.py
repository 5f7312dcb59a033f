"""The feed is a pure function of (seed, stage, step): workers, ranks and the order of asking change nothing."""

from __future__ import annotations

import hashlib
from dataclasses import fields

import numpy as np
import pytest

from lwm_core.batch import PackedBatch
from lwm_core.errors import ConfigError, DataError, ShapeError
from lwm_core.protocols import DataSource, FeedRequest

SOURCES = {
    "kjv": {"kind": "text", "corpus": "kjv"},
    "verses": {"kind": "needle", "haystack": "kjv", "needles": [1, 2], "retrieve": [1, 2], "min_tokens": 450},
    "again": {"kind": "copy", "min_tokens": 32},
    "pairs": {"kind": "copy", "task": "pairs"},
}
SEQ_LEN, ROWS, STEPS = 512, 8, 5


def digest(batch: PackedBatch) -> str:
    data = b"".join(np.ascontiguousarray(getattr(batch, field.name)).tobytes() for field in fields(batch))
    return hashlib.sha256(data).hexdigest()


def stream(source, world=1, steps=range(STEPS), **request) -> list[PackedBatch]:
    """The global batches of ``steps``, put together from the batches of every data rank."""
    feeds = [source.open(FeedRequest(1, SEQ_LEN, ROWS, rank, world, **request)) for rank in range(world)]
    try:
        parts = [[feed.batch(step) for feed in feeds] for step in steps]
    finally:
        for feed in feeds:
            feed.close()
    names = [field.name for field in fields(PackedBatch)]
    return [PackedBatch(*(np.concatenate([getattr(part, name) for part in row]) for name in names)) for row in parts]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    from lwm_core.builtins.byte_tokens import BytesTokenizer
    from lwm_core.protocols import DataContext
    from lwm_core.vocab import Vocabulary
    from lwm_data.feed import open_mix
    from lwm_data.options import MixOptions

    options = MixOptions.model_validate({"sources": SOURCES, "window_rows": 16, "prefetch": 0})
    source = open_mix(options, DataContext(BytesTokenizer(), Vocabulary(259), 7, tmp_path_factory.mktemp("base")))
    return [digest(batch) for batch in stream(source)]


@pytest.mark.parametrize(
    ("workers", "world"),
    [
        (0, 1), (0, 2), (0, 4), (2, 1), (1, 2),
        *(pytest.param(w, n, marks=pytest.mark.slow) for w, n in [(1, 1), (2, 2), (1, 4), (2, 4)]),
    ],
)  # fmt: skip
def test_the_global_stream_is_the_same_for_any_workers_and_ranks(open_source, expected, workers, world):
    source = open_source(SOURCES, seed=7, window_rows=16, workers=workers)
    assert [digest(batch) for batch in stream(source, world)] == expected


def test_steps_in_any_order_give_what_steps_in_order_give(open_source, expected):
    source = open_source(SOURCES, seed=7, window_rows=16)
    order = [4, 0, 3, 3, 4, 1, 2, 0]
    assert [digest(batch) for batch in stream(source, steps=order)] == [expected[step] for step in order]


def test_a_feed_can_be_used_again_after_close(open_source, expected):
    feed = open_source(SOURCES, seed=7, window_rows=16).open(FeedRequest(1, SEQ_LEN, ROWS))
    for step in (0, 1, 2):
        feed.batch(step)
    feed.close()
    feed.close()
    assert digest(feed.batch(3)) == expected[3]
    feed.close()


def test_rows_do_not_depend_on_how_many_a_step_takes(open_source):
    source = open_source(SOURCES, window_rows=16)
    few, many = (source.open(FeedRequest(0, SEQ_LEN, rows)) for rows in (4, 12))
    three = np.concatenate([few.batch(step).tokens for step in range(3)])
    np.testing.assert_array_equal(three, many.batch(0).tokens)


def test_seed_stage_and_step_each_change_the_rows(open_source):
    first = open_source(SOURCES, seed=0)
    tokens = [
        first.open(FeedRequest(0, SEQ_LEN, ROWS)).batch(0).tokens.tobytes(),
        first.open(FeedRequest(0, SEQ_LEN, ROWS)).batch(1).tokens.tobytes(),
        first.open(FeedRequest(1, SEQ_LEN, ROWS)).batch(0).tokens.tobytes(),
        open_source(SOURCES, seed=1).open(FeedRequest(0, SEQ_LEN, ROWS)).batch(0).tokens.tobytes(),
        open_source(SOURCES, seed=-1).open(FeedRequest(0, SEQ_LEN, ROWS)).batch(0).tokens.tobytes(),
    ]
    assert len(set(tokens)) == len(tokens)


def test_golden_stream(expected):
    """Pins the stream: a change here means that a run resumed with this version no longer sees the same batches."""
    assert hashlib.sha256("".join(expected).encode()).hexdigest() == (
        "3f2b3bb626cafc7a06e96db38a8d679026434d3cec66cb77d93e9df0c4a0b5a2"
    )


def test_the_mix_is_the_share_of_rows(open_source):
    sources = {"a": {"kind": "copy", "task": "pairs"}, "b": {"kind": "text", "corpus": "kjv"}, "c": SOURCES["again"]}
    source = open_source(sources, window_rows=10)
    batch = source.open(FeedRequest(0, 64, 400, mix={"a": 3.0, "b": 1.0})).batch(0)
    # A row of pairs opens with four digits and a colon.
    digits = np.isin(batch.tokens[:, :4], [ord(d) for d in "0123456789"]).all(axis=1)
    pairs = digits & (batch.tokens[:, 4] == ord(":"))
    assert abs(pairs.mean() - 0.75) < 0.01


def test_weights_are_the_mix_where_the_stage_has_none(open_source):
    sources = {"kjv": SOURCES["kjv"], "pairs": SOURCES["pairs"]}
    by_weights = open_source(sources, weights={"pairs": 1.0}).open(FeedRequest(0, 128, 8)).batch(0)
    by_mix = open_source(sources).open(FeedRequest(0, 128, 8, mix={"pairs": 2.0, "kjv": 0.0})).batch(0)
    np.testing.assert_array_equal(by_weights.tokens, by_mix.tokens)


def test_a_source_added_to_the_sources_leaves_the_others_rows_as_they_were(open_source):
    alone = open_source({"kjv": SOURCES["kjv"]}).open(FeedRequest(0, 128, 8)).batch(0)
    beside = open_source(SOURCES).open(FeedRequest(0, 128, 8, mix={"kjv": 1.0})).batch(0)
    np.testing.assert_array_equal(alone.tokens, beside.tokens)


def test_it_is_a_data_source_of_the_core_and_its_spec_is_light(open_source):
    import subprocess
    import sys

    source: DataSource = open_source({"kjv": SOURCES["kjv"]})
    assert source.held_out()
    code = (
        "import sys; from lwm_data._lwm import mix; assert mix.name == 'mix'; "
        "heavy = {'numpy', 'grain', 'jax', 'pydantic', 'pyarrow'} & set(sys.modules); assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("request_", "kind", "words"),
    [
        (FeedRequest(3, 64, 6, 0, 4), ShapeError, "6 rows do not divide by 4 data ranks"),
        (FeedRequest(3, 64, 4, 4, 4), ShapeError, "rank 4 of 4"),
        (FeedRequest(3, 1, 4), ShapeError, "seq_len is 1"),
        (FeedRequest(3, 64, 4, mix={"pear": 1.0}), ConfigError, "did you mean 'pairs'"),
        (FeedRequest(3, 64, 4, mix={"pairs": -1.0}), ConfigError, "weight of 'pairs' is -1.0"),
        (FeedRequest(3, 64, 4, mix={"pairs": 0.0}), ConfigError, "every weight is 0"),
        (FeedRequest(3, 64, 4, mix={"pairs": float("nan")}), ConfigError, "weight of 'pairs' is nan"),
    ],
)
def test_wrong_requests_are_refused_in_one_line(open_source, request_, kind, words):
    source = open_source({"pairs": SOURCES["pairs"]})
    with pytest.raises(kind, match=words) as caught:
        source.open(request_)
    assert "\n" not in str(caught.value)
    assert "stage 3" in str(caught.value)


def test_a_negative_step_is_refused(open_source):
    with pytest.raises(DataError, match="step -1"):
        open_source({"pairs": SOURCES["pairs"]}).open(FeedRequest(0, 64, 4)).batch(-1)


def test_workers_with_a_tokenizer_that_cannot_travel_are_refused(open_source, plain_tokenizer):
    plain_tokenizer.lock = lambda: None
    source = open_source({"pairs": SOURCES["pairs"]}, tokenizer=plain_tokenizer, workers=1)
    with pytest.raises(DataError, match=r"workers = 1 need the tokenizer in other processes.*set workers = 0"):
        source.open(FeedRequest(0, 64, 4))


def test_workers_that_die_are_told_in_one_line(open_source):
    feed = open_source({"pairs": SOURCES["pairs"]}, workers=1).open(FeedRequest(0, 64, 4))

    def dying():
        raise RuntimeError("worker 0\nwas killed")
        yield

    feed._ahead, feed._next = dying(), 5
    with pytest.raises(DataError, match=r"workers = 1 cannot run here \(worker 0 was killed\); set workers = 0"):
        feed.batch(5)
