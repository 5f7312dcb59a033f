"""The video needle suite with stand-ins that see, that always say the same, and that know nothing.

The encoder has 512 codes, 16 a frame; text ids are bytes, vision ids 259 to 770, eof 771, eov 772.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from lwm_core.builtins.byte_tokens import BytesTokenizer
from lwm_core.errors import DataError, LwmError, ShapeError
from lwm_core.frames import frame_codes
from lwm_core.protocols import ChecksSetup, EvalContext
from lwm_core.vocab import Vocabulary
from lwm_evals import VideoNeedleOptions, VideoNeedleSuite
from lwm_evals.pictures import answers, pictures
from lwm_evals.video_needle import FIELDS, likeliest
from lwm_evals.video_questions import said_first

VOCABULARY = Vocabulary(259, 520, 512)
TOKENIZER = BytesTokenizer()
WORDS = answers("colour")
SMALL = VideoNeedleOptions(frames=(3, 9), samples=8, samples_longest=8, depths=3, batch_tokens=600)

Say = Callable[[Sequence[int]], str]


class Seer:
    """Reads a prompt's frames, and knows the pictures: what it says of the one it finds is up to ``say``."""

    def __init__(self, encoder: Any, asked: Any = "colour") -> None:
        told, frames = pictures(asked, encoder.frame_size)
        self.known = {tuple(code): word for code, word in zip(encoder.encode(frames).tolist(), told, strict=True)}
        encoder.encoded.clear()

    def frames(self, prompt: Sequence[int]) -> NDArray[np.int32]:
        return frame_codes(np.array([i for i in prompt if i >= 259], np.int32), VOCABULARY, 16)

    def places(self, prompt: Sequence[int]) -> list[int]:
        return [i for i, codes in enumerate(self.frames(prompt).tolist()) if tuple(codes) in self.known]

    def answer(self, prompt: Sequence[int]) -> str:
        return self.known[tuple(self.frames(prompt)[self.places(prompt)[0]].tolist())]


class Speaker:
    """A generator that says what ``say`` makes of the prompt's ids."""

    def __init__(self, say: Say) -> None:
        self.say, self.prompts, self.batches = say, [], []  # type: ignore[var-annotated]

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Any) -> list[list[int]]:
        assert sampling.temperature == 0 and sampling.stop_ids == (257,) and sampling.modality == "text"
        self.batches.append(len(prompts))
        self.prompts += [list(prompt) for prompt in prompts]
        return [TOKENIZER.encode(self.say(prompt))[: sampling.max_new_tokens] for prompt in prompts]


