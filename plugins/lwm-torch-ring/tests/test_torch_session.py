"""Conversations: what is kept in the cache is as good as reading all of it anew."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch_cases import make_trainer, model, rows_of

from lwm_core.errors import LwmError, ShapeError
from lwm_core.protocols import SamplingSpec
from lwm_torch_ring.generate.cache import PAGE
from lwm_torch_ring.generate.prompts import Prompts
from lwm_torch_ring.model import sharding

GREEDY = SamplingSpec(6)
DRAWN = SamplingSpec(6, temperature=1.0, top_k=50, seed=4)
CACHES = ["compute", "bfloat16", "int8"]


def noisy(**options: Any) -> Any:
    trainer = make_trainer(**options)
    random = np.random.default_rng(5)
    trainer.load_parameters({name: x + 0.1 * random.standard_normal(x.shape) for name, x in trainer.iter_parameters()})
    return trainer


def some(count: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, 100, count).tolist()


def after(session: Any) -> torch.Tensor:
    """Log-probabilities of what follows all that a session holds, after it has read what it kept pending."""
    for _ in session.stream(SamplingSpec(1, stop_ids=tuple(range(120)))):
        raise AssertionError("every id stops")
    return session._row._logits[0].log_softmax(-1)


def fresh(trainer: Any, tokens: Any) -> torch.Tensor:
    session = trainer.generator().session()
    session.read(tokens)
    return after(session)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
@pytest.mark.parametrize("chunk", [8192, 16])
def test_each_turn_writes_what_all_of_it_as_a_prompt_does(chunk: int, sampling: SamplingSpec) -> None:
    """Turns of one token, of some, and of several chunks; the scorer, which has no cache, agrees."""
    trainer = noisy(read_chunk=chunk)
    generator = trainer.generator()
    session, held = generator.session(), []
    for size in (40, 1, 5, 70, 1):
        session.read(some(size, size))
        held += some(size, size)
        told = list(session.stream(sampling))
        assert told == generator.generate([held], sampling)[0] == list(generator.stream(held, sampling))
        held += told
        assert list(session.tokens) == held
    wanted = generator.log_likelihood([*held, 7])[-1]
    text = session._row._logits[0, :100]
    assert wanted != pytest.approx(float(text.log_softmax(-1)[7]), abs=1e-4), "the last token is not read yet"
    after(session)
    assert wanted == pytest.approx(float(session._row._logits[0, :100].log_softmax(-1)[7]), abs=1e-4)


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_of_any_kind_goes_on(cache: str) -> None:
    """Over pages that get full in reading and in writing; what was rounded stays near what a fresh read rounds."""
    trainer = noisy(cache=cache, read_chunk=64)
    session = trainer.generator().session()
    for size in (PAGE - 3, 1, 2 * PAGE + 5):
        session.read(some(size, size))
        list(session.stream(SamplingSpec(9)))
        far = (after(session) - fresh(trainer, session.tokens)).abs().max()
        assert far < {"compute": 1e-4, "bfloat16": 0.05, "int8": 0.1}[cache], far
    assert session._row._rows._layers[0].used == [len(session.tokens)]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("taken", [0, 1, 3])
def test_whoever_leaves_early_holds_what_was_given(taken: int, cache: str) -> None:
    """And goes on from there as from a fresh read: by writing at once, by a token, by many."""
    trainer = noisy(cache=cache, read_chunk=64)
    for coming in ([], [9], some(80, 3)):
        session = trainer.generator().session()
        session.read(some(90))
        stream = session.stream(GREEDY)
        given = [next(stream) for _ in range(taken)]
        stream.close()
        assert list(session.tokens) == some(90) + given
        if coming:
            session.read(coming)
        told = list(session.stream(GREEDY))
        expected = trainer.generator().session()
        expected.read(some(90) + given + coming)
        if cache == "compute":
            assert told == list(expected.stream(GREEDY))
            torch.testing.assert_close(after(session), after(expected), rtol=1e-4, atol=1e-4)
        else:
            whole = fresh(trainer, session.tokens)
            torch.testing.assert_close(after(session), whole, rtol=0, atol=0.1)


def test_a_stop_id_does_not_join() -> None:
    generator = noisy().generator()
    session, free = generator.session(), generator.generate([some(20)], DRAWN)[0]
    session.read(some(20))
    stop = SamplingSpec(6, temperature=1.0, top_k=50, seed=4, stop_ids=(free[3],))
    told = list(session.stream(stop))
    assert told == free[: free.index(free[3])] and list(session.tokens) == some(20) + told
    assert list(session.stream(GREEDY)) == generator.generate([some(20) + told], GREEDY)[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 1, "qkv_bias": True}, {"tie_embeddings": True}])
def test_a_token_goes_the_same_way_through_the_copy_and_the_network(
    changes: dict[str, Any], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the copy has no room, the network itself decodes."""
    trainer = noisy(config=model(**changes), compute_dtype=dtype)

    def written() -> torch.Tensor:
        rows = Prompts(trainer, 2)
        with trainer.gathering():
            rows.read([some(40), some(30)])
            for token in (5, 9, 60):
                rows.read([[token], [token + 1]])
        assert (rows._rows._decoding is None) == (sharding.GATHERED_SHARE == 0)
        found: torch.Tensor = rows._logits
        return found

    by_copy = written()
    monkeypatch.setattr(sharding, "GATHERED_SHARE", 0)
    by_network = written()
    tolerance = 1e-5 if dtype == "float32" else 0.05
    assert (by_copy - by_network).norm() < tolerance * by_network.norm()


