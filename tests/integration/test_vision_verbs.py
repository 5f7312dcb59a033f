"""``lwm generate DIR image|video`` and ``lwm chat DIR --image --video``, with the shipped encoder and a small model.

In one process, so that the framework is imported once.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lwm_core import registry
from lwm_core.cli import main
from lwm_core.protocols import SamplingSpec

pytest.importorskip("torch")
pytest.importorskip("lwm_vqgan")
pytest.importorskip("av")

RUN = """
model = { preset = "debug", hidden_size = 16, intermediate_size = 16, num_layers = 1, vision_size = 8448 }
trainer = { name = "torch", device = "cpu" }
attention = { name = "torch-ring" }
encoder = { name = "vqgan" }
data = { name = "text-file", path = "shipped:genesis" }

[[stages]]
seq_len = 64
tokens = 64
batch_tokens = 64
lr = 1e-3
"""
BLOCK = 257


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a run ``r`` of one step, and one without an encoder, ``blind``."""
    folder = tmp_path_factory.mktemp("vision")
    registry.refresh()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("LWM_PLUGINS", "LWM_PLUGINS_DISABLE"):
            patch.delenv(name, raising=False)
        patch.chdir(folder)
        for name, text in (("r", RUN), ("blind", RUN.replace('encoder = { name = "vqgan" }\n', ""))):
            (folder / f"{name}.toml").write_text(text)
            assert main(["run", f"{name}.toml", "--out", name, "--quiet"]) == 0
        yield folder


def drawn(*words: str, capsys: pytest.CaptureFixture[str]) -> Any:
    capsys.readouterr()
    assert main(["generate", "r", *words, "--prompt", "a red boat", "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def frames_of(path: Path) -> int:
    import av

    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int | None]]:
    """What every session reads: tokens of its rows."""
    from lwm_torch_ring.generate.session import TorchSession

    reads: list[tuple[int, int | None]] = []
    plain = TorchSession.read

    def read(self: Any, tokens: Any, unconditional: Any = None, *, expected: int = 0) -> None:
        reads.append((len(tokens), None if unconditional is None else len(unconditional)))
        plain(self, tokens, unconditional, expected=expected)

    monkeypatch.setattr(TorchSession, "read", read)
    return reads


def test_an_image_is_257_tokens_and_a_picture(
    ran: Path, capsys: pytest.CaptureFixture[str], counted: list[tuple[int, int | None]]
) -> None:
    from PIL import Image

    told = drawn("image", "--out", "x.png", "--seed", "3", capsys=capsys)
    prompt = len("You are a helpful assistant. USER: Generate an image of a red boat ASSISTANT: <vision>") + 1
    assert (told["frames"], told["tokens"], told["read"], told["source"]) == (1, BLOCK, prompt, "r/model")
    assert told["frames_per_second"] == pytest.approx(1 / told["seconds"])
    with Image.open(ran / "x.png") as picture:
        assert picture.size == (64, 64) and picture.mode == "RGB"
        first = np.asarray(picture)
    assert counted == [(prompt, len("<vision>") + 1)], "both prompts, once"
    drawn("image", "--out", "same.png", "--seed", "3", "--scale", "1", "--top-k", "0", capsys=capsys)
    assert counted[1:] == [(prompt, None)], "no second row where there is no guidance"
    assert not np.array_equal(first, np.asarray(Image.open(ran / "same.png")))


def test_a_video_is_as_many_frames_in_a_file_or_a_folder(
    ran: Path, capsys: pytest.CaptureFixture[str], counted: list[tuple[int, int | None]]
) -> None:
    from PIL import Image

    few = ("--frames", "2", "--scale", "1", "--seed", "3")
    told = drawn("video", "--out", "x.mp4", *few, capsys=capsys)
    assert (told["frames"], told["tokens"]) == (2, 2 * BLOCK) and frames_of(ran / "x.mp4") == 2
    assert counted[1:] == [(1, None)], "of the second frame nothing is read but the first one's end"
    capsys.readouterr()
    assert main(["generate", "r", "video", "--prompt", "a red boat", "--out", "frames", *few]) == 0
    assert re.fullmatch(r"frames: 2 frames · 514 tokens in [\d.]+ s · [\d.]+ frames/s\n", capsys.readouterr().out)
    assert sorted(path.name for path in (ran / "frames").iterdir()) == ["00000.png", "00001.png"]
    assert Image.open(ran / "frames" / "00001.png").size == (64, 64)
    assert main(["generate", "r", "video", "--prompt", "a", "--out", "frames", *few]) == 2
    assert "frames, which exists; nothing is written over" in capsys.readouterr().err