class Judge:
    """A scorer that gives each token of the answer ``say`` makes of the prompt ``right`` nats, and all others -5."""

    def __init__(self, say: Say, right: float = -0.1) -> None:
        self.say, self.right = say, right
        self.asked: list[list[int]] = []

    def log_likelihood(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        self.asked.append(list(tokens))
        found = np.full(len(tokens) - 1, -5.0, np.float32)
        cut = bytes(i for i in tokens if i < 256).rindex(b" ASSISTANT:") + len(b" ASSISTANT:")
        text = [place for place, i in enumerate(tokens) if i < 256][cut:]
        word = self.say(tokens[: text[0]]) if text else ""
        if bytes(tokens[i] for i in text).decode() == f" {word}":
            found[text[0] - 1 :] = self.right
        return found


@pytest.fixture
def seer(encoder: Any) -> Seer:
    return Seer(encoder)


@pytest.fixture
def make(make_context: Callable[..., EvalContext], encoder: Any, seer: Seer, tmp_path: Path) -> Callable[..., Any]:
    def build(say: Say | None = None, **changes: Any) -> EvalContext:
        say = say or (lambda prompt: f" {seer.answer(prompt)}.")
        out = tmp_path / "run" / "evals" / "video-needle"
        values = {"generator": Speaker(say), "scorer": Judge(lambda prompt: seer.answer(prompt)), "encoder": encoder,
                  "vocabulary": VOCABULARY, "out": out}  # fmt: skip
        return make_context(**{**values, **changes})

    return build


def results(context: EvalContext) -> dict[str, Any]:
    return dict(json.loads(Path(f"{context.out}.json").read_text()))


def test_who_sees_scores_one(make: Any) -> None:
    context = make()
    summary = VideoNeedleSuite(SMALL).run(context)
    around = len(
        "You are a helpful assistant. USER: What colour is the shape in the video?\n<vision></vision> ASSISTANT:"
    )
    lengths = [1 + around + 17 * frames + 16 for frames in (3, 9)]
    assert summary == [
        {"stage": "base", "frames": frames, "length": length, "accuracy": 1.0, "choice_accuracy": 1.0,
         "chance": 1 / 8, "samples": 8}
        for frames, length in zip((3, 9), lengths, strict=True)
    ]  # fmt: skip
    found = results(context)
    assert found["summary"] == summary
    assert all(tuple(row) == FIELDS and row["correct"] is True and row["retrieved"] == 1 for row in found["rows"])
    assert all(row["response"] == f" {row['answer']}." and row["choice"] == row["answer"] for row in found["rows"])


def test_who_is_wrong_or_silent_scores_nothing(make: Any, seer: Seer, tmp_path: Path) -> None:
    def other(prompt: Sequence[int]) -> str:
        return WORDS[(WORDS.index(seer.answer(prompt)) + 3) % 8]

    for name, say in (("wrong", other), ("silent", lambda prompt: "")):
        context = make(say, scorer=Judge(other), out=tmp_path / name)
        summary = VideoNeedleSuite(SMALL).run(context)
        assert [(row["accuracy"], row["choice_accuracy"]) for row in summary] == [(0.0, 0.0)] * 2


@pytest.mark.parametrize("scorer", [Judge(lambda prompt: "pink"), Judge(lambda prompt: "red", right=-5.0)])
def test_who_always_chooses_the_same_is_right_as_often_as_chance_says(make: Any, scorer: Judge) -> None:
    """Once among the eight of every turn: the second cannot tell the words apart, so the shortest has the most."""
    options = SMALL.model_copy(update={"samples": 24, "samples_longest": 24})
    context = make(lambda prompt: " It is pink", scorer=scorer)
    for row in VideoNeedleSuite(options).run(context):
        assert row["accuracy"] == row["choice_accuracy"] == row["chance"] == 1 / 8
    assert len({row["choice"] for row in results(context)["rows"]}) == 1


def test_the_prompt_is_lwms_around_whole_frames(make: Any, seer: Seer) -> None:
    context = make()
    VideoNeedleSuite(SMALL).run(context)
    for prompt in context.generator.prompts:
        vision = [place for place, i in enumerate(prompt) if i >= 259]
        first, last = vision[0], vision[-1]
        assert vision == list(range(first, last + 1)) and prompt[0] == 256
        before = "You are a helpful assistant. USER: What colour is the shape in the video?\n<vision>"
        assert TOKENIZER.decode(prompt[1:first]) == before
        assert TOKENIZER.decode(prompt[last + 1 :]) == "</vision> ASSISTANT:"
        assert prompt[last] == 772 and prompt[first:last].count(771) == len(seer.frames(prompt)) - 1


@pytest.mark.parametrize(("frames", "shown", "expected"), [
    (9, 1, [0, 2, 4, 6, 8]), (9, 3, [0, 2, 3, 4, 6]), (1, 1, [0] * 5), (4, 4, [0] * 5), (6, 1, [0, 1, 2, 4, 5]),
])  # fmt: skip
def test_the_needle_lies_at_its_depth_and_nowhere_else(
    make: Any, seer: Seer, frames: int, shown: int, expected: list[int]
) -> None:
    """round(depth · (T - k)) for depths 0, ¼, ½, ¾ and 1; halves go to the even one."""
    options = VideoNeedleOptions(
        frames=(frames,), needle_frames=shown, depths=5, samples=5, samples_longest=5, choose=False
    )
    context = make()
    VideoNeedleSuite(options).run(context)
    rows = results(context)["rows"]
    assert [row["place"] for row in rows] == expected
    assert [row["depth"] for row in rows] == [0.0, 0.25, 0.5, 0.75, 1.0]
    for prompt, row in zip(context.generator.prompts, rows, strict=False):
        assert seer.places(prompt) == list(range(row["place"], row["place"] + shown))
        assert len(seer.frames(prompt)) == row["frames"] == frames


def test_answers_take_turns_and_depths_go_round(make: Any) -> None:
    options = SMALL.model_copy(update={"samples": 48, "samples_longest": 48, "choose": False})
    context = make()
    VideoNeedleSuite(options).run(context)
    for frames in (3, 9):
        rows = [row for row in results(context)["rows"] if row["frames"] == frames]
        turns = [[row["answer"] for row in rows[at : at + 8]] for at in range(0, 48, 8)]
        assert all(sorted(turn) == sorted(WORDS) for turn in turns)
        assert len({tuple(turn) for turn in turns}) == 6, "each turn in another order"
        assert set(Counter(row["depth"] for row in rows).values()) == {16}


def test_every_stage_is_asked_the_same_and_nothing_is_encoded_twice(make: Any, encoder: Any) -> None:
    suite = VideoNeedleSuite(SMALL)
    first, second = make(stage="base"), make(stage="512")
    suite.run(first)
    suite.run(second)
    VideoNeedleSuite(SMALL).run(make(stage="1024"))  # another process would find the codes on disk
    assert first.generator.prompts == second.generator.prompts
    assert encoder.encoded == [8 * 8 + 128]
    assert list(dict.fromkeys(row["stage"] for row in results(first)["rows"])) == ["base", "512", "1024"]


def test_codes_that_are_damaged_or_of_another_encoder_are_made_again(make: Any, encoder: Any) -> None:
    context = make()
    VideoNeedleSuite(SMALL).run(context)
    kept = Path(f"{context.out}.codes.npz")
    whole = kept.read_bytes()
    for damage in (b"", whole[:200], b"PK\x03\x04" + whole[4:60]):
        kept.write_bytes(damage)
        VideoNeedleSuite(SMALL).run(make())
    assert encoder.encoded == [192] * 4 and kept.read_bytes() == whole
    encoder.checksum = "d" * 64
    again = make()
    VideoNeedleSuite(SMALL).run(again)
    assert encoder.encoded == [192] * 5
    assert len({tuple(prompt) for prompt in again.generator.prompts}) == 16, "other codes are other questions"
    assert len(list(kept.parent.glob("video-needle.*.jsonl"))) == 1


def test_killed_between_batches_it_repeats_none(make: Any) -> None:
    class KilledError(Exception):
        """Stands for kill -9."""

    calls = 0

    def dies(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KilledError

    context = make(progress=dies)
    with pytest.raises(KilledError):
        VideoNeedleSuite(SMALL).run(context)
    journal = Path(f"{context.out}.jsonl")
    done = journal.read_text().count("\n")
    assert 0 < done < 16 and not Path(f"{context.out}.json").exists()
    journal.write_bytes(journal.read_bytes() + b'{"stage": "ba')
    again = make()
    VideoNeedleSuite(SMALL).run(again)
    known = {tuple(prompt) for prompt in context.generator.prompts}
    assert not known & {tuple(prompt) for prompt in again.generator.prompts}
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert len({(row["length"], row["sample"]) for row in lines}) == len(lines) == 16
    whole = results(again)
    VideoNeedleSuite(SMALL).run(make(out=context.out.with_name("undisturbed")))
    assert whole == results(make(out=context.out.with_name("undisturbed")))
    last = make()
    assert VideoNeedleSuite(SMALL).run(last) == whole["summary"] and last.generator.prompts == []


def test_batches_are_filled_up_and_within_the_limit(make: Any) -> None:
    """A clip of 9 frames is 265 tokens long: two fit 600, and five samples are three batches of two."""
    context = make()
    options = SMALL.model_copy(update={"frames": (9,), "samples_longest": 5})
    VideoNeedleSuite(options).run(context)
    assert context.generator.batches == [2, 2, 2] and len(results(context)["rows"]) == 5


def test_the_likelihood_is_that_of_the_whole_answer() -> None:
    """Prompt [7]; answers [1, 2] at -1 and -3, [3] at -3.5, [4, 5, 6] at -1 each: the last one wins with -3."""
    table = {(7, 1, 2): [-1.0, -3.0], (7, 3): [-3.5], (7, 4, 5, 6): [-1.0, -1.0, -1.0]}

    class Table:
        def log_likelihood(self, tokens: Sequence[int]) -> NDArray[np.float32]:
            return np.array(table[tuple(tokens)], np.float32)

    assert likeliest(Table(), [7], [[1, 2], [3], [4, 5, 6]]) == 2
    assert likeliest(Table(), [7], [[1, 2], [3]]) == 1


def test_what_is_scored_is_the_prompt_and_each_word_with_its_end(make: Any) -> None:
    context = make()
    VideoNeedleSuite(SMALL.model_copy(update={"frames": (3,), "samples_longest": 1})).run(context)
    [prompt] = context.generator.prompts
    assert context.scorer.asked == [[*prompt, *TOKENIZER.encode(f" {word}"), 257] for word in WORDS]


def test_without_choosing_nothing_is_scored(make: Any) -> None:
    context = make(scorer=None)
    summary = VideoNeedleSuite(SMALL.model_copy(update={"choose": False})).run(context)
    assert all("choice_accuracy" not in row and row["accuracy"] == 1.0 for row in summary)
    assert {row["choice"] for row in results(context)["rows"]} == {None}


@pytest.mark.parametrize(
    ("response", "said"),
    [
        (" red", "red"), (" Red.", "red"), ("It is pink, not red", "pink"), (" reddish", None), ("", None),
        ("infrared", None), (" dark-blue", "blue"), ("\nBLUE red", "blue"), (" colour: 7", None),
    ],
)  # fmt: skip
def test_the_first_word_that_may_be_an_answer_counts(response: str, said: str | None) -> None:
    assert said_first(WORDS, response) == said


def test_digits_are_whole_numbers() -> None:
    assert said_first(answers("digit"), " 17 or 7") == "7"


def test_clips_are_as_long_as_the_stages_by_default(make: Any) -> None:
    """103 tokens of text and 17 a frame: 384 holds 15 frames and an answer of 16, 512 holds 23, 1024 holds 53."""
    summary = VideoNeedleSuite(SMALL.model_copy(update={"frames": None, "choose": False})).run(make())
    assert [row["frames"] for row in summary] == [(n - 119) // 17 for n in (384, 512, 1024)] == [15, 23, 53]
    assert [row["length"] for row in summary] == [119 + 17 * frames for frames in (15, 23, 53)]
    with pytest.raises(DataError, match="take 136 tokens, but the longest stage has 120; use a longer one"):
        VideoNeedleSuite().run(make(stages=[], start_seq_len=120))
    with pytest.raises(DataError, match="set frames in"):
        VideoNeedleSuite().run(make(stages=[], start_seq_len=None))


@pytest.mark.parametrize("trained", [False, True])
def test_needles_may_be_hidden_in_codes_of_a_folder(make: Any, seer: Seer, write_shards: Any, trained: bool) -> None:
    """Eleven frames of their own, read round again; the seer finds the needle, the rest are the folder's in order.

    Of a folder that is trained on, the clips that are held out are all there is.
    """
    clips = {"a": np.arange(80).reshape(5, 16) % 512, "b": 300 + np.arange(96).reshape(6, 16)}
    between = {"seen": np.full((4, 16), 511)} if trained else {}
    folder = write_shards("codes", {"a": clips["a"], **between, "b": clips["b"]})
    options = SMALL.model_copy(update={"haystack": folder.name, "frames": (14,), "depths": (0.0, 1.0)})
    context = make(held_out_clips={folder.resolve(): ["b", "a"]} if trained else {})
    VideoNeedleSuite(options).run(context)
    rows = np.concatenate(list(clips.values())).tolist()
    starts = set()
    for prompt in context.generator.prompts[:8]:
        [place] = seer.places(prompt)
        hay = [codes for i, codes in enumerate(seer.frames(prompt).tolist()) if i != place]
        start = rows.index(hay[0])
        assert hay == [rows[(start + i) % 11] for i in range(13)]
        starts.add(start)
    assert len(starts) > 2
    assert context.encoder.encoded == [64], "no background is drawn"
    assert folder.is_dir()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"haystack": "missing"}, DataError, "video-needle: haystack .*missing: is no folder of codes"),
        ({"haystack": "seen"}, DataError, "haystack .*seen is trained on and none of its clips is held out; set held"),
        ({"haystack": "other"}, DataError, "are of a:b eeeeeeeeeeee, but the run's encoder is cccccccccccc"),
        ({"frames": (4, 2), "needle_frames": 3}, ShapeError, "2 frames has no room for needle_frames = 3"),
        ({"frames": None, "needle_frames": 60}, DataError, r"60 frame\(s\) and answer take 1139 tokens"),
    ],
)
def test_wrong_use_is_one_line_before_the_first_step_and_after(
    make: Any, write_shards: Any, options: dict[str, Any], error: type[LwmError], message: str
) -> None:
    write_shards("other", {"a": [[1] * 16]}, checksum="e" * 64)
    seen = write_shards("seen", {"a": [[1] * 16]})
    suite, context = VideoNeedleSuite(SMALL.model_copy(update=options)), make(held_out_clips={seen.resolve(): []})
    assert isinstance(suite, ChecksSetup)
    for call in (suite.check, suite.run):
        with pytest.raises(error, match=message) as caught:
            call(context)
        assert "\n" not in str(caught.value)
    assert not context.out.parent.exists() and context.encoder.encoded == []


