"""Reading in chunks and the cache: against NumPy, against the whole pass, in bounded memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch_cases import make_trainer, rows_of

from lwm_core.protocols import SamplingSpec
from lwm_torch_ring.generate.batch import Rows as Reader
from lwm_torch_ring.generate.cache import PAGE, Rows


@given(st.data(), st.sampled_from(["compute", "bfloat16", "int8"]), st.integers(1, 3))
def test_rows_hold_what_was_put_away(data: Any, kind: Any, count: int) -> None:
    """In the order it came, whatever the pieces; rounded to bfloat16, or to a 254th of a page's range."""
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    rows, kept = Rows(kind), [np.zeros((0, 2, 4), np.float32) for _ in range(count)]
    for size in data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=6)):
        piece = random.standard_normal((count, size, 2, 4), dtype=np.float32) * 10.0 ** random.integers(-3, 3)
        chosen = [None if random.random() < 0.3 else np.flatnonzero(random.random(size) < 0.7) for _ in range(count)]
        rows.add(torch.from_numpy(piece), [None if which is None else torch.from_numpy(which) for which in chosen])
        for b, which in enumerate(chosen):
            kept[b] = np.concatenate([kept[b], piece[b] if which is None else piece[b, which]])
    assert rows.used == [len(row) for row in kept]
    got = rows.whole(max(rows.used)).numpy()
    for b, row in enumerate(kept):
        if kind == "compute":
            np.testing.assert_array_equal(got[b, : len(row)], row)
        elif kind == "bfloat16":
            np.testing.assert_allclose(got[b, : len(row)], row, rtol=2**-8)
        for page in range(len(row) // PAGE) if kind == "int8" else ():
            part = slice(page * PAGE, (page + 1) * PAGE)
            step = np.abs(row[part]).max(axis=(0, 2), keepdims=True) / 127
            assert (np.abs(got[b, part] - row[part]) <= 0.501 * step).all()
        if kind == "int8":
            rest = len(row) // PAGE * PAGE
            np.testing.assert_array_equal(got[b, rest : len(row)], row[rest:])


def test_eight_bits_halve_sixteen() -> None:
    sizes = {}
    for kind in ("compute", "bfloat16", "int8"):
        rows = Rows(kind)
        rows.add(torch.randn(2, 8 * PAGE, 2, 64), [None, None])
        sizes[kind] = rows.bytes
    assert sizes["bfloat16"] == sizes["compute"] / 2 == 2 * 8 * PAGE * 2 * 64 * 2
    assert sizes["bfloat16"] / 2 < sizes["int8"] < 1.01 * sizes["bfloat16"] / 2


def noisy(**options: Any) -> Any:
    trainer = make_trainer(**options)
    random = np.random.default_rng(5)
    trainer.load_parameters({name: x + 0.1 * random.standard_normal(x.shape) for name, x in trainer.iter_parameters()})
    return trainer


@pytest.mark.parametrize("chunk", [7, 64, 100])
def test_a_chunks_size_changes_no_logits(chunk: int) -> None:
    """Rows of unequal lengths; the cache after it is as good as any other."""
    random = np.random.default_rng(1)
    prompts = [random.integers(0, 120, size).tolist() for size in (150, 3, 64)]
    more = random.integers(0, 120, 3).tolist()
    found = []
    for trainer in (noisy(), noisy(read_chunk=chunk)):
        with torch.no_grad():
            rows = Reader(trainer, len(prompts))
            found.append([rows.read(prompts), rows.write(more), rows.read([more, [5], more]), rows.write(more)])
        assert rows.lengths == [size + 1 + extra + 1 for size, extra in ((150, 3), (3, 1), (64, 3))]
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


def test_what_is_cached_is_as_good_as_what_is_read() -> None:
    """Read, then write token by token: the logits of reading it all."""
    ids = np.random.default_rng(2).integers(0, 120, 90).tolist()
    trainer = noisy()
    with torch.no_grad():
        whole = Reader(trainer, 1).read([ids])
        rows = Reader(trainer, 1)
        rows.read([ids[:70]])
        for token in ids[70:]:
            last = rows.write([token])
    torch.testing.assert_close(last, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_a_smaller_cache_errs_little(kind: str) -> None:
    ids = np.random.default_rng(2).integers(0, 120, 3 * PAGE + 9).tolist()
    found = []
    for cache in ("compute", kind):
        trainer = noisy(read_chunk=64, cache=cache)
        with torch.no_grad():
            rows = Reader(trainer, 1)
            found.append(rows.read([ids]).log_softmax(-1))
    assert not torch.equal(*found)
    assert float((found[0] - found[1]).abs().max()) < 0.1


def test_streams_beside_each_other_leave_training_as_it_was() -> None:
    """Two are open at once and closed in the order they were opened; gradients stay what they were."""
    trainer = make_trainer()
    generator = trainer.generator()
    one, other = (generator.stream([5, 9, first], SamplingSpec(50)) for first in (1, 2))
    next(one), next(other)
    assert torch.is_grad_enabled()
    trainer.step(rows_of(trainer), 0)
    for stream in (one, other):
        stream.close()
    assert torch.is_grad_enabled()
    trainer.step(rows_of(trainer), 1)


def test_a_stream_that_is_left_harms_nothing() -> None:
    generator = noisy().generator()
    prompt = [5, 9, 60, 3]
    for _ in generator.stream(prompt, SamplingSpec(50)):
        break
    assert generator.generate([prompt], SamplingSpec(4)) == [list(generator.stream(prompt, SamplingSpec(4)))]
