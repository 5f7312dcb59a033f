"""Chunks of prompts over a cache that is dealt to devices, against the oracle's logits, on any mesh.

Shapes: N tokens, V text ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_cases import ROPE

from lwm_core.batch import TokenSequence, pack_rows
from lwm_core.errors import LwmError, ShapeError, UnsupportedError
from lwm_core.model import ModelConfig, preset
from lwm_core.protocols import SamplingSpec
from lwm_core.reference import llama_logits
from lwm_core.vocab import Vocabulary
from lwm_jax_ring.generate import programs as compiled
from lwm_jax_ring.generate import reading
from lwm_jax_ring.generate.cache import PAGE, Pages, part, put
from lwm_jax_ring.generate.rows import Rows

MESHES = ["8,1,1,1", "4,1,1,2", "1,1,2,4", "1,1,1,8"]
PROMPTS = [np.random.default_rng(n).integers(0, 100, n).tolist() for n in (5, 300, 700)]


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    """One key-value head: fewer than the devices of any mesh here."""
    return preset("tiny", Vocabulary(100, 20, 16), hidden_size=64, intermediate_size=96, num_layers=2, num_kv_heads=1)


@pytest.fixture(scope="module")
def parameters(make_trainer: Callable[..., Any], model: ModelConfig) -> dict[str, np.ndarray]:
    """Far enough from a fresh model, which says the same token again and again, that what is written differs."""
    random = np.random.default_rng(5)

    def disturbed(name: str, x: np.ndarray) -> np.ndarray:
        much = 0.3 if "_proj" in name else 0.0
        return (x + much * random.standard_normal(x.shape)).astype(np.float32)

    fresh = make_trainer("8,1,1,1", rows=8, model=model).iter_parameters()
    return {name: disturbed(name, x) for name, x in fresh}


@pytest.fixture(scope="module")
def make(make_trainer: Callable[..., Any], model: ModelConfig, parameters: dict[str, np.ndarray]) -> Callable[..., Any]:
    """``make_trainer`` with these parameters."""

    def made(mesh: str, rows: int = 8, **options: Any) -> Any:
        trainer = make_trainer(mesh, rows=rows, model=model, **options)
        trainer.load_parameters(parameters)
        return trainer

    return made


@pytest.fixture(scope="module")
def oracle(parameters: dict[str, np.ndarray], model: ModelConfig) -> Callable[[Sequence[int]], np.ndarray]:
    """Logits ``[N,V]``."""

    def logits(ids: Sequence[int]) -> np.ndarray:
        row = pack_rows([[TokenSequence(np.array(ids), np.ones(len(ids)))]], len(ids))
        found: np.ndarray = llama_logits(parameters, model, ROPE, row)[0][:, model.vocabulary.slices["text"]]
        return found

    return logits


def rows_of(trainer: Any, count: int) -> Rows:
    return Rows(trainer, trainer.generator()._programs, count)


def logits_of(trainer: Any, rows: Rows) -> np.ndarray:
    """``[B,V]`` after the last token of each row."""
    head = dict(trainer.iter_parameters()).get("lm_head.weight")
    if head is None:
        head = dict(trainer.iter_parameters())["model.embed_tokens.weight"]
    found: np.ndarray = np.asarray(rows._ends) @ head[:100].T
    return found


@pytest.mark.parametrize(("mesh", "chunk"), [*((mesh, 200) for mesh in MESHES), (MESHES[-1], 8192)])
def test_unequal_prompts_in_chunks_equal_the_oracle(
    mesh: str, chunk: int, make: Callable[..., Any], oracle: Callable[..., np.ndarray]
) -> None:
    trainer = make(mesh, read_chunk=chunk)
    rows = rows_of(trainer, 8)
    prompts = [*PROMPTS, *PROMPTS[:1] * 5]
    rows.read(prompts)
    expected = np.stack([oracle(prompt)[-1] for prompt in prompts])
    np.testing.assert_allclose(logits_of(trainer, rows), expected, atol=1e-4)
    rows.read([[1, 2], [3], [4, 5, 6], *[[7]] * 5])
    expected = np.stack(
        [oracle(PROMPTS[0] + [1, 2])[-1], oracle(PROMPTS[1] + [3])[-1], oracle(PROMPTS[2] + [4, 5, 6])[-1]]
    )
    np.testing.assert_allclose(logits_of(trainer, rows)[:3], expected, atol=1e-4)


@pytest.mark.parametrize("way", ["_pass_q", "_pass_kv"])
@pytest.mark.parametrize("strategy", ["ring", "ulysses", "allgather"])
def test_both_ways_to_the_cache_equal_the_oracle(
    way: str, strategy: str, make: Callable[..., Any], oracle: Callable[..., np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    taken = []

    def over(*given: Any, how: Any) -> Any:
        taken.append(way)
        return getattr(reading, way)(*given, how)

    monkeypatch.setattr(compiled, "over_cache", over)
    trainer = make("2,1,1,4", read_chunk=256, attention={"strategy": strategy})
    rows = rows_of(trainer, 2)
    rows.read([PROMPTS[2], PROMPTS[1]])
    assert taken
    expected = np.stack([oracle(PROMPTS[2])[-1], oracle(PROMPTS[1])[-1]])
    np.testing.assert_allclose(logits_of(trainer, rows), expected, atol=1e-4)


def test_whichever_moves_fewer_bytes_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for way in ("_pass_q", "_pass_kv"):
        monkeypatch.setattr(reading, way, lambda *given, way=way: way)

    def taken(tokens: int, slots: int, ranks: int = 4) -> Any:
        kept = Pages(jnp.zeros((1, 2, slots, 16)), None)
        layer = reading.LayerCache(kept, kept, kept.slots, kept.slots)
        how = reading.Reading(None, ranks, None)  # type: ignore[arg-type]
        return reading.over_cache(jnp.zeros((1, tokens, 8, 16)), layer, None, None, how)  # type: ignore[arg-type]

    # 8 heads of queries out in float32 and of results back, against 2 heads of keys and of values: c·8·8 to T·2·2·4.
    assert [taken(64, 256), taken(65, 256), taken(65, 256, 1)] == ["_pass_q", "_pass_kv", "_pass_q"]


@pytest.mark.parametrize(
    ("mesh", "kind"),
    [("8,1,1,1", "compute"), ("4,1,1,2", "int8"), ("4,1,1,2", "bfloat16"), ("1,1,1,8", "compute"), ("1,1,1,8", "int8")],
)
def test_written_tokens_go_from_the_tail_into_pages(
    mesh: str, kind: str, make: Callable[..., Any], oracle: Callable[..., np.ndarray]
) -> None:
    """Over several pages: each token is the likeliest after all before it, as far as the cache's rounding can tell."""
    trainer = make(mesh, read_chunk=200, cache=kind)
    [written] = trainer.generator().generate(PROMPTS[1:2], SamplingSpec(max_new_tokens=3 * PAGE))
    logits = oracle(PROMPTS[1] + written)[len(PROMPTS[1]) - 1 : -1]
    missed = logits.max(axis=-1) - logits[np.arange(len(written)), written]
    assert len(written) == 3 * PAGE
    most, mean = {"compute": (1e-4, 1e-4), "bfloat16": (0.1, 0.01), "int8": (0.6, 0.06)}[kind]
    assert missed.max() < most * logits.std() and missed.mean() < mean * logits.std()


