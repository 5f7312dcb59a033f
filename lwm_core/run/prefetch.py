"""The next batch is made while the step runs."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

from lwm_core.batch import PackedBatch
from lwm_core.layout import SequenceLayout
from lwm_core.protocols import Feed


def batches(
    feed: Feed, layout: SequenceLayout, seq_len: int, first: int, end: int
) -> Generator[PackedBatch, None, None]:
    """The batches of steps ``[first, end)`` in the layout's order, one made ahead in a thread of its own.

    Close the iterator to end the thread.
    """
    permutation = layout.permutation(seq_len)

    def make(step: int) -> PackedBatch:
        return feed.batch(step).map(lambda array: array[:, permutation])

    if first >= end:
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="lwm-feed") as thread:
        ahead = thread.submit(make, first)
        for step in range(first, end):
            batch = ahead.result()
            if step + 1 < end:
                ahead = thread.submit(make, step + 1)
            yield batch
