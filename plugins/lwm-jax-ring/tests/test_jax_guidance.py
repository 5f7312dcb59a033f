"""Guided sessions against an oracle that reads both prompts anew for every token, and against unguided ones.

Shapes: N tokens, V ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax_cases import ROPE

from lwm_core.batch import TokenSequence, pack_rows
from lwm_core.errors import ShapeError, UnsupportedError
from lwm_core.frames import frame_codes
from lwm_core.model import preset
from lwm_core.protocols import SamplingSpec
from lwm_core.reference import llama_logits
from lwm_core.run.vision import ClipWriter, VisionPrompt, _seed
from lwm_core.vocab import Vocabulary

CODES = (100, 116)
CONDITIONAL, UNCONDITIONAL = np.random.default_rng(1).integers(0, 100, 23).tolist(), [3, 5]
DRAWN: dict[str, Any] = {"temperature": 1.0, "top_k": 9, "seed": 4}
SMALL = preset("tiny", Vocabulary(100, 20, 16), hidden_size=32, intermediate_size=48, num_layers=1)
"""One layer, both modalities."""


class Model(NamedTuple):
    """A generator, which keeps what it has compiled, and the parameters."""

    generator: Any
    parameters: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def on_mesh(make_trainer: Callable[..., Any]) -> Iterator[Callable[..., Model]]:
    """A model on a mesh of the first so many devices, far enough from a fresh one that its tokens differ."""
    everyone = jax.devices()

    def made(mesh: str, count: int, change: Callable[[dict[str, np.ndarray]], None] = lambda _: None) -> Model:
        patch.setattr(jax, "devices", lambda: everyone[:count])
        trainer, random = make_trainer(mesh, model=SMALL), np.random.default_rng(5)
        parameters = {
            name: (x + 0.2 * random.standard_normal(x.shape)).astype(np.float32)
            for name, x in trainer.iter_parameters()
        }
        change(parameters)
        trainer.load_parameters(parameters)
        return Model(trainer.generator(), parameters)

    with pytest.MonkeyPatch.context() as patch:
        yield made


@pytest.fixture(scope="module")
def alone(on_mesh: Callable[..., Model]) -> Model:
    return on_mesh("1,1,1,1", 1)


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
    found: np.ndarray = llama_logits(parameters, SMALL, ROPE, row)[0][-1, slice(*CODES)]
    return found


@pytest.mark.parametrize(("mesh", "count"), [("1,1,1,1", 1), pytest.param("2,1,1,2", 4, marks=pytest.mark.slow)])
def test_a_scale_is_the_oracles(mesh: str, count: int, on_mesh: Callable[..., Model], alone: Model) -> None:
    """On one device, and where each of two data ranks holds a pair whose tokens lie on two devices."""
    model = alone if count == 1 else on_mesh(mesh, count)
    parameters = {name: x.astype(np.float64) for name, x in model.parameters.items()}
    written = []
    for scale in (5.0, -1.0) if count == 1 else (5.0,):
        session, new = guided(model), []
        for token in session.stream(vision(guidance=scale)):
            c, u = (oracle(parameters, [*prompt, *new]) for prompt in (CONDITIONAL, UNCONDITIONAL))
            assert token == CODES[0] + int((u + scale * (c - u)).argmax())
            new.append(token)
        assert len(new) == 6 and list(session.tokens) == CONDITIONAL + new
        written.append(new)
    session.unguide()
    read = list(session.tokens)
    assert list(session.stream(vision(2))) == list(unguided(model, read).stream(vision(2)))
    assert len(set(map(tuple, written))) == len(written), "scales differ"


@pytest.mark.parametrize("how", [{}, DRAWN])
def test_scale_1_is_conditional_and_scale_0_is_unconditional(how: dict[str, Any], alone: Model) -> None:
    model = alone
    for scale, prompt in ((1.0, CONDITIONAL), (0.0, UNCONDITIONAL)):
        told = list(guided(model).stream(vision(guidance=scale, **how)))
        assert told == list(unguided(model, prompt).stream(vision(**how)))


def test_turns_go_on_as_one_prompt_would(alone: Model) -> None:
    """With other settings, with what both rows read, and with what one reads alone; nothing is read again."""
    model = alone
    session = guided(model)
    first = list(session.stream(vision(4, guidance=5.0, **DRAWN)))
    session.read([116])
    session.read([7, 8, 9], [2])
    then = list(session.stream(vision(4, guidance=2.0, **DRAWN)))
    anew = model.generator.session(guided=True)
    anew.read([*CONDITIONAL, *first, 116, 7, 8, 9], [*UNCONDITIONAL, *first, 116, 2])
    assert then == list(anew.stream(vision(4, guidance=2.0, **DRAWN)))
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


def test_codes_alone_are_drawn_whatever_is_likely(on_mesh: Callable[..., Model]) -> None:
    """The delimiters and reserved ids are made by far the likeliest."""

    def tempting(parameters: dict[str, np.ndarray]) -> None:
        head = parameters["model.embed_tokens.weight"]  # tied
        head[116:] = 50.0 * head[116:]

    model = on_mesh("1,1,1,1", 1, tempting)
    how: dict[str, Any] = {"temperature": 5.0, "top_k": 1000, "seed": 2}
    free = list(model.generator.stream(CONDITIONAL, SamplingSpec(6, modality="vision", **how)))
    assert any(token >= CODES[1] for token in free), "the case is as hard as it says"
    told = list(guided(model).stream(vision(40, guidance=4.0, **how)))
    assert all(CODES[0] <= token < CODES[1] for token in told) and len(told) == 40


def test_wrong_use_is_told(alone: Model) -> None:
    model, generator = alone, alone.generator
    plain = unguided(model, CONDITIONAL)
    plain.unguide()
    with pytest.raises(UnsupportedError, match="no unconditional row; open session"):
        plain.read([1], [2])
    for ask in (lambda s: generator.generate([[1]], s), lambda s: list(generator.stream([1], s)), plain.stream):
        with pytest.raises(UnsupportedError, match="guidance is 2, but there is no unconditional row"):
            ask(SamplingSpec(2, guidance=2.0))
    for ids in ((99, 116), (100, 121), (105, 105)):
        with pytest.raises(ShapeError, match=r"expected some of modality 'vision', \[100, 120\)"):
            plain.stream(SamplingSpec(2, modality="vision", ids=ids))
    pair = guided(model)
    for wrong in (([1], []), ([], [1]), ([1], [120])):
        with pytest.raises(ShapeError, match="prompt"):
            pair.read(*wrong)
    assert list(pair.tokens) == CONDITIONAL