def test_eight_bits_lose_half_a_step_of_their_page() -> None:
    random = np.random.default_rng(0)
    x = (
        random.standard_normal((2, 3, 2 * PAGE, 8)).astype(np.float32)
        * np.array([1, 100, 0], np.float32)[:, None, None]
    )
    empty = Pages(jnp.zeros((2, 3, 4 * PAGE, 8), jnp.int8), jnp.zeros((2, 3, 4)))
    pages = put(empty, jnp.asarray(x), jnp.int32(PAGE))
    assert pages.slots.nbytes == x.nbytes * 2 // 4
    found = np.asarray(part(pages, jnp.int32(PAGE), 2 * PAGE, jnp.float32))
    paged = np.abs(x).reshape(2, 3, 2, -1).max(-1)
    assert (np.abs(found - x).reshape(2, 3, 2, -1).max(-1) <= paged / 127 / 2 * 1.001).all()
    assert not np.asarray(part(pages, 0, 4 * PAGE, jnp.float32))[:, :, [*range(PAGE), *range(3 * PAGE, 4 * PAGE)]].any()
    kept = put(pages, jnp.ones((2, 3, PAGE, 8)), jnp.int32(PAGE), jnp.bool_(False))
    assert all((one == two).all() for one, two in zip(pages, kept, strict=True))


def test_eight_bits_halve_the_pages_of_bfloat16(make: Callable[..., Any]) -> None:
    def size(kind: str) -> int:
        trainer = make("8,1,1,1", compute_dtype="bfloat16", cache=kind)
        rows = rows_of(trainer, 8)
        rows.read([PROMPTS[2]] * 8)
        return sum(x.nbytes for layer in rows._taken().layers for x in jax.tree.leaves((layer.k, layer.v)))

    assert size("compute") == size("bfloat16")
    assert 0.5 <= size("int8") / size("compute") < 0.51


@pytest.fixture(scope="module", params=["8,1,1,1", "1,1,2,4"])
def talker(request: pytest.FixtureRequest, make: Callable[..., Any]) -> Any:
    return make(request.param, read_chunk=200)


