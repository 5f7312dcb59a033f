"""The kits of data sources and tokenizers, on implementations that are right and wrong in a single way."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lwm_core.batch import PackedBatch, TokenSequence, pack_rows
from lwm_core.errors import CheckpointError, ShapeError
from lwm_core.model import canonical_shapes, preset
from lwm_core.protocols import FeedRequest, WeightsBundle
from lwm_core.rope import RopeSpec
from lwm_core.testing import DataSuite, TokenizerSuite, WeightsSuite
from lwm_core.vocab import Vocabulary
from lwm_core.weights import write_model_folder


class Feed:
    """Rows of two or three random documents."""

    def __init__(self, request: FeedRequest, seed: int, fault: str) -> None:
        self.request, self.seed, self.fault, self.calls = request, seed, fault, 0

    def batch(self, step: int) -> PackedBatch:
        request, fault = self.request, self.fault
        self.calls += 1
        count = request.rows // request.world
        first = 0 if fault == "every-rank-the-same" else request.rank * count
        key = self.calls if fault == "iterator" else 0 if fault == "ignores-step" else step
        seed = 0 if fault == "ignores-seed" else self.seed
        rows = [self._row((seed, key, row)) for row in range(first, first + count)]
        return self._spoilt(pack_rows(rows, request.seq_len))

    def _row(self, key: tuple[int, ...]) -> list[TokenSequence]:
        random = np.random.default_rng(key)
        lengths = random.integers(5, 40, 3)
        return [TokenSequence(random.integers(1, 99, n), np.ones(n)) for n in lengths]  # type: ignore[arg-type]

    def _spoilt(self, batch: PackedBatch) -> PackedBatch:
        if self.fault == "targets-not-shifted":
            return replace(batch, targets=batch.tokens)
        if self.fault == "positions-run-on":
            return replace(batch, positions=np.broadcast_to(np.arange(batch.shape[1]), batch.shape))
        if self.fault == "weight-on-last-token":
            return replace(batch, loss_weights=(batch.segment_ids > 0).astype(np.float32))
        if self.fault == "documents-from-two":
            return replace(batch, segment_ids=np.where(batch.segment_ids, batch.segment_ids + 1, 0))
        if self.fault == "no-weight":
            return replace(batch, loss_weights=np.zeros_like(batch.loss_weights))
        return batch

    def close(self) -> None:
        pass


def data_suite(fault: str) -> DataSuite:
    class Source:
        def __init__(self, seed: int) -> None:
            self.seed = seed

        def open(self, request: FeedRequest) -> Feed:
            if request.rows % request.world and fault != "uneven-ranks":
                raise ShapeError("rows do not divide")
            return Feed(request, self.seed, fault)

    return type("Suite", (DataSuite,), {"make": lambda self, seed: Source(seed)})()


DATA_TESTS: dict[str, Callable[[DataSuite], None]] = {
    "step": lambda suite: suite.test_a_batch_is_a_function_of_the_step(),
    "ranks": lambda suite: suite.test_ranks_partition_the_global_batch(2),
    "rows": lambda suite: suite.test_rows_that_do_not_divide_are_refused(),
    "packed": lambda suite: suite.test_batches_are_well_packed(),
}


def test_a_right_source_passes_everything() -> None:
    for test in DATA_TESTS.values():
        test(data_suite(""))
    data_suite("").test_no_standard_test_is_overridden()


@pytest.mark.parametrize(
    ("fault", "test", "told"),
    [
        ("iterator", "step", "another order"),
        ("ignores-step", "step", "two steps"),
        ("ignores-seed", "step", "seed changes nothing"),
        ("every-rank-the-same", "ranks", "rank 1 of 2"),
        ("uneven-ranks", "rows", "DID NOT RAISE"),
        ("targets-not-shifted", "packed", "next token"),
        ("positions-run-on", "packed", "restart"),
        ("weight-on-last-token", "packed", "loss weight"),
        ("documents-from-two", "packed", "number 1"),
        ("no-weight", "packed", "no token"),
    ],
)
def test_a_wrong_source_fails(fault: str, test: str, told: str) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception), match=told):
        DATA_TESTS[test](data_suite(fault))


class Bytes:
    """UTF-8 bytes, bos and eos."""

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.size = 257 if fault == "small" else 258
        self.special_ids: Mapping[str, int] = {"bos": 256, "eos": 256 if fault == "one-special" else 257}

    def encode(self, text: str) -> list[int]:
        text = text.strip() if self.fault == "lossy" else text
        return [*([256] if self.fault == "adds-bos" else []), *text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        if self.fault == "shows-special":
            return "".join(chr(i) if i < 256 else "<s>" for i in ids)
        return bytes(i for i in ids if i < 256).decode()

    def save(self, folder: Path) -> None:
        (folder / "t.json").write_text(json.dumps("lossy" if self.fault == "forgets" else self.fault))


def tokenizer_suite(fault: str) -> TokenizerSuite:
    members = {
        "make": lambda self: Bytes(fault),
        "load": lambda self, folder: Bytes(json.loads((folder / "t.json").read_text())),
    }
    return type("Suite", (TokenizerSuite,), members)()


TOKENIZER_TESTS: dict[str, Callable[[Any, Path], None]] = {
    "round-trip": lambda suite, folder: suite.test_decoding_undoes_encoding(),
    "range": lambda suite, folder: suite.test_ids_are_in_range(),
    "special": lambda suite, folder: suite.test_special_ids_are_left_out_of_text(),
    "saved": lambda suite, folder: suite.test_a_saved_tokenizer_is_the_same(folder),
    "function": lambda suite, folder: suite.test_encoding_is_a_function("a"),
}


def test_a_right_tokenizer_passes_everything(tmp_path: Path) -> None:
    for test in TOKENIZER_TESTS.values():
        test(tokenizer_suite(""), tmp_path)


@pytest.mark.parametrize(
    ("fault", "test"),
    [
        ("lossy", "round-trip"),
        ("small", "range"),
        ("one-special", "range"),
        ("adds-bos", "range"),
        ("shows-special", "special"),
        ("forgets", "saved"),
    ],
)
def test_a_wrong_tokenizer_fails(tmp_path: Path, fault: str, test: str) -> None:
    with pytest.raises(AssertionError):
        TOKENIZER_TESTS[test](tokenizer_suite(fault), tmp_path)


def weights_suite(folder: Path) -> WeightsSuite:
    return type("Suite", (WeightsSuite,), {"make": lambda self: WeightsBundle("toy", folder)})()


def test_shipped_weights_are_the_models(tmp_path: Path) -> None:
    model = preset("tiny", Vocabulary(20), hidden_size=8, intermediate_size=8, num_layers=1)
    parameters = {name: np.ones(shape, np.float32) for name, shape in canonical_shapes(model).items()}
    write_model_folder(tmp_path, model, RopeSpec(), 64, parameters.items(), dtype="bfloat16")
    weights_suite(tmp_path).test_the_parameters_are_the_models()
    name = "model.norm.weight"
    for spoilt in (np.ones(9, np.float32), np.full(8, np.nan, np.float32)):
        save_file({**parameters, name: spoilt}, tmp_path / "model.safetensors")
        with pytest.raises((AssertionError, CheckpointError), match=name):
            weights_suite(tmp_path).test_the_parameters_are_the_models()


def test_suites_say_what_a_subclass_must_give() -> None:
    for call in (TokenizerSuite().make, lambda: DataSuite().make(0), WeightsSuite().make):
        with pytest.raises(NotImplementedError, match="must give"):
            call()
