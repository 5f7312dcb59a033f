"""The loss of the next frame against the scorer's own log-likelihoods, added up by hand.

Codes are of 512 entries, four a frame: ids 259 to 770, eof 771, eov 772; ``<vision>`` is 8 bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from lwm_core.errors import DataError, LwmError, ShapeError
from lwm_core.protocols import ChecksSetup, EvalContext
from lwm_core.shards import Settings, open_shards
from lwm_core.vocab import Vocabulary
from lwm_evals import VideoLossOptions, VideoLossSuite
from lwm_evals.video_loss import FIELDS, target

VOCABULARY = Vocabulary(259, 520, 512)
START = [256, *b"<vision>"]
SMALL = VideoLossOptions(path="codes", frames=(1, 2, 4), samples=5)


def number(prefix: Sequence[int]) -> float:
    """Minus a log-likelihood that depends on every token before and on the token itself."""
    return math.sin(sum((k + 1) * i for k, i in enumerate(prefix[-30:]))) + 2


class Odd:
    """A scorer of :func:`number`."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def log_likelihood(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        self.asked.append(list(tokens))
        return -np.array([number(tokens[: end + 1]) for end in range(1, len(tokens))], np.float32)


@pytest.fixture
def clips(write_shards: Any) -> dict[str, NDArray[np.int64]]:
    random = np.random.default_rng(4)
    found = {name: random.integers(0, 512, (frames, 4)) for name, frames in (("a", 7), ("short", 3), ("b", 6))}
    write_shards("codes", found)
    return found


@pytest.fixture
def make(make_context: Callable[..., EvalContext], tmp_path: Path) -> Callable[..., EvalContext]:
    def build(**changes: Any) -> EvalContext:
        out = tmp_path / "run" / "evals" / "video-loss"
        return make_context(**{"scorer": Odd(), "generator": None, "vocabulary": VOCABULARY, "out": out, **changes})

    return build


def results(context: EvalContext) -> dict[str, Any]:
    return dict(json.loads(Path(f"{context.out}.json").read_text()))


def test_the_loss_is_the_scorers_over_the_last_frames_codes(make: Any, clips: dict[str, NDArray[np.int64]]) -> None:
    context = make()
    summary = VideoLossSuite(SMALL).run(context)
    rows = results(context)["rows"]
    assert len(rows) == 15 and all(tuple(row) == FIELDS for row in rows)
    for row in rows:
        codes, frame = clips[row["video"]], row["frame"]
        ids = list(START)
        for before in range(frame - row["frames"], frame):
            ids += [259 + int(code) for code in codes[before]] + [771]
        expected = []
        for code in codes[frame]:
            ids.append(259 + int(code))
            expected.append(number(ids))
        assert row["nats"] == pytest.approx(sum(expected) / 4, abs=1e-6)
        assert row["length"] == len(ids) and ids in context.scorer.asked
    for told, frames in zip(summary, (1, 2, 4), strict=True):
        mine = [row["nats"] for row in rows if row["frames"] == frames]
        assert told == {
            "stage": "base", "frames": frames, "length": 9 + 5 * frames + 4, "nats": pytest.approx(sum(mine) / 5),
            "uniform": math.log(512), "samples": 5,
        }  # fmt: skip
    assert results(context)["summary"] == summary


def test_the_same_frames_are_predicted_from_few_and_from_many(make: Any, clips: Any) -> None:
    context = make()
    VideoLossSuite(SMALL.model_copy(update={"samples": 40})).run(context)
    rows = results(context)["rows"]
    by_frames = [[(row["video"], row["frame"]) for row in rows if row["frames"] == frames] for frames in (1, 2, 4)]
    assert by_frames[0] == by_frames[1] == by_frames[2]
    assert set(by_frames[0]) == {("a", 4), ("a", 5), ("a", 6), ("b", 4), ("b", 5)}, "each that has four before it"


def test_every_frame_with_enough_before_it_is_drawn_alike(make: Any, clips: Any) -> None:
    plan = VideoLossSuite(SMALL.model_copy(update={"frames": (1,)})).plan(make())
    drawn = [target(plan, 7, sample) for sample in range(3000)]
    wanted = {(0, f) for f in range(1, 7)} | {(1, 1), (1, 2)} | {(2, f) for f in range(1, 6)}
    counts = {one: drawn.count(one) for one in wanted}
    assert set(drawn) == wanted and min(counts.values()) > 170 and max(counts.values()) < 300  # 231 on average
    assert drawn[:50] != [target(plan, 8, sample) for sample in range(50)]


def test_numbers_of_frames_by_default(make: Any, write_shards: Any) -> None:
    """1, 2, 4, ... as far as the longest stage (1024 tokens: 202 frames of 5) and the longest video go."""

    def frames(videos: dict[str, int], **changes: Any) -> list[int]:
        name = "-".join(map(str, videos.values()))
        write_shards(name, {key: np.zeros((count, 4), int) for key, count in videos.items()})
        return list(VideoLossSuite(VideoLossOptions(path=name)).plan(make(**changes)).lengths.values())

    assert frames({"a": 300}) == [1, 2, 4, 8, 16, 32, 64, 128]
    assert frames({"a": 9, "b": 8}) == [1, 2, 4, 8]
    assert frames({"a": 8}) == [1, 2, 4]
    assert frames({"a": 17}, stages=[], start_seq_len=9 + 5 * 8 + 4) == [1, 2, 4, 8], "to the token"
    assert frames({"a": 18}, stages=[], start_seq_len=9 + 5 * 8 + 3) == [1, 2, 4]


