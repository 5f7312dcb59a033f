"""A context with mock models for the suite, and a whole made-up run for the report."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save

from lwm_core.builtins.byte_tokens import BytesTokenizer
from lwm_core.protocols import EvalContext, SamplingSpec, Stage
from lwm_core.rope import RopeSpec
from lwm_core.shards import Manifest, Settings, Shard, Video
from lwm_core.vocab import Vocabulary
from lwm_evals.pictures import pictures
from lwm_evals.reconstruction import side_by_side
from lwm_evals.video_continuation import Clip, sheet

TEXT = [f"Ge{i // 30 + 1}:{i % 30 + 1} And it came to pass in the land of verse {i}." for i in range(300)]

Answer = Callable[[str], str]


class MockGenerator:
    """Answers by a function of the prompt's text; keeps what it was asked."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.prompts: list[list[int]] = []
        self.batches: list[int] = []
        self.sampling: list[SamplingSpec] = []
        self.tokenizer = BytesTokenizer()

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingSpec) -> list[list[int]]:
        self.batches.append(len(prompts))
        self.prompts += [list(prompt) for prompt in prompts]
        self.sampling.append(sampling)
        answers = [self.tokenizer.encode(self.answer(self.tokenizer.decode(prompt))) for prompt in prompts]
        return [answer[: sampling.max_new_tokens] for answer in answers]

    def stream(self, prompt: Sequence[int], sampling: SamplingSpec) -> Iterator[int]:
        yield from self.generate([prompt], sampling)[0]


def read_the_prompt(prompt: str) -> str:
    """What a perfect model answers: it reads the planted lines and the question, as a person would."""
    planted = dict(re.findall(r"\nThe special magic (\w+) number is: (\d+)\n", prompt))
    question = prompt[prompt.rindex(" What ") :]
    asked = [city for city in planted if re.search(rf"\b{city}\b", question)]
    return " " + ", ".join(f"{city}: {planted[city]}" for city in asked)


def make_stage(name: str, length: int) -> Stage:
    return Stage(name, length, RopeSpec(), tokens=length * 4, batch_tokens=length, lr=1e-3, min_lr=1e-4)


@pytest.fixture
def perfect() -> Answer:
    return read_the_prompt


@pytest.fixture
def make_generator() -> Callable[[Answer], MockGenerator]:
    return MockGenerator


