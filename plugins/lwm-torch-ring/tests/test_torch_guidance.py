"""Guided sessions against an oracle that reads both prompts anew for every token, and against unguided ones.

Shapes: N tokens, V ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from torch_cases import ROPE, make_trainer, model

from lwm_core.batch import TokenSequence, pack_rows
from lwm_core.errors import LwmError, ShapeError, UnsupportedError
from lwm_core.frames import frame_codes
from lwm_core.protocols import SamplingSpec
from lwm_core.reference import llama_logits
from lwm_core.run.vision import ClipWriter, VisionPrompt, _seed
from lwm_core.vocab import Vocabulary

CODES = (100, 116)
CONDITIONAL, UNCONDITIONAL = np.random.default_rng(1).integers(0, 100, 23).tolist(), [3, 5]
DRAWN: dict[str, Any] = {"temperature": 1.0, "top_k": 9, "seed": 4}


class Model(NamedTuple):
    """A generator and the parameters that it uses."""

    generator: Any
    parameters: dict[str, np.ndarray]


def noisy(change: Callable[[dict[str, np.ndarray]], None] = lambda _: None, **options: Any) -> Model:
    """Far enough from a fresh model that its tokens differ."""
    trainer, random = make_trainer(**options), np.random.default_rng(5)
    parameters = {
        name: (x + 0.2 * random.standard_normal(x.shape)).astype(np.float32) for name, x in trainer.iter_parameters()
    }
    change(parameters)
    trainer.load_parameters(parameters)
    return Model(trainer.generator(), parameters)


@pytest.fixture(scope="module")
def alone() -> Model:
    return noisy()


def vision(count: int = 6, **more: Any) -> SamplingSpec:
    return SamplingSpec(count, modality="vision", ids=CODES, **more)


def guided(model: Model) -> Any:
    session = model.generator.session(guided=True)
    session.read(CONDITIONAL, UNCONDITIONAL)
    return session


def unguided(model: Model, prompt: Sequence[int]) -> Any:
    session = model.generator.session()
    session.read(prompt)
    return session


def oracle(parameters: Any, ids: list[int]) -> np.ndarray:
    """Logits ``[V]`` of the codes after the last."""
    row = pack_rows([[TokenSequence(np.array(ids), np.ones(len(ids)))]], len(ids))
    found: np.ndarray = llama_logits(parameters, model(), ROPE, row)[0][-1, slice(*CODES)]
    return found


def test_a_scale_is_the_oracles(alone: Model) -> None:
    parameters = {name: x.astype(np.float64) for name, x in alone.parameters.items()}
    written = []
    for scale in (5.0, 0.5, -1.0):
        session, new = guided(alone), []
        for token in session.stream(vision(guidance=scale)):
            c, u = (oracle(parameters, [*prompt, *new]) for prompt in (CONDITIONAL, UNCONDITIONAL))
            assert token == CODES[0] + int((u + scale * (c - u)).argmax())
            new.append(token)
        assert len(new) == 6 and list(session.tokens) == CONDITIONAL + new
        written.append(new)
    assert len(set(map(tuple, written))) > 1, "scales differ"


@pytest.mark.parametrize("how", [{}, DRAWN])
@pytest.mark.parametrize("cache", ["compute", "int8"])
def test_scale_1_is_conditional_and_scale_0_is_unconditional(cache: str, how: dict[str, Any]) -> None:
    model = noisy(cache=cache, read_chunk=16)
    for scale, prompt in ((1.0, CONDITIONAL), (0.0, UNCONDITIONAL)):
        told = list(guided(model).stream(vision(guidance=scale, **how)))
        assert told == list(unguided(model, prompt).stream(vision(**how)))
        assert told == list(model.generator.stream(prompt, vision(**how)))


@pytest.mark.parametrize("cache", ["compute", "int8"])
def test_without_its_second_row_a_session_is_as_if_it_had_none(cache: str) -> None:
    """Over full pages, which are kept in eight bits, and a last one that is not full; a token is not read yet."""
    model, prompt = noisy(cache=cache, read_chunk=64), CONDITIONAL * 7
    pair, plain = model.generator.session(guided=True), unguided(model, prompt)
    pair.read(prompt, UNCONDITIONAL)
    for _ in range(2):
        assert list(pair.stream(vision(3))) == list(plain.stream(vision(3)))
        pair.unguide()
        for session in (pair, plain):
            session.read([7, 8])
    assert pair._row._rows._layers[0].used == [len(prompt) + 5 + 5]
    with pytest.raises(UnsupportedError, match="guidance is 2"):
        pair.stream(vision(guidance=2.0))


@pytest.mark.parametrize("how", [{}, DRAWN])
def test_turns_go_on_as_one_prompt_would(how: dict[str, Any], alone: Model) -> None:
    """With other settings, with what both rows read, and with what one reads alone; nothing is read again."""
    session = guided(alone)
    first = list(session.stream(vision(4, guidance=5.0, **how)))
    session.read([116])
    session.read([7, 8, 9], [2])
    then = list(session.stream(vision(4, guidance=2.0, **how)))
    anew = alone.generator.session(guided=True)
    anew.read([*CONDITIONAL, *first, 116, 7, 8, 9], [*UNCONDITIONAL, *first, 116, 2])
    assert then == list(anew.stream(vision(4, guidance=2.0, **how)))
    assert list(session.tokens) == [*CONDITIONAL, *first, 116, 7, 8, 9, *then]


def test_a_clip_goes_on_after_its_first_frame_as_from_anew(alone: Model) -> None:
    """Guided, then not, then without the second row, in one session: each 5th token is a delimiter, nothing is lost."""
    vocabulary = Vocabulary(100, 20, 16)
    writer = ClipWriter(alone.generator, vocabulary, 4)
    writer.begin(VisionPrompt(tuple(CONDITIONAL), tuple(UNCONDITIONAL)), guided=True, frames=3)
    first, later = SamplingSpec(temperature=1.0, guidance=5.0, seed=2), SamplingSpec(temperature=1.0, top_k=5, seed=2)
    codes = [*writer.write(1, first), *writer.write(1, later)]
    writer.unguide()
    codes += writer.write(1, later)
    clip = writer.end()[len(CONDITIONAL) :]
    assert [clip[at] for at in (4, 9, 14)] == [vocabulary.eof, vocabulary.eof, vocabulary.eov] and len(clip) == 15
    assert np.array_equal(frame_codes(np.array(clip), vocabulary, 4), np.stack(codes))
    anew = unguided(alone, [*CONDITIONAL, *clip[:10]])
    asked = replace(later, max_new_tokens=4, modality="vision", ids=CODES, seed=_seed(2, 2))
    assert list(anew.stream(asked)) == clip[10:14]


def test_codes_alone_are_drawn_whatever_is_likely() -> None:
    """The delimiters and reserved ids are made by far the likeliest."""

    def tempting(parameters: dict[str, np.ndarray]) -> None:
        head = parameters.get("lm_head.weight", parameters["model.embed_tokens.weight"])
        head[116:] = 50.0 * head[116:]

    model = noisy(tempting)
    for how in ({}, {"temperature": 5.0, "top_k": 1000, "seed": 2}):
        free = list(model.generator.stream(CONDITIONAL, SamplingSpec(6, modality="vision", **how)))
        assert any(token >= CODES[1] for token in free), "the case is as hard as it says"
        for scale in (1.0, 4.0):
            told = list(guided(model).stream(vision(12, guidance=scale, **how)))
            assert all(CODES[0] <= token < CODES[1] for token in told) and len(told) == 12


def test_wrong_use_is_told(alone: Model) -> None:
    generator, plain = alone.generator, unguided(alone, CONDITIONAL)
    plain.unguide()
    with pytest.raises(UnsupportedError, match="no unconditional row; open session"):
        plain.read([1], [2])
    for ask in (lambda s: generator.generate([[1]], s), lambda s: list(generator.stream([1], s)), plain.stream):
        with pytest.raises(UnsupportedError, match="guidance is 2, but there is no unconditional row"):
            ask(SamplingSpec(2, guidance=2.0))
    for ids in ((99, 116), (100, 121), (105, 105)):
        with pytest.raises(ShapeError, match=r"expected some of modality 'vision', \[100, 120\)"):
            plain.stream(SamplingSpec(2, modality="vision", ids=ids))
    pair = guided(alone)
    for wrong in (([1], []), ([], [1]), ([1], [120])):
        with pytest.raises(ShapeError, match="prompt"):
            pair.read(*wrong)
    assert list(pair.tokens) == CONDITIONAL
    late = pair.stream(vision(guidance=3.0))
    first = next(late)
    pair.read([4])
    with pytest.raises(LwmError, match="went on without this stream"):
        next(late)
    assert list(pair.tokens) == [*CONDITIONAL, first, 4]
