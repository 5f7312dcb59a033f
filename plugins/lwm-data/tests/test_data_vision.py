"""Source ``vision``: tokens of every order by hand, frames, random forms, packing, the feed, and what is refused.

Codes are of 9 entries, two a frame: ids 259 to 267, eof 268, eov 269.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from lwm_core.batch import PackedBatch, pack_rows
from lwm_core.errors import ConfigError, DataError, LwmError, ShapeError
from lwm_core.protocols import FeedRequest, TrainsOnCodes
from lwm_core.testing import DataSuite
from lwm_core.testing.data_suite import check_packed
from lwm_data.options import VisionOptions
from lwm_data.rows import StageRows

VISION = (12, 9)
PICTURE, CLIP = [[1, 2]], [[3, 4], [5, 6], [7, 8]]
PICTURE_IDS = [260, 261, 269]
CLIP_IDS = [262, 263, 268, 264, 265, 268, 266, 267, 269]
BOS, EOS = [256], [257]


@pytest.fixture
def one(write_codes: Any, tmp_path: Path) -> Any:
    """``one(codes, text)``: the folder ``codes`` of one clip, and its caption."""

    def write(codes: list[list[int]], text: str = "a dog") -> None:
        write_codes("codes", {"it": codes})
        (tmp_path / "c.tsv").write_text(f"it\t{text}\n")

    return write


def source_of(**options: Any) -> dict[str, Any]:
    captions = {} if options.get("order") == "vision" else {"captions": "c.tsv"}
    return {"clips": {"kind": "vision", "path": "codes", **captions, **options}}


def examples(batch: PackedBatch) -> list[tuple[list[int], list[bool], float]]:
    """(ids, which are learnt, sum of weights) of every segment."""
    found = []
    for b in range(batch.shape[0]):
        for segment in range(1, batch.segment_ids[b].max() + 1):
            own = batch.segment_ids[b] == segment
            weights = batch.loss_weights[b, own]
            found.append((batch.tokens[b, own].tolist(), [False, *(weights[:-1] > 0).tolist()], float(weights.sum())))
    return found


def first_of(source: Any, seq_len: int = 200, rows: int = 1) -> tuple[list[int], list[bool], float]:
    return examples(source.open(FeedRequest(0, seq_len, rows)).batch(0))[0]


def image(text: str) -> list[int]:
    return list(f"You are a helpful assistant. USER: Generate an image of {text} ASSISTANT: <vision>".encode())


ASKED = list(b"You are a helpful assistant. USER: Describe what you see.\n<vision>")
REPLY = list(b"</vision> ASSISTANT:")
CLOSED = [*b"</vision>", *EOS]
TEXT = [*b" a dog", *EOS]
GOLDEN = {
    "text-image": ("text-vision", PICTURE, [*BOS, *image("a dog")], [*PICTURE_IDS, *CLOSED]),
    "text-video": (
        "text-vision",
        CLIP,
        [*BOS, *b"You are a helpful assistant. USER: Generate a video of a dog ASSISTANT: <vision>"],
        [*CLIP_IDS, *CLOSED],
    ),
    "image-text": ("vision-text", PICTURE, [*BOS, *ASKED, *PICTURE_IDS, *REPLY], TEXT),
    "video-text": ("vision-text", CLIP, [*BOS, *ASKED, *CLIP_IDS, *REPLY], TEXT),
    "text": ("text", PICTURE, BOS, [*b"a dog", *EOS]),
    "video": ("vision", CLIP, [*BOS, *b"<vision>"], [*CLIP_IDS, *CLOSED]),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_tokens_of_the_six_orders(one: Any, open_source: Any, name: str) -> None:
    """What is given, then what is learnt; the weights sum to the share."""
    order, codes, given, learnt = GOLDEN[name]
    one(codes)
    ids, which, weight = first_of(open_source(source_of(order=order, share=2.0), vision=VISION))
    assert ids == [*given, *learnt]
    assert which == [False] * len(given) + [True] * len(learnt)
    assert weight == pytest.approx(2.0, rel=1e-6)


def test_lwms_frames_are_257_tokens_each(write_codes: Any, open_source: Any) -> None:
    write_codes("codes", {"it": np.full((3, 256), 8191)}, entries=8192)
    ids, _, _ = first_of(open_source(source_of(order="vision"), vision=(8448,)), 1000)
    vision = np.array([i for i in ids if i >= 259]) - 259
    assert len(vision) == 3 * 257 and vision[256::257].tolist() == [8192, 8192, 8193]


def test_an_unconditional_clip_has_no_text(one: Any, open_source: Any) -> None:
    one(CLIP)
    ids, which, _ = first_of(open_source(source_of(drop=1.0), vision=VISION))
    assert ids == [*BOS, *b"<vision>", *CLIP_IDS, *CLOSED]
    assert which == [False] * 9 + [True] * (9 + 10)


def test_orders_are_swapped_and_texts_dropped_as_often_as_was_said(one: Any, open_source: Any) -> None:
    """A quarter is swapped; of the others, a half has no text."""
    one(PICTURE)
    options = source_of(order="vision-text", swap=0.75, drop=0.5)
    source = open_source(options, vision=VISION, window_rows=500)
    drawn = [ids for ids, _, _ in examples(source.open(FeedRequest(0, 120, 1000)).batch(0))]
    forms = {
        "vision-text": [*BOS, *ASKED, *PICTURE_IDS, *REPLY, *TEXT],
        "text-vision": [*BOS, *image("a dog"), *PICTURE_IDS, *CLOSED],
        "unconditional": [*BOS, *b"<vision>", *PICTURE_IDS, *CLOSED],
    }
    counts = {name: drawn.count(ids) for name, ids in forms.items()}
    assert sum(counts.values()) == len(drawn) > 1000
    shares = {name: count / len(drawn) for name, count in counts.items()}
    assert shares == pytest.approx({"vision-text": 0.25, "text-vision": 0.375, "unconditional": 0.375}, abs=0.04)


def test_templates_questions_and_several_captions(write_codes: Any, open_source: Any, tmp_path: Path) -> None:
    write_codes("codes", {"a": PICTURE, "b": CLIP})
    lines = [
        {"name": "a", "text": " one "},
        {"name": "a", "text": "two", "question": "Who?"},
        {"name": "b", "text": "x"},
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = source_of(
        order="vision-text", captions="c.jsonl", questions=["What?", "Where?"],
        templates={"image-text": "Q {question} {vision}A:{text}", "video-text": "{vision}{text}"},
    )  # fmt: skip
    source = open_source(options, vision=VISION, window_rows=40)
    drawn = {bytes(i for i in ids if i < 256) for ids, _, _ in examples(source.open(FeedRequest(0, 60, 40)).batch(0))}
    assert drawn == {
        b"Q What? <vision></vision>A:one", b"Q Where? <vision></vision>A:one", b"Q Who? <vision></vision>A:two",
        b"<vision></vision>x",
    }  # fmt: skip


@pytest.mark.parametrize(("cap", "seq_len"), [(None, 1000), (7, 1000), (1, 1000), (None, 60), (30, 1000)])
def test_frames_are_taken_evenly(write_codes: Any, open_source: Any, cap: int | None, seq_len: int) -> None:
    """Against NumPy's linspace; without a cap a video has as many frames as the row holds."""
    codes = np.stack([np.arange(20) // 9, np.arange(20) % 9], axis=1)
    write_codes("codes", {"it": codes})
    ids, _, _ = first_of(open_source(source_of(order="vision", max_frames=cap), vision=VISION), seq_len)
    frames = np.array([i for i in ids if i >= 259]).reshape(-1, 3)
    room = (seq_len - 1 - len("<vision></vision>") - 1) // 3
    count = min(20, room if cap is None else cap)
    expected = codes[np.linspace(0, 19, count).astype(int)]
    np.testing.assert_array_equal(frames[:, :2] - 259, expected)
    assert count < 20 or cap == 30 or seq_len == 1000


@pytest.mark.parametrize("order", ["vision", "text-vision"])
def test_frames_may_be_taken_one_after_the_other(
    write_codes: Any, open_source: Any, tmp_path: Path, order: str
) -> None:
    """Each example is a window of the clip, every start comes up, and a clip that fits is whole."""
    codes = np.stack([np.arange(12) // 9, np.arange(12) % 9], axis=1)
    write_codes("codes", {"it": codes, "short": codes[:3]})
    (tmp_path / "c.tsv").write_text("it\ta\nshort\tb\n")
    source = open_source(source_of(order=order, max_frames=4, sampling="consecutive", drop=0.3 * (order != "vision")),
                         vision=VISION)  # fmt: skip
    starts = set()
    for ids, _, _ in examples(source.open(FeedRequest(0, 200, 128)).batch(0)):
        frames = np.array([i for i in ids if i >= 259]).reshape(-1, 3)[:, :2] - 259
        first = frames[0, 0] * 9 + frames[0, 1]
        np.testing.assert_array_equal(frames, codes[first : first + len(frames)])
        assert len(frames) == 4 or (len(frames) == 3 and first == 0)
        starts.add((len(frames), int(first)))
    assert starts == {(3, 0), *((4, first) for first in range(9))}


def test_a_video_capped_to_one_frame_is_a_picture(one: Any, open_source: Any) -> None:
    one(CLIP)
    ids, _, _ = first_of(open_source(source_of(max_frames=1), vision=VISION))
    assert ids == [*BOS, *image("a dog"), 262, 263, 269, *CLOSED]


@pytest.fixture
def many(write_codes: Any, tmp_path: Path) -> dict[str, Any]:
    """Twelve clips of one to five frames with captions of all lengths; both orders and clips without text."""
    random = np.random.default_rng(0)
    clips = {f"{i}": random.integers(0, 9, (1 + i % 5, 2)) for i in range(12)}
    write_codes("codes", clips)
    (tmp_path / "c.tsv").write_text("".join(f"{name}\t{'ab ' * (1 + int(name))}\n" for name in clips))
    return source_of(swap=0.5, drop=0.3)


def test_rows_packed_are_rows_padded(many: dict[str, Any], open_source: Any) -> None:
    """Each segment is, array by array, the same example alone in a row; weights sum to one, positions restart."""
    source = open_source(many, vision=VISION, window_rows=16)
    batch = source.open(FeedRequest(0, 400, 16)).batch(0)
    check_packed(batch)
    assert batch.segment_ids.max() > 1
    vision = source._source("clips", 400)
    stage = StageRows({"clips": vision}, {"clips": 1.0}, (0, 0), 400, 16)
    for b, (name, items) in enumerate(stage._plan(0)):
        assert batch.segment_ids[b].max() == len(items)
        for segment, item in enumerate(items, start=1):
            apart = pack_rows([[vision.build(item, stage._source_key(0, name))]], 400)
            own, alone = batch.segment_ids[b] == segment, apart.segment_ids[0] == 1
            for field in ("tokens", "targets", "positions", "loss_weights"):
                np.testing.assert_array_equal(getattr(batch, field)[b, own], getattr(apart, field)[0, alone])
            assert batch.loss_weights[b, own].sum() == pytest.approx(1.0, rel=1e-5)
            assert batch.positions[b, own][0] == 0


def test_a_window_has_every_clip_as_often_as_another(many: dict[str, Any], open_source: Any) -> None:
    """Give or take one: the draw that filled the window's rows was cut off within a round."""
    plan = open_source(many, vision=VISION)._source("clips", 250).plan(60, (0, 0, 0, 1))
    counts = np.bincount([int(item[0]) for row in plan for item in row], minlength=12)
    assert counts.min() >= 8 and np.ptp(counts) <= 1


class TestKit(DataSuite):
    """The core's own checks of a feed."""

    @pytest.fixture(autouse=True)
    def _source(self, many: dict[str, Any], open_source: Any) -> None:
        self.make = lambda seed: open_source(many, seed=seed, vision=VISION, window_rows=8)  # type: ignore[method-assign]


def test_shards_of_the_encoders_own_writer_feed_the_same_rows_to_any_workers(open_source: Any, tmp_path: Path) -> None:
    """Written by ``lwm encode``'s writer, restarts and all; read by none, and by two workers."""
    writing = pytest.importorskip("lwm_vqgan.shards.writer")
    from lwm_core.shards import Settings
    from lwm_vqgan.media.files import Source as File

    random = np.random.default_rng(1)
    settings = Settings("a:b", "0" * 64, {}, 9, 16, None, 4.0, 2, 6)
    folder = tmp_path / "codes"
    folder.mkdir()
    clips = {f"v/{i}.mp4": random.integers(0, 9, (2 * (i % 3) + 2, 2)) for i in range(6)}
    for name, codes in clips.items():
        writer = writing.ShardWriter(folder, settings)
        writer.begin(File(Path("x"), name, 7))
        writer.add(codes, np.arange(len(codes)) / 4)
        writer.count(len(codes))
        writer.end(4.0)
        writer.commit(complete=name == list(clips)[-1])
    (tmp_path / "c.tsv").write_text("".join(f"{name}\tclip {name}\n" for name in clips))
    streams = []
    for workers in (0, 2):
        source = open_source(source_of(swap=0.5, verify=True), vision=VISION, window_rows=8, workers=workers)
        feed = source.open(FeedRequest(0, 256, 8))
        streams.append([feed.batch(step) for step in range(3)])
        feed.close()
    for one, other in zip(*streams, strict=True):
        for field in ("tokens", "targets", "segment_ids", "positions", "loss_weights"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
    # The codes that were written are the codes that are fed.
    fed = {tuple(i for i in ids if i >= 259) for batch in streams[0] for ids, _, _ in examples(batch)}
    written = set()
    for codes in clips.values():
        ends = np.full((len(codes), 1), 268)
        ends[-1] = 269
        written.add(tuple(np.concatenate([codes + 259, ends], axis=1).ravel().tolist()))
    assert fed <= written and len(fed) > 3


def refused(open_source: Any, kind: type[LwmError], words: str, seq_len: int = 200, **options: Any) -> None:
    """One line, whether the source or its feed is opened."""
    vision = options.pop("vision", VISION)
    with pytest.raises(kind, match=words) as caught:
        open_source(source_of(**options), vision=vision).open(FeedRequest(0, seq_len, 1)).batch(0)
    assert "\n" not in str(caught.value) and "vision source 'clips'" in str(caught.value)


def test_damaged_or_foreign_folders_are_one_line(one: Any, open_source: Any, tmp_path: Path) -> None:
    refused(open_source, DataError, "codes: is no folder of codes: there is no manifest.json in it; lwm encode writes")
    one(CLIP)
    shard = tmp_path / "codes" / "00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2] + b"??")
    refused(open_source, DataError, "was changed: its SHA-256", verify=True)
    shard.write_bytes(whole[:-1])
    refused(open_source, DataError, "00000.safetensors: has .* bytes; its manifest says")
    shard.write_bytes(b"\xff" * len(whole))
    refused(open_source, DataError, "it: .*00000.safetensors: cannot be read")
    shard.unlink()
    refused(open_source, DataError, "00000.safetensors: is missing")


def test_codes_that_the_model_has_no_ids_for_are_one_line(write_codes: Any, open_source: Any, tmp_path: Path) -> None:
    write_codes("codes", {"it": CLIP}, entries=10)
    (tmp_path / "c.tsv").write_text("it\ta dog\n")
    refused(open_source, ShapeError, "codes of 'a:b', which has 10, but the model has ids for 9; encode it again")
    refused(open_source, ShapeError, r"no ids for codes; set model.vision_size .* \(LWM: 8448\)", vision=())


def test_a_code_beyond_the_codebook_is_one_line(write_codes: Any, open_source: Any, tmp_path: Path) -> None:
    write_codes("codes", {"it": [[3, 9]]})
    (tmp_path / "c.tsv").write_text("it\ta dog\n")
    refused(open_source, DataError, "it: vision codes run from 3 to 9; expected 0 to 8")


def test_codes_of_different_encoders_are_not_mixed(write_codes: Any, open_source: Any, tmp_path: Path) -> None:
    write_codes("a", {"it": CLIP})
    write_codes("b", {"it": CLIP}, weights="1")
    write_codes("c", {"it": [[1, 2, 3]]})
    (tmp_path / "x.jsonl").write_text("{}\n")
    folders = {name: {"kind": "vision", "order": "vision", "path": name} for name in "abc"}
    lines = {"kind": "jsonl", "path": "x.jsonl"}
    for sources, words in (
        ({"a": folders["a"], "b": folders["b"]}, "'a' and 'b' are of different weights"),
        ({"a": folders["a"], "c": folders["c"]}, "'a' has 2 codes a frame and 'c' 3; use codes of one encoder"),
        ({"l": lines, "a": folders["a"]}, "'a' has 2 codes a frame and 'l' 256"),
    ):
        with pytest.raises(ConfigError, match=words):
            open_source(sources, vision=VISION)
    open_source({"a": folders["a"], "l": {**lines, "codes_per_frame": 2}}, vision=VISION)


def test_the_mix_tells_how_its_codes_were_made(write_codes: Any, open_source: Any, tmp_path: Path) -> None:
    write_codes("codes", {"it": CLIP})
    (tmp_path / "x.jsonl").write_text("{}\n")
    clips = {"kind": "vision", "order": "vision", "path": "codes"}
    source = open_source({"a": clips, "l": {"kind": "jsonl", "path": "x.jsonl", "codes_per_frame": 2}}, vision=VISION)
    assert isinstance(source, TrainsOnCodes)
    assert {name: (one.encoder, one.checksum) for name, one in source.code_settings().items()} == {
        "a": ("a:b", "0" * 64)
    }


def test_clips_without_frames_or_caption_and_captions_without_a_clip(
    write_codes: Any, open_source: Any, tmp_path: Path
) -> None:
    """Each is one line with a name, or left out where that was asked for."""
    write_codes("codes", {"whole": CLIP, "broken": "is no picture", "mute": PICTURE})
    (tmp_path / "c.tsv").write_text("whole\ta dog\nbroken\ta cat\nwhale\ta whale\n")
    refused(open_source, DataError, r"clip 'broken' has no frames \(is no picture\); encode again without, or set")
    out = ["no-frames"]
    refused(open_source, DataError, "c.tsv:3: there is no clip 'whale'; did you mean 'whole'", leave_out=out)
    out.append("no-clip")
    refused(open_source, DataError, "clip 'mute' has no caption in .*c.tsv; add them, or set", leave_out=out)
    out.append("no-caption")
    source = open_source(source_of(leave_out=out), vision=VISION)
    said = {bytes(i for i in ids if i < 256) for ids, _, _ in examples(source.open(FeedRequest(0, 200, 4)).batch(0))}
    assert len(said) == 1 and b"a dog" in said.pop()
    (tmp_path / "c.tsv").write_text("whale\ta whale\n")
    refused(open_source, DataError, "no example is left", leave_out=out)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("c.csv", "it,x", "expected a name that ends in .jsonl or .tsv"),
        ("c.tsv", None, "c.tsv: cannot be read: .*No such file"),
        ("c.tsv", "\n \n", "has no lines"),
        ("c.tsv", "it\ta\tb\n", "c.tsv:1: has 3 columns; expected a name, a tab and a text"),
        ("c.tsv", "it\tx\n\nit\t \n", "c.tsv:3: has no text"),
        ("c.jsonl", '{"name": "it"}\n', "c.jsonl:1: has no text"),
        ("c.jsonl", '{"text": "it"}\n', "c.jsonl:1: has no name"),
        ("c.jsonl", '{"name": "it", "text": 3}\n', "c.jsonl:1: expected an object with the strings"),
        ("c.jsonl", "[]\n", "c.jsonl:1: expected an object"),
        ("c.jsonl", "{\n", "c.jsonl:1: is not JSON"),
    ],
)
def test_wrong_captions_are_one_line(
    one: Any, open_source: Any, tmp_path: Path, name: str, data: str | None, words: str
) -> None:
    one(PICTURE)
    (tmp_path / "c.tsv").unlink()
    if data is not None:
        (tmp_path / name).write_text(data)
    refused(open_source, DataError, words, captions=name)


def test_examples_longer_than_a_row(one: Any, open_source: Any, write_codes: Any, tmp_path: Path) -> None:
    """Refused with what they need, which is exact; or left out."""
    one(CLIP)
    need = 1 + len(GOLDEN["text-video"][2]) - 1 + 3 * 3 + len(CLOSED)
    words = rf"the text and 3 frame\(s\) of 'it' need {need} tokens, but the stage's rows have {need - 1}"
    refused(open_source, ShapeError, words, seq_len=need - 1, max_frames=3)
    assert len(first_of(open_source(source_of(max_frames=3), vision=VISION), need)[0]) == need
    short = need - 2 * 3
    refused(open_source, ShapeError, f"the text and one frame of 'it' need {short} tokens", seq_len=short - 1)
    assert len(first_of(open_source(source_of(), vision=VISION), short)[0]) == short
    refused(open_source, ShapeError, "none of its examples fits", seq_len=short - 1, leave_out=["too-long"])
    write_codes("two", {"long": CLIP, "it": PICTURE})
    (tmp_path / "two.tsv").write_text("long\t" + "very " * 99 + "long\nit\tshort\n")
    left = source_of(path="two", captions="two.tsv", leave_out=["too-long"])
    drawn = examples(open_source(left, vision=VISION).open(FeedRequest(0, 200, 4)).batch(0))
    assert {tuple(ids) for ids, _, _ in drawn} == {(*BOS, *image("short"), *PICTURE_IDS, *CLOSED)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"order": "text-vision", "captions": None}, "order 'text-vision' needs captions"),
        ({"order": "vision", "captions": "c"}, "order 'vision' takes no captions"),
        ({"order": "text", "swap": 0.5}, "swap is 0.5, but order 'text' holds one part only"),
        ({"order": "vision-text", "drop": 0.5}, "drop is 0.5, but order 'vision-text' never learns a clip after"),
        ({"swap": 1.5}, "less than or equal to 1"),
        ({"max_frames": 0}, "greater than or equal to 1"),
        ({"questions": []}, "at least 1"),
        ({"templates": {"image": "{vision}"}}, "text-image"),
        ({"templates": {"text-image": "{vision}"}}, r"template 'text-image': its fields are \{vision\}"),
        ({"leave_out": ["all"]}, "no-caption"),
        ({"held_out": 1.0}, "less than 1"),
    ],
)
def test_wrong_options_are_told(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        VisionOptions.model_validate({"kind": "vision", "path": "codes", "captions": "c.tsv", **options})
