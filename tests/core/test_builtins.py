"""The core's own tokenizer and feed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_core.builtins.byte_tokens import BytesTokenizer
from lwm_core.builtins.text_rows import TextFileOptions, TextFileSource
from lwm_core.errors import DataError, ShapeError
from lwm_core.protocols import DataContext, FeedRequest, Tokenizer
from lwm_core.vocab import Vocabulary

TOKENIZER = BytesTokenizer()


def source(path: str, base: Path, held_out: float = 0.0, seed: int = 0) -> TextFileSource:
    options = TextFileOptions(path=path, held_out=held_out)
    return TextFileSource(options, DataContext(TOKENIZER, Vocabulary(TOKENIZER.size), seed, base))


@given(st.text())
def test_bytes_are_the_texts_utf_8(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert bytes(ids) == text.encode()
    assert TOKENIZER.decode(ids) == text


def test_special_ids_come_after_the_bytes_and_are_left_out_of_text() -> None:
    assert isinstance(TOKENIZER, Tokenizer)
    assert sorted(TOKENIZER.special_ids.values()) == [256, 257, 258] and TOKENIZER.size == 259
    assert TOKENIZER.decode([256, *TOKENIZER.encode("é"), 257, 258]) == "é"


def test_bytes_cut_inside_a_character_do_not_raise() -> None:
    assert TOKENIZER.decode(TOKENIZER.encode("é")[:1]) == "\ufffd"


@pytest.mark.parametrize("ids", [[259], [-1], [3, 10_000]])
def test_an_id_of_another_vocabulary_is_refused(ids: list[int]) -> None:
    with pytest.raises(DataError, match="0 to 258"):
        TOKENIZER.decode(ids)


def test_a_lone_surrogate_is_no_text() -> None:
    with pytest.raises(DataError, match="character 1 is a lone surrogate"):
        TOKENIZER.encode("a\ud800")


def test_rows_are_pieces_of_the_text_with_the_next_byte_as_target(tmp_path: Path) -> None:
    text = "".join(chr(33 + i % 90) for i in range(500))
    (tmp_path / "t.txt").write_text(text)
    batch = source("t.txt", tmp_path).open(FeedRequest(0, 16, 8)).batch(5)
    for row in range(8):
        piece = bytes([*batch.tokens[row].tolist(), int(batch.targets[row, -1])]).decode()
        assert piece in text
        assert batch.targets[row, :-1].tolist() == batch.tokens[row, 1:].tolist()
    assert np.allclose(batch.loss_weights.sum(axis=1), 1.0)
    assert (batch.segment_ids == 1).all() and (batch.positions == np.arange(16)).all()


@given(step=st.integers(0, 10**6), stage=st.integers(0, 5), seed=st.integers(0, 2**31))
def test_ranks_hold_slices_of_one_global_batch(step: int, stage: int, seed: int) -> None:
    made = source("shipped:genesis", Path("."), seed=seed)
    whole = made.open(FeedRequest(stage, 32, 8)).batch(step)
    for world in (2, 4):
        parts = [made.open(FeedRequest(stage, 32, 8, rank, world)).batch(step).tokens for rank in range(world)]
        assert np.array_equal(np.concatenate(parts), whole.tokens)


def test_steps_stages_and_seeds_give_other_rows() -> None:
    def rows(seed: int, stage: int, step: int) -> bytes:
        feed = source("shipped:genesis", Path("."), seed=seed).open(FeedRequest(stage, 64, 4))
        return feed.batch(step).tokens.tobytes()

    assert rows(0, 0, 0) == rows(0, 0, 0)
    assert len({rows(0, 0, 0), rows(1, 0, 0), rows(0, 1, 0), rows(0, 0, 1)}) == 4


def test_what_is_held_out_is_never_in_a_row(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a" * 900 + "b" * 100)
    made = source("t.txt", tmp_path, held_out=0.1)
    assert made.held_out() == ["b" * 100]
    feed = made.open(FeedRequest(0, 100, 16))
    seen = {int(one) for step in range(50) for one in np.unique([feed.batch(step).tokens, feed.batch(step).targets])}
    assert seen == {ord("a")}


def test_a_text_of_just_one_row_will_do_and_one_byte_less_will_not(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("x" * 17)
    assert source("t.txt", tmp_path).open(FeedRequest(0, 16, 2)).batch(0).shape == (2, 16)
    with pytest.raises(DataError, match=r"17 tokens.*seq_len = 17 needs 18"):
        source("t.txt", tmp_path).open(FeedRequest(0, 17, 2))


def test_rows_that_do_not_divide_over_the_ranks_are_refused() -> None:
    with pytest.raises(ShapeError, match="3 rows a step do not divide over 2 data ranks"):
        source("shipped:genesis", Path(".")).open(FeedRequest(0, 16, 3, 0, 2))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"", "is empty"), (b" \n\t", "is empty"), (b"\xff\xfe\x00a", "not UTF-8")],
)
def test_a_file_that_cannot_be_trained_on_is_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        source("t.txt", tmp_path)
    assert "\n" not in str(caught.value) and "t.txt" in str(caught.value)


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        source(".", tmp_path)


@pytest.mark.parametrize("name", ["exodus", "../errors", ""])
def test_only_shipped_texts_are_shipped(name: str) -> None:
    with pytest.raises(DataError, match="expected one of genesis"):
        source(f"shipped:{name}", Path("."))