def test_conversations_beside_each_other_do_not_mix() -> None:
    generator = noisy().generator()
    one, other = generator.session(), generator.session()
    for turn in range(3):
        for session, seed in ((one, 1), (other, 2)):
            session.read(some(9 + turn, seed))
        streams = [session.stream(DRAWN) for session in (one, other)]
        for a, b in zip(*streams, strict=True):
            assert 0 <= a < 100 and 0 <= b < 100
    for session in (one, other):
        held = list(session.tokens)
        assert held[-6:] == generator.generate([held[:-6]], DRAWN)[0]


def test_parameters_are_used_as_they_are_and_training_goes_on() -> None:
    """A stream that stays open does not hold gradients back, and closing it late harms nothing."""
    trainer = make_trainer()
    session = trainer.generator().session()
    session.read([5, 9, 60, 3])
    stream = session.stream(SamplingSpec(50))
    next(stream)
    assert torch.is_grad_enabled()
    trainer.step(rows_of(trainer), 0)
    stream.close()
    before = fresh(trainer, some(30))
    trainer.step(rows_of(trainer), 1)
    assert not torch.equal(before, fresh(trainer, some(30)))


def test_wrong_use_is_told_and_harms_nothing() -> None:
    generator = noisy().generator()
    session = generator.session()
    with pytest.raises(ShapeError, match="nothing was read yet"):
        session.stream(GREEDY)
    with pytest.raises(ShapeError, match="0 tokens; expected at least 1"):
        session.read([])
    session.read(some(9))
    for wrong in ([3, 120], [-1]):
        with pytest.raises(ShapeError, match=r"ids outside \[0, 120\)"):
            session.read(wrong)
    with pytest.raises(ShapeError, match="modality 'sound'"):
        session.stream(SamplingSpec(3, modality="sound"))
    late = session.stream(GREEDY)
    first = next(late)
    session.read([4])
    with pytest.raises(LwmError, match="went on without this stream"):
        next(late)
    assert list(session.tokens) == [*some(9), first, 4]
    assert list(session.stream(GREEDY)) == generator.generate([[*some(9), first, 4]], GREEDY)[0]
    session.close()
    session.close()
    for use in (lambda: session.read([1]), lambda: session.stream(GREEDY)):
        with pytest.raises(LwmError, match="was closed; open another"):
            use()


def test_what_fails_half_way_is_not_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some layers have more in their caches than others then: a wrong answer would come of it."""
    trainer = noisy()
    session = trainer.generator().session()
    session.read(some(9))

    def interrupted(*given: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.network.blocks[1], "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.read(some(5))
    monkeypatch.undo()
    with pytest.raises(LwmError, match="was closed"):
        session.read([1])
    assert list(trainer.generator().stream(some(9), GREEDY)) == trainer.generator().generate([some(9)], GREEDY)[0]