def test_a_session_equals_what_is_asked_at_once(talker: Any) -> None:
    generator, greedy = talker.generator(), SamplingSpec(max_new_tokens=6)
    session = generator.session()
    session.read(PROMPTS[1])
    first = list(session.stream(greedy))
    assert [first] == generator.generate([PROMPTS[1]], greedy)
    session.read(PROMPTS[0])
    whole = [*PROMPTS[1], *first, *PROMPTS[0]]
    assert list(session.tokens) == whole
    second = list(session.stream(greedy))
    assert [second] == generator.generate([whole], greedy)
    third = list(session.stream(greedy))
    assert [third] == generator.generate([[*whole, *second]], greedy)
    assert list(session.tokens) == [*whole, *second, *third]


def test_a_stream_that_is_left_leaves_a_usable_session(talker: Any) -> None:
    generator, greedy = talker.generator(), SamplingSpec(max_new_tokens=2 * PAGE)
    session = generator.session()
    session.read(PROMPTS[1])
    stream: Iterator[int] = session.stream(greedy)
    given = [next(stream) for _ in range(PAGE + 3)]
    stream.close()  # type: ignore[attr-defined]
    assert list(session.tokens) == [*PROMPTS[1], *given]
    session.read(PROMPTS[0])
    expected = generator.generate([[*PROMPTS[1], *given, *PROMPTS[0]]], SamplingSpec(max_new_tokens=4))
    assert [list(session.stream(SamplingSpec(max_new_tokens=4)))] == expected


def test_a_stop_id_does_not_join_the_session(talker: Any) -> None:
    session = talker.generator().session()
    session.read(PROMPTS[0])
    whole = list(talker.generator().stream(PROMPTS[0], SamplingSpec(max_new_tokens=6)))
    stop = next(n for n, token in enumerate(whole) if n and token not in whole[:n])
    assert list(session.stream(SamplingSpec(max_new_tokens=6, stop_ids=(whole[stop],)))) == whole[:stop]
    assert list(session.tokens) == [*PROMPTS[0], *whole[:stop]]
    assert list(session.stream(SamplingSpec(max_new_tokens=2))) == whole[stop : stop + 2]


def test_wrong_use_of_a_session(talker: Any) -> None:
    session = talker.generator().session()
    with pytest.raises(ShapeError, match="nothing was read"):
        session.stream(SamplingSpec())
    for bad in ([], [500], [-1]):
        with pytest.raises(ShapeError, match="prompt 0"):
            session.read(bad)
    session.read([1])
    with pytest.raises(ShapeError, match="modality 'sound'"):
        session.stream(SamplingSpec(modality="sound"))
    session.close()
    with pytest.raises(LwmError, match="was closed"):
        session.read([1])


def test_rows_that_were_interrupted_say_so(talker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Part of a step may have been done: its cache was given away."""
    session = talker.generator().session()
    session.read(PROMPTS[0])

    def interrupt(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Rows, "_read_few", interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.read([1])
    monkeypatch.undo()
    with pytest.raises(LwmError, match="interrupted"):
        session.read([1])


def test_attention_without_lse_reads_prompts_at_once(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from lwm_jax_ring.attention.backend import JaxRing

    trainer = make("8,1,1,1", read_chunk=200)
    monkeypatch.delattr(JaxRing, "forward")
    with pytest.raises(UnsupportedError, match=r"set trainer\.read_chunk"):
        trainer.generator().generate([PROMPTS[2]], SamplingSpec(max_new_tokens=1))


@pytest.mark.parametrize("slots", [1, 128, 129, 1024, 1025, 8192, 8193, 100_000, 1_000_003])
def test_room_is_little_more_than_asked(slots: int) -> None:
    found = reading.room(slots)
    assert slots <= found and found % PAGE == 0
    assert found - slots < max(PAGE if slots <= reading.AT_ONCE else reading.FEW_BLOCK, slots / 8)
    assert found % reading.block_of(found) == 0 and reading.block_of(found) % PAGE == 0
    assert found <= reading.AT_ONCE or found % reading.FEW_BLOCK == 0


def test_long_caches_are_seen_in_blocks(
    make: Callable[..., Any], oracle: Callable[..., np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As of ten thousand tokens, at a size for tests."""
    for name, value in (("BLOCK", PAGE), ("AT_ONCE", 2 * PAGE), ("FEW_BLOCK", 2 * PAGE)):
        monkeypatch.setattr(reading, name, value)
    trainer = make("4,1,1,2", read_chunk=200)
    [written] = trainer.generator().generate(PROMPTS[2:], SamplingSpec(max_new_tokens=4))
    logits = oracle(PROMPTS[2] + written)[len(PROMPTS[2]) - 1 : -1]
    assert written == logits.argmax(axis=-1).tolist()