def chat(words: tuple[str, ...], given: str, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> Any:
    capsys.readouterr()
    patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
    code = main(["chat", *words, "--max-new-tokens", "4", "--temperature", "0"])
    return code, *capsys.readouterr()


def filmed(path: Path, frames: int) -> str:
    """A video of so many frames, no two of them alike; its name."""
    from lwm_vqgan.media import write_media

    random = np.random.default_rng(0)
    write_media(path, (random.integers(0, 256, (48, 80, 3), np.uint8) for _ in range(frames)), 10.0)
    return path.name


@pytest.fixture
def clip(ran: Path) -> str:
    """Twenty frames, of which three are taken."""
    return filmed(ran / "clip.mp4", 20)


START = 1 + len("You are a helpful assistant. USER: <vision></vision>")
"""Tokens that stand before the questions besides the frames' own."""


def conversed(
    clip: str, frames: int, questions: Sequence[str], err: str, counted: Sequence[tuple[int, int | None]]
) -> dict[str, float]:
    """Hold what a chat says on standard error about a video against what its session read: the video once, and after
    it each question alone. Returns the seconds of encoding, of reading, and of all answers.
    """
    block = START + frames * BLOCK
    first, second, *rest = err.splitlines()
    encoded = re.fullmatch(rf"{clip}: {frames} frames encoded in ([\d.]+) s · [\d.,]+ frames/s", first)
    read = re.fullmatch(rf"{clip}: {block:,} tokens read in ([\d.]+) s · [\d,]+ tok/s", second)
    assert encoded and read, err
    turn = r"(\d+) tokens · ([\d.]+) tok/s · context ([\d,]+): ([\d,]+) kept, ([\d,]+) read anew in ([\d.]+) s"
    turns = [found.groups() for line in rest if (found := re.fullmatch(turn, line))]
    numbers = [[float(one.replace(",", "")) for one in found] for found in turns]
    assert len(turns) == len(questions), err
    parts, asked = counted[: -len(questions)], counted[-len(questions) :]
    assert sum(tokens for tokens, _ in parts) == block, "the video, in parts or not, once"
    context = block
    for (tokens, _, told, kept, anew, _), (was, _), question in zip(numbers, asked, questions, strict=True):
        assert anew == was < len(f"\n{question} ASSISTANT:") + 40 and kept <= context, "a question, and no more"
        context += was + int(tokens)
        assert told == context == kept + anew + tokens
    answers = sum(one[0] / max(one[1], 1e-9) + one[5] for one in numbers)
    return {"encoding": float(encoded[1]), "reading": float(read[1]), "answers": answers}


def test_a_video_is_read_once_for_three_questions(
    clip: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, counted: list[tuple[int, Any]]
) -> None:
    words = ("r", "--video", clip, "--frames", "3")
    code, out, _ = chat((*words, "--json"), "What?\nWhere?\nWho?\n", capsys, monkeypatch)
    answers = [json.loads(line) for line in out.splitlines()]
    start = START + 3 * BLOCK
    assert code == 0 and [one["question"] for one in answers] == ["What?", "Where?", "Who?"]
    assert counted[0] == (start, None) and len(counted) == 4
    assert [one["read"] for one in answers] == [count for count, _ in counted[1:]]
    assert all(one["read"] < 40 for one in answers) and answers[0]["kept"] == start
    assert answers[0]["read"] == len("\nWhat? ASSISTANT:")
    assert answers[2]["context"] == start + sum(one["read"] + one["tokens"] for one in answers)
    counted.clear()
    code, out, err = chat(words, "What?\n", capsys, monkeypatch)
    assert code == 0 and answers[0]["text"] in out
    conversed(clip, 3, ["What?"], err, counted)
    assert f"{start} kept, 17 read anew in " in err.splitlines()[2]


FEW, MANY = 60, 1000
"""Frames of a video that is talked about, every day and in ``nox -s long``: 257,000 tokens of LWM's 257 a frame."""


@pytest.mark.parametrize("frames", [FEW, pytest.param(MANY, marks=pytest.mark.long)])
def test_a_long_video_is_read_once_for_three_questions(
    frames: int, ran: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    counted: list[tuple[int, Any]],
) -> None:  # fmt: skip
    """Of the preset ``tiny``; how many tokens that were, and how long it took, is printed."""
    sizes = "hidden_size = 16, intermediate_size = 16, num_layers = 1, "
    (ran / "tiny.toml").write_text(RUN.replace('"debug"', '"tiny"').replace(sizes, ""))
    if not (ran / "tiny").exists():
        assert main(["run", "tiny.toml", "--out", "tiny", "--quiet"]) == 0
    questions = ["What is shown?", "Where?", "How does it end?"]
    words = ("tiny", "--video", filmed(ran / "long.mp4", frames), "--frames", str(frames))
    code, _, err = chat(words, "\n".join(questions), capsys, monkeypatch)
    assert code == 0, err
    seconds = conversed("long.mp4", frames, questions, err, counted)
    told = " · ".join(f"{name} {taken:.1f} s" for name, taken in seconds.items())
    with capsys.disabled():
        print(f"\n{frames} frames, {frames * BLOCK:,} tokens: {told}")


def test_what_is_shown_is_what_the_encoder_makes_of_it(
    ran: Path, clip: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is the greedy one after ids that are put together by hand, in the order of the command."""
    from lwm_core.run import reopen
    from lwm_vqgan.media import Sampling, open_clip, preprocess, write_media

    write_media(ran / "one.png", [np.full((70, 64, 3), 90, np.uint8)])
    code, out, _ = chat(
        ("r", "--image", "one.png", "--video", clip, "--fps", "1", "--json"), "Why?\n", capsys, monkeypatch
    )
    assert code == 0
    opened = reopen(ran / "r")
    encoder, vocabulary = opened.pipeline.make_encoder(), opened.pipeline.model.vocabulary
    assert encoder is not None
    ids = [256, *b"You are a helpful assistant. USER: "]
    for name, sampling in (("one.png", None), (clip, Sampling(fps=1))):
        squares = [preprocess(frame.pixels, 64) for frame in open_clip(ran / name, sampling).frames()]
        assert len(squares) == (1 if sampling is None else 2)
        ids += b"<vision>"
        for number, codes in enumerate(encoder.encode(np.stack(squares)).tolist()):
            last = number == len(squares) - 1
            ids += [259 + code for code in codes] + [vocabulary.eov if last else vocabulary.eof]
        ids += b"</vision>"
    ids += b"\nWhy? ASSISTANT:"
    expected = opened.trainer.generator().generate([ids], SamplingSpec(4, stop_ids=(257,)))[0]
    assert json.loads(out)["text"] == opened.pipeline.tokenizer.decode(expected)
    assert json.loads(out)["kept"] + json.loads(out)["read"] == len(ids)


def test_a_picture_is_shown_between_questions(
    ran: Path, clip: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, counted: list[Any]
) -> None:
    """It is read when it is named, once; a wrong file through a pipe ends the chat with one line."""
    from lwm_vqgan.media import write_media

    write_media(ran / "one.png", [np.full((70, 64, 3), 90, np.uint8)])
    words = ("r", "--video", clip, "--frames", "2")
    given = "What?\n/image one.png\nAnd this?\n"
    code, out, err = chat((*words, "--json"), given, capsys, monkeypatch)
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and err == "" and [one["question"] for one in answers] == ["What?", "And this?"]
    start, (first, second) = START + 2 * BLOCK, answers
    picture = (first["ended"] == "eos") + len(" USER: <vision></vision>") + BLOCK
    assert [count for count, _ in counted] == [start, first["read"], picture, len("\nAnd this? ASSISTANT:")]
    assert second["kept"] == first["context"] + picture and second["read"] == counted[3][0]
    code, out, err = chat(words, given, capsys, monkeypatch)
    assert code == 0 and out == f"{first['text']}\n{second['text']}\n"
    encoded, read = (line for line in err.splitlines() if line.startswith("one.png: "))
    assert encoded.startswith("one.png: 1 frame encoded in ")
    assert read.startswith(f"one.png: {picture} tokens read in ")
    for line, ends, told in (("/image gone.png", 1, "gone.png: there is no such file"),
                             (f"/image {clip}", 2, f"{clip}: is a video; name it with --video, or /video between"),
                             ("/video one.png", 2, "one.png: is a picture; name it with --image, or /image between"),
                             ("/video", 2, "/video names no file; write /video FILE")):  # fmt: skip
        code, out, err = chat(words, f"{line}\nWhat?\n", capsys, monkeypatch)
        assert code == ends and out == "" and told in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (("chat", "r", "--image", "gone.png"), 1, "gone.png: there is no such file"),
        (("chat", "r", "--video", "text.mp4"), 1, "text.mp4: "),
        (("chat", "r", "--image", "clip.mp4"), 2, "clip.mp4: is a video; name it with --video"),
        (("chat", "r", "--video", "one.png"), 2, "one.png: is a picture; name it with --image"),
        (("chat", "r", "--image", "text.png"), 1, "text.png: is no picture that can be read"),
        (("chat", "r", "--video", "clip.mp4", "--frames", "0"), 2, "--frames is 0; expected at least 1"),
        (("chat", "blind", "--image", "one.png"), 2, "blind: its configuration names no [encoder]; name one"),
        (("chat", "none", "--image", "one.png"), 2, "no such folder"),
        (("generate", "blind", "image", "--prompt", "a", "--out", "a.png"), 2, "names no [encoder]"),
        (("generate", "r", "image", "--prompt", "a", "--out", "a.mp4"), 2, "expected a name that ends with .png"),
        (("generate", "r", "image", "--prompt", "a", "--out", "a"), 2, "expected a name that ends with .png"),
        (("generate", "r", "video", "--prompt", "a", "--out", "a.png"), 2, ".mp4 or .gif, or that of a folder"),
        (("generate", "r", "image", "--prompt", "a", "--out", "r.toml/b/a.png"), 2, "r.toml, but it is a file; name"),
        (("generate", "r", "image", "--prompt", "a", "--out", "a" * 300 + ".png"), 1, ".png: File name too long"),
        (("chat", "r", "--video", "empty.mp4"), 1, "empty.mp4: is empty; expected a video"),
        (("chat", "r", "--video", "still"), 1, "still: is a folder; expected a video"),
        (("chat", "r", "--image", "pipe.png"), 1, "pipe.png: is no plain file; expected"),
        (("generate", "r", "video", "--prompt", "a", "--out", "a.mp4", "--frames", "0"), 2, "--frames is 0"),
        (("generate", "r", "video", "--prompt", "a", "--out", "a.gif", "--fps", "0"), 2, "--fps is 0.0"),
        (("generate", "r", "image", "--prompt", "", "--out", "a.png"), 2, "--prompt is ''; expected a text"),
        (("generate", "r", "image", "--prompt", "a", "--out", "a.png", "--scale", "nan"), 2, "--scale is nan"),
        (("generate", "r", "image", "--prompt", "a", "--out", "a.png", "-s", "encoder.name=vqgam"), 2, "vqgam"),
    ],
)
def test_wrong_use_and_wrong_files_are_one_line(
    words: tuple[str, ...], code: int, part: str, ran: Path, clip: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name in ("text.mp4", "text.png"):
        (ran / name).write_text("this is a text\n")
    (ran / "empty.mp4").touch()
    (ran / "still").mkdir(exist_ok=True)
    if not (ran / "pipe.png").exists():
        os.mkfifo(ran / "pipe.png")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"What?\n")))
    capsys.readouterr()
    assert main(list(words)) == code
    told = capsys.readouterr()
    assert (told.out, len(told.err.splitlines())) == ("", 1) and part in told.err
    assert not list(ran.glob("a.*"))


def test_the_line_of_a_terminal_says_how_far_it_is(
    ran: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lwm_core.cli import generate_frames

    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr(generate_frames, "SHOWN_EVERY", 0.0)
    shown: Callable[..., Any] = generate_frames._Shown
    line = shown(2, 4)
    for _ in range(8):
        line.note()
    assert line.close() > 0
    told = capsys.readouterr().err.split("\r\033[K")
    assert told[0] == told[-1] == "" and len(told) == 10
    assert all(re.fullmatch(r"frame [12] of 2 · [\d.]+ frames/s · [\d:]+ left", one) for one in told[1:-1]), told
    assert [one[:7] for one in told[1:-1]] == ["frame 1"] * 4 + ["frame 2"] * 4