class MockEncoder:
    """A frame's n codes are the mean colours of its cells, 3 bits a channel; keeps what it was asked."""

    codes, frame_size, codes_per_frame = 512, 32, 16
    checksum = "c" * 64

    def __init__(self) -> None:
        self.encoded: list[int] = []

    def encode(self, frames: NDArray[np.uint8]) -> NDArray[np.int32]:
        self.encoded.append(len(frames))
        cells = frames.reshape(len(frames), 4, 8, 4, 8, 3).mean(axis=(2, 4)) // 32
        return np.asarray(cells @ [64, 8, 1], np.int32).reshape(len(frames), 16)

    def decode(self, codes: NDArray[np.int32]) -> NDArray[np.uint8]:
        cells = np.stack([codes // 64, codes // 8 % 8, codes % 8], axis=-1).reshape(len(codes), 4, 4, 3) * 32 + 16
        return cells.repeat(8, axis=1).repeat(8, axis=2).astype(np.uint8)


@pytest.fixture
def encoder() -> MockEncoder:
    return MockEncoder()


@pytest.fixture
def write_shards(tmp_path: Path) -> Callable[..., Path]:
    """``write_shards(folder, {name: [T, n] codes}, entries=512, checksum="c" * 64)``, as the layout's page says."""

    def write(folder: str, clips: dict[str, Any], entries: int = 512, checksum: str = "c" * 64) -> Path:
        out = tmp_path / folder
        out.mkdir()
        codes = np.concatenate([np.asarray(one, "<u2") for one in clips.values()])
        data = save({"codes": codes, "times": np.zeros(len(codes))})
        (out / "00000.safetensors").write_bytes(data)
        videos, start = [], 0
        for name, one in clips.items():
            videos.append(Video(name, 1, start, len(one), None))
            start += len(one)
        lines = "".join(json.dumps(asdict(video)) + "\n" for video in videos).encode()
        (out / "videos.jsonl").write_bytes(lines)
        shard = Shard("00000.safetensors", len(codes), len(data), hashlib.sha256(data).hexdigest())
        settings = Settings("a:b", checksum, {}, entries, 32, None, None, 1, len(codes))
        manifest = Manifest(settings, True, codes.shape[1], len(codes), len(videos), len(lines),
                            hashlib.sha256(lines).hexdigest(), None, (shard,))  # fmt: skip
        (out / "manifest.json").write_text(manifest.text())
        return out

    return write


@pytest.fixture
def make_context(tmp_path: Path) -> Callable[..., EvalContext]:
    def make(answer: Answer = read_the_prompt, **changes: Any) -> EvalContext:
        values: dict[str, Any] = {
            "generator": MockGenerator(answer),
            "scorer": None,
            "tokenizer": BytesTokenizer(),
            "vocabulary": Vocabulary(BytesTokenizer().size),
            "stage": "base",
            "stages": [make_stage("512", 512), make_stage("1024", 1024)],
            "out": tmp_path / "run" / "evals" / "needle",
            "seed": 7,
            "held_out": lambda: TEXT,
            "base_dir": tmp_path,
            "start_seq_len": 384,
        }
        return EvalContext(**{**values, **changes})

    return make


# -- a run on disk ---------------------------------------------------------------------------------------------------

LENGTHS = (256, 512, 1024, 2048, 4096)
STEPS = (80, 60, 50, 40)


def write_run(folder: Path, *, hostile: str = "", vision: bool = False) -> Path:
    """A finished run of four stages from 256 to 4096 tokens; ``hostile`` is put wherever text can come in.

    With ``vision`` it has what the suites of video and pictures write, too: clips of 17 tokens a frame.
    """
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{length}{hostile}" for length in LENGTHS[1:]]
    stages = [_stage_row(name, length, k) for k, (name, length) in enumerate(zip(names, LENGTHS[1:], strict=True))]
    (folder / "run.json").write_text(json.dumps(_run_json(stages, hostile)))
    _write_metrics(folder / "metrics.jsonl", names, random)
    _write_needles(folder / "evals", ["base", *names], random, hostile)
    if vision:
        _write_vision(folder / "evals", ["base", *names], random, hostile)
    samples = folder / "samples"
    samples.mkdir(exist_ok=True)
    long_prompt = "Ge1:1 In the beginning God created the heaven and the earth. " * 20
    rows = [
        {"stage": names[-1], "prompt": "Ge1:1 In the beginning", "tokens_per_second": 212.4,
         "text": f" was the word of the LORD,{hostile} and the children of Israel\nwent up to the house of God."},
        {"stage": names[-1], "prompt": long_prompt + hostile, "tokens_per_second": 198.0,
         "text": " And he said unto them, Go ye into the city."},
    ]  # fmt: skip
    (samples / "final.json").write_text(json.dumps(rows))
    return folder


def _stage_row(name: str, length: int, k: int) -> dict[str, Any]:
    return {
        "name": name, "seq_len": length, "rope": {"theta": 1e4 * 4.0 ** (k + 1), "factors": None}, "accumulate": 1,
        "tokens": STEPS[k] * 16_384, "batch_tokens": 16_384, "lr": 1e-3, "min_lr": 1e-4, "lr_schedule": "cosine",
        "warmup_steps": 5, "mesh": "1,1,1,4", "mix": {"text": 0.5, "needle": 0.5},
    }  # fmt: skip


def _run_json(stages: list[dict[str, Any]], hostile: str) -> dict[str, Any]:
    return {
        "name": f"quickstart{hostile}",
        "config": {
            "name": "quickstart", "seed": 0,
            "init": "tiny-base", "trainer": {"name": "jax", "dtype": "float32"},
            "context": {"name": "progressive", "lengths": list(LENGTHS[1:]), "theta": f"auto{hostile}"},
            "evals": [{"name": "needle", "samples": 20}], "optimizer": {"beta1": 0.9, "clip_norm": 1.0},
        },
        "origins": {"seed": "quickstart.toml:3", "trainer.name": "quickstart.toml:8", "init": f"-s init{hostile}"},
        "stages": stages,
        "plugins": [
            {"kind": "trainer", "name": "jax", "dist": "lwm-jax-ring", "version": "0.1.0"},
            {"kind": "attention", "name": f"jax-ring{hostile}", "dist": "lwm-jax-ring", "version": "0.1.0"},
            {"kind": "context", "name": "progressive", "dist": "lwm-context", "version": "0.1.0"},
            {"kind": "data", "name": "mix", "dist": "lwm-data", "version": "0.1.0"},
        ],
        "versions": {"python": "3.12.4", "jax": "0.10.2", f"numpy{hostile}": "2.3.1"},
        "status": "done", "summary": f"Extend a small model's context sixteen times{hostile}",
        "choices": [{
            "kind": "attention", "asked": "auto", "chosen": "jax-ring",
            "rejected": [{"name": "torch-ring", "reason": f"its framework is torch{hostile}"}],
        }],
        "machine": {"platform": f"Linux x86_64{hostile}", "cpu": "EPYC", "cores": 2},
        "start": {"seq_len": 256, "rope": {"theta": 10_000.0}},
        "model": {"hidden_size": 192, "num_layers": 6, "parameter_count": 4_213_440, "vocabulary": {"text_size": 4096}},
        "trainer": {"name": "jax", "devices": ["cpu:0"] * 4},
    }  # fmt: skip


def _write_metrics(path: Path, names: list[str], random: np.random.Generator) -> None:
    step, lines = 0, []
    for k, name in enumerate(names):
        for n in range(STEPS[k]):
            step += 1
            loss = 2.4 + 0.8 * np.exp(-n / 12) / (k + 1) - 0.12 * k + random.normal(0, 0.05)
            speed = (9_000 - 1_200 * k) * (0.2 if n == 0 else random.normal(1, 0.03))
            lines.append(json.dumps({
                "step": step, "stage": name, "stage_index": k, "stage_step": n, "tokens": step * 16_384, "loss": loss,
                "loss_text": loss, "grad_norm": 0.8, "lr": 1e-3 * min(1, (n + 1) / 5) * (1 - 0.9 * n / STEPS[k]),
                "step_seconds": 16_384 / speed, "tokens_per_second": speed, "mfu": 0.31 if k else None,
                "time": 1e9 + step,
            }))  # fmt: skip
    path.write_text("\n".join(lines) + "\n")


def _write_needles(folder: Path, stages: list[str], random: np.random.Generator, hostile: str) -> None:
    folder.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    for k, stage in enumerate(stages):
        for length in LENGTHS:
            count = 100 if length == LENGTHS[-1] and k in (0, len(stages) - 1) else 20
            for i in range(count):
                reach = 0.985 if length <= LENGTHS[k] else 0.35 if length == 2 * LENGTHS[k] else 0.03
                good = bool(random.random() < reach)
                answer = str(random.integers(10**6, 10**7))
                rows.append({
                    "stage": stage, "length": length, "depth": round((i % 10) / 9, 4), "needles": 1,
                    "retrieved": int(good), "correct": good, "answer": answer,
                    "response": f" {answer}" if good else f" 7777777{hostile}",
                })  # fmt: skip
    cells: dict[tuple[str, int], list[int]] = {}
    for row in rows:
        cells.setdefault((row["stage"], row["length"]), []).append(row["retrieved"])
    summary = [
        {"stage": stage, "length": length, "accuracy": sum(found) / len(found), "samples": len(found)}
        for (stage, length), found in cells.items()
    ]
    (folder / "needle.json").write_text(json.dumps({"rows": rows, "summary": summary}))


FRAMES = (8, 23, 53, 113, 233)
"""What fits 256 to 4096 tokens at 17 a frame and 119 beside them."""


def _write_vision(folder: Path, stages: list[str], random: np.random.Generator, hostile: str) -> None:
    words = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "white"]
    rows: list[dict[str, Any]] = []
    losses: list[dict[str, Any]] = []
    for k, stage in enumerate(stages):
        for reach, frames in enumerate(FRAMES):
            for i in range(40 if frames == FRAMES[-1] and k in (0, len(stages) - 1) else 16):
                answer = words[i % 8]
                likely = 0.95 if reach <= k else 0.125
                good, sure = bool(random.random() < likely - 0.12), bool(random.random() < likely)
                rows.append({
                    "stage": stage, "frames": frames, "length": 119 + 17 * frames, "depth": round((i % 5) / 4, 4),
                    "place": round((i % 5) / 4 * (frames - 1)), "retrieved": int(good), "correct": good,
                    "answer": answer, "response": f" {answer}" if good else f" none{hostile}",
                    "choice": answer if sure else words[(i + 3) % 8],
                })  # fmt: skip
        for before in (1, 2, 4, 8, 16, 32, 64, 128):
            nats = 6.1 - 0.25 * k - 0.12 * min(np.log2(before), k + 1.5) + random.normal(0, 0.01)
            losses.append({"stage": stage, "frames": before, "length": 14 + 17 * before, "nats": float(nats),
                           "uniform": float(np.log(512)), "samples": 16})  # fmt: skip
    summary = []
    for stage in stages:
        for frames in FRAMES:
            mine = [row for row in rows if (row["stage"], row["frames"]) == (stage, frames)]
            summary.append({
                "stage": stage, "frames": frames, "length": mine[0]["length"],
                "accuracy": sum(row["retrieved"] for row in mine) / len(mine),
                "choice_accuracy": sum(row["choice"] == row["answer"] for row in mine) / len(mine),
                "chance": 1 / 8, "samples": len(mine),
            })  # fmt: skip
    (folder / "video-needle.json").write_text(json.dumps({"rows": rows, "summary": summary}))
    (folder / "video-loss.json").write_text(json.dumps({"rows": [], "summary": losses}))
    told = {"frames": 32, "psnr": 24.183, "worst_psnr": 17.02, "ssim": 0.8125, "exact": 0, "codes_used": 431,
            "usage": 431 / 512, "perplexity": 204.4}  # fmt: skip
    (folder / "reconstruction.json").write_text(json.dumps({"rows": [], "summary": [told]}))
    _, frames = pictures("shape", 64)
    (folder / "reconstruction.png").write_bytes(side_by_side(frames, frames // 8 * 8 + 4))
    continued = [
        {"stage": stage, "written": 4, "codes_equal": 0.1234 * (k + 1), "psnr": 14.0 + k, "encoder_psnr": 24.183,
         "still_psnr": 15.5}
        for k, stage in enumerate(stages[2:])
    ]  # fmt: skip
    (folder / "video-continuation.json").write_text(json.dumps({"rows": [], "summary": continued}))
    frames = frames[:8]
    clip = Clip(frames, np.zeros((len(frames), 16), np.int32), frames // 8 * 8 + 4, 0)
    (folder / "video-continuation.png").write_bytes(sheet(clip, 4, [frames[4:] // 32 * 32 + 16] * len(continued)))


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str = "made-up", **changes: Any) -> Path:
        return write_run(tmp_path / name, **changes)

    return make
