"""The conformance kits of data sources (the feed is a pure function of the step) and of shipped weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from operator import itemgetter
from typing import ClassVar

import numpy as np
import pytest

from lwm_core.attention import document_bounds
from lwm_core.batch import PackedBatch
from lwm_core.errors import ShapeError
from lwm_core.protocols import DataSource, Feed, FeedRequest, WeightsBundle
from lwm_core.testing.suite import Suite


class DataSuite(Suite):
    """Subclass it and give :meth:`make`.

    Attributes:
        request: the whole global batch of a stage, as one rank sees it; rows divide by 4.
        steps: steps that are looked at.
    """

    request: ClassVar[FeedRequest] = FeedRequest(stage_index=0, seq_len=128, rows=4)
    steps: ClassVar[tuple[int, ...]] = (0, 1, 2, 7)

    def make(self, seed: int) -> DataSource:
        """The source under test over a small corpus, with ``seed``."""
        raise NotImplementedError(f"{type(self).__name__}.make() must give the source under test")

    @contextmanager
    def _feed(self, request: FeedRequest, seed: int = 0) -> Iterator[Feed]:
        feed = self.make(seed).open(request)
        try:
            yield feed
        finally:
            feed.close()

    def test_a_batch_is_a_function_of_the_step(self) -> None:
        """A fresh feed gives the same bits, asked in any order and more than once; another seed gives others."""
        with self._feed(self.request) as feed:
            first = {step: feed.batch(step) for step in self.steps}
        with self._feed(self.request) as feed:
            for step in (*reversed(self.steps), *self.steps):
                assert _same(feed.batch(step), first[step]), f"step {step} differs when asked in another order"
        assert not _same(first[self.steps[0]], first[self.steps[1]]), "two steps have the same rows"
        with self._feed(self.request, seed=1) as feed:
            assert not all(_same(feed.batch(step), first[step]) for step in self.steps), "the seed changes nothing"

    @pytest.mark.parametrize("world", [2, 4])
    def test_ranks_partition_the_global_batch(self, world: int) -> None:
        """The rows of the ranks, in order, are the global batch."""
        with self._feed(self.request) as feed:
            whole = {step: feed.batch(step) for step in self.steps}
        for rank in range(world):
            size = self.request.rows // world
            with self._feed(replace(self.request, rank=rank, world=world)) as feed:
                for step in self.steps:
                    part = whole[step].map(itemgetter(slice(rank * size, (rank + 1) * size)))
                    assert _same(feed.batch(step), part), f"rank {rank} of {world} has other rows at step {step}"

    def test_rows_that_do_not_divide_are_refused(self) -> None:
        """Rows over ranks must come out even."""
        with pytest.raises(ShapeError), self._feed(replace(self.request, world=self.request.rows + 1)):
            pass

    def test_batches_are_well_packed(self) -> None:
        """Shape; positions and targets inside each document; padding at the end, empty; weights where a target is."""
        with self._feed(self.request) as feed:
            batches = [feed.batch(step) for step in self.steps]
        assert sum(float(batch.loss_weights.sum()) for batch in batches) > 0, "no token carries loss weight"
        for batch in batches:
            assert batch.shape == (self.request.rows, self.request.seq_len)
            check_packed(batch)


class WeightsSuite(Suite):
    """Subclass it and give :meth:`make`: weights that a distribution ships."""

    def make(self) -> WeightsBundle:
        """The bundle under test."""
        raise NotImplementedError(f"{type(self).__name__}.make() must give the bundle under test")

    def test_the_parameters_are_the_models(self) -> None:
        """The folder reads as a model: canonical names and shapes, every value finite."""
        from lwm_core.weights import read_model_folder

        found = read_model_folder(self.make().folder)
        assert found.seq_len > 0
        for name in found.parameters:
            assert np.all(np.isfinite(np.asarray(found.parameters[name]).astype(np.float32))), f"{name} is not finite"


def check_packed(batch: PackedBatch) -> None:
    """Raise AssertionError unless every row is documents end to end, numbered from 1, then padding.

    A document that the row's end cuts may go on: its last token there may have a target, which the row cannot show.
    """
    ids = batch.segment_ids
    steps = np.diff(ids, axis=1)
    assert np.all(np.isin(ids[:, 0], (0, 1))), "a row's first document is not number 1"
    assert np.all((steps == 0) | (steps == 1) | (ids[:, 1:] == 0)), "document numbers do not count up by 1"
    first, last = document_bounds(ids)
    index = np.arange(ids.shape[1])
    real = ids > 0
    assert np.array_equal(batch.positions[real], (index - first)[real]), "positions do not restart at each document"
    inner = real & (index < last)
    following = np.roll(batch.tokens, -1, axis=1)
    assert np.array_equal(batch.targets[inner], following[inner]), "a target is not the document's next token"
    cut = real & (index == ids.shape[1] - 1)
    assert not np.any(batch.loss_weights[~(inner | cut)]), "a document's last token or padding carries loss weight"
    assert np.all(np.isfinite(batch.loss_weights)) and np.all(batch.loss_weights >= 0)


def _same(a: PackedBatch, b: PackedBatch) -> bool:
    return all(np.array_equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(a))