@pytest.mark.parametrize("options", [{"asked": "size"}, {"depths": []}, {"needle_frames": 0}, {"frame": [3]}])
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        VideoNeedleOptions.model_validate(options)


@pytest.mark.parametrize("asked", ["shape", "digit"])
def test_shapes_and_digits_are_asked_for_too(make: Any, encoder: Any, asked: Any, tmp_path: Path) -> None:
    seer = Seer(encoder, asked)
    context = make(lambda prompt: seer.answer(prompt), scorer=None, out=tmp_path / asked)
    options = SMALL.model_copy(update={"asked": asked, "choose": False, "frames": (3,)})
    [row] = VideoNeedleSuite(options).run(context)
    assert row["accuracy"] == 1.0 and row["chance"] == 1 / len(answers(asked))


def test_drawn_figures_are_svg(make: Any) -> None:
    suite, context = VideoNeedleSuite(SMALL), make()
    assert suite.draw(context.out) == {}
    suite.run(context)
    suite.run(make(stage="512"))
    drawn = suite.draw(context.out)
    assert list(drawn) == [
        "Video needle: base", "Video needle: 512", "Video needle accuracy", "Video needle by likelihood"
    ]  # fmt: skip
    assert all(data.startswith(b"<?xml") and b"clip, frames" in data for data in drawn.values())
    assert b"chance" in drawn["Video needle accuracy"]