def test_interrupted_it_goes_on_and_repeats_nothing(make: Any, clips: Any) -> None:
    class KilledError(Exception):
        """Stands for kill -9."""

    def dies(done: int, total: int) -> None:
        if done == 7:
            raise KilledError

    context = make(progress=dies)
    with pytest.raises(KilledError):
        VideoLossSuite(SMALL).run(context)
    again = make()
    summary = VideoLossSuite(SMALL).run(again)
    assert (len(context.scorer.asked), len(again.scorer.asked)) == (7, 8)
    lines = [json.loads(line) for line in Path(f"{context.out}.jsonl").read_text().splitlines()]
    assert len({(row["length"], row["sample"]) for row in lines}) == len(lines) == 15
    finished = make()
    assert VideoLossSuite(SMALL).run(finished) == summary and finished.scorer.asked == []
    more = make()
    VideoLossSuite(SMALL.model_copy(update={"samples": 6})).run(more)
    assert len(more.scorer.asked) == 3
    later = make(stage="512")
    VideoLossSuite(SMALL).run(later)
    assert later.scorer.asked == [*context.scorer.asked, *again.scorer.asked], "every stage is asked the same"


@pytest.mark.parametrize(
    ("options", "changes", "error", "message"),
    [
        ({"path": "missing"}, {}, DataError, "video-loss: .*missing: is no folder of codes"),
        ({"frames": (1, 7)}, {}, DataError, "longest video has 7 frames, but frames = 7 .* need 8; encode a longer"),
        ({}, {"vocabulary": Vocabulary(259)}, ShapeError, "has 512, but the model has ids for 0; set model"),
        ({"path": "one", "frames": None}, {}, DataError, "two frames of 4 codes are needed, but its longest .* has 1"),
        ({"frames": None}, {"stages": [], "start_seq_len": 12}, DataError, "and the longest stage 12 tokens"),
        ({}, {"trained_codes": {"clips": Settings("v:q", "e" * 64, {}, 512, 32, None, None, 1, 1)}}, DataError,
         "are of a:b cccccccccccc, but data source 'clips' trains on codes of v:q eeeeeeeeeeee; encode it again"),
    ],
)  # fmt: skip
def test_wrong_use_is_one_line_before_the_first_step_and_after(
    make: Any, clips: Any, write_shards: Any, options: Any, changes: Any, error: type[LwmError], message: str
) -> None:
    write_shards("one", {"a": [[1] * 4]})
    suite, context = VideoLossSuite(SMALL.model_copy(update=options)), make(**changes)
    assert isinstance(suite, ChecksSetup)
    for call in (suite.check, suite.run):
        with pytest.raises(error, match=message) as caught:
            call(context)
        assert "\n" not in str(caught.value)
    assert not context.out.parent.exists()


def test_codes_like_those_trained_on_are_taken(make: Any, clips: Any, tmp_path: Path) -> None:
    settings = open_shards(tmp_path / "codes").manifest.settings
    VideoLossSuite(SMALL).check(make(trained_codes={"clips": settings}))


def test_of_a_folder_that_is_trained_on_what_is_held_out_is_read(
    make: Any, clips: Any, write_shards: Any, tmp_path: Path
) -> None:
    """Named or not: the loss is that of a folder of these clips alone."""
    write_shards("apart", {"a": clips["a"], "b": clips["b"]})
    trained = {tmp_path.resolve() / "codes": ["a", "b"], tmp_path.resolve() / "other": []}
    expected = VideoLossSuite(SMALL.model_copy(update={"path": "apart"})).run(make(out=tmp_path / "x" / "apart"))
    for path in ("codes", "../" + tmp_path.name + "/codes", None):
        out = tmp_path / "x" / str(path).strip("./")
        context = make(held_out_clips=trained, out=out)
        assert VideoLossSuite(SMALL.model_copy(update={"path": path})).run(context) == expected
        assert {row["video"] for row in results(context)["rows"]} == {"a", "b"}


@pytest.mark.parametrize(
    ("path", "held_out", "message"),
    [
        ("codes", {"codes": []}, "codes is trained on and none of its clips is held out; set held_out in its data"),
        (None, {"codes": []}, "no data source holds clips out; set held_out in a vision source, or path to a folder"),
        (None, {}, "no data source holds clips out"),
        (None, {"codes": ["a"], "more": ["b"]}, "clips are held out of .*codes and .*more; set path to one of them"),
        ("codes", {"codes": ["short"]}, "longest video of the 1 held out has 3 frames, but frames = 4 before the one"),
    ],
)
def test_clips_that_are_trained_on_are_not_evaluated_on(
    make: Any, clips: Any, tmp_path: Path, path: str | None, held_out: dict[str, list[str]], message: str
) -> None:
    suite = VideoLossSuite(SMALL.model_copy(update={"path": path}))
    with pytest.raises(DataError, match=message) as caught:
        suite.check(make(held_out_clips={tmp_path.resolve() / name: names for name, names in held_out.items()}))
    assert str(caught.value).startswith("video-loss: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"path": "a", "frames": []}, {"path": "a", "frames": [0]}, {"path": "a", "n": 1}])
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        VideoLossOptions.model_validate(options)


def test_the_figure_is_svg(make: Any, clips: Any) -> None:
    suite, context = VideoLossSuite(SMALL), make()
    assert suite.draw(context.out) == {}
    suite.run(context)
    [(title, data)] = suite.draw(context.out).items()
    assert title == "Video loss by frames before" and data.startswith(b"<?xml") and b"frames before" in data
