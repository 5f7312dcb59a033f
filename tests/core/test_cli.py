"""The command from outside: exit codes, one line an error, what each verb prints."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lwm_core.builtins.byte_tokens import BytesTokenizer
from lwm_core.run.streaming import stream_text

Write = Callable[..., Path]


@pytest.fixture
def ran(lwm: Any, small: Write) -> Path:
    """A finished run in ``r``."""
    done = lwm("run", str(small(evals='{name = "tally"}')), "--out", "r")
    assert done.returncode == 0, done.stderr
    return lwm.cwd / "r"


def error_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_help_names_every_verb_and_plugin_verbs_without_importing_them(lwm: Any) -> None:
    text = lwm("--help").stdout
    some = ("run", "resume", "eval", "generate", "chat", "report", "recipes", "config", "plugins", "doctor", "greet")
    for verb in some:
        assert f"  {verb} " in text
    assert "lwm-standin 0.1.0" in text


def test_no_verb_prints_help_and_version_is_the_distributions(lwm: Any) -> None:
    assert lwm().stdout.startswith("usage: lwm")
    assert lwm("--version").stdout == "lwm 0.1.0\n"


@pytest.mark.parametrize("words", [("bogus",), ("run",), ("run", "a", "--bogus"), ("generate", "r", "sound")])
def test_wrong_words_exit_2(lwm: Any, words: tuple[str, ...]) -> None:
    done = lwm(*words)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.startswith("usage: lwm")


def test_a_plugins_verb_is_loaded_when_it_is_called(lwm: Any) -> None:
    done = lwm("greet", "you")
    assert (done.returncode, done.stdout) == (0, "hello you\n")
    kept_out = lwm("greet", "you", LWM_PLUGINS="")
    assert kept_out.returncode == 2 and "greet" not in kept_out.stdout and len(error_lines(kept_out.stderr)) == 1


def test_run_prints_where_everything_is_and_json_on_request(lwm: Any, small: Write) -> None:
    done = lwm("run", str(small()), "--out", "r", "--quiet", "--json", STANDIN_REPORT="1")
    assert done.returncode == 0 and done.stderr == ""
    told = json.loads(done.stdout)
    assert told["steps"] == 15 and told["status"] == "done" and told["report"] == "r/report.html"
    again = lwm("resume", "r")
    assert again.returncode == 0 and "was finished before, 15 steps" in again.stdout


def test_plain_lines_where_there_is_no_terminal(lwm: Any, small: Write) -> None:
    done = lwm("run", str(small()), "--out", "r")
    lines = done.stderr.splitlines()
    assert lines[0] == "stage short: 32 tokens a row, 10 steps"
    assert [line.partition(" ·")[0] for line in lines[1:3]] == ["short 5/10", "short 10/10"]
    assert "tok/s" in lines[1] and lines[1].endswith("left")
    assert done.stdout == f"r: done, 15 steps, loss {_loss(lwm.cwd / 'r'):.4f}; the model is in r/model\n"


def _loss(run: Path) -> float:
    return float(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["loss"])


@pytest.mark.parametrize(
    ("override", "code", "part"),
    [
        ("trainer.step_second=1", 2, "did you mean step_seconds?"),
        ("stagess=3", 2, "unknown key; did you mean stages?"),
        ("seed=soon", 2, "expected a whole number, got 'soon'"),
        ("trainer.name=jaxx", 2, "trainer 'jaxx' is unknown"),
        ("trainer.devices=3", 2, "sequence length 32 is not a multiple of 6"),
        ("stages.0.mesh=1,1,1,8", 2, "needs 8 devices, but 1 are here"),
        ("data.path=gone.txt", 1, "gone.txt: no such file"),
        ("data.path=empty.txt", 1, "is empty"),
        ("trainer.nan_at=6", 1, "loss is nan at step 6"),
        ("trainer.full_at=1", 1, "the disk is full"),
    ],
)
def test_wrong_use_is_one_line_and_an_exit_code(lwm: Any, small: Write, override: str, code: int, part: str) -> None:
    (lwm.cwd / "empty.txt").write_text("")
    done = lwm("run", str(small()), "--out", "r", "-s", override)
    lines = error_lines(done.stderr)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert any(part in line for line in lines), done.stderr
    assert len(lines) == (2 if "devices=3" in override else 1)
    if code == 2 or "data" in override:
        assert not (lwm.cwd / "r").exists()


def test_a_mistake_in_a_file_is_told_with_its_line(lwm: Any, small: Write) -> None:
    path = small(trainer="step_second = 1")
    done = lwm("run", path.name, "--out", "r")
    number = next(n for n, line in enumerate(path.read_text().splitlines(), 1) if "step_second" in line)
    assert done.stderr.startswith(f"error: small.toml:{number}: trainer.step_second: unknown option of 'standin'")
    gone = lwm("run", str(small()), "-s", "data.path=gone.txt").stderr
    assert gone.startswith(f"error: {path}:") and "data.path" in gone


@pytest.mark.parametrize("verb", ["resume", "eval", "report", "chat", "generate text --prompt a"])
def test_a_folder_that_is_no_run(lwm: Any, verb: str) -> None:
    name, *more = verb.split()
    for folder, part in (("nowhere", "no such folder"), (".", "there is no run.json in it")):
        done = lwm(name, folder, *more)
        assert done.returncode == 2 and part in done.stderr and len(error_lines(done.stderr)) == 1


def test_an_existing_folder_is_refused(lwm: Any, small: Write, ran: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in ran.rglob("*"))
    done = lwm("run", str(small()), "--out", "r")
    assert done.returncode == 2 and "continue it with lwm resume r, or choose another folder" in done.stderr
    assert sorted((path, path.stat().st_mtime_ns) for path in ran.rglob("*")) == before


def test_debug_shows_the_traceback(lwm: Any, small: Write) -> None:
    assert "Traceback" in lwm("run", "nowhere.toml", "--out", "r", LWM_DEBUG="1").stderr
    assert "Traceback" in lwm("--debug", "run", "nowhere.toml").stderr
    assert "Traceback" not in lwm("run", "nowhere.toml").stderr


def test_what_a_disk_refuses_is_one_line(lwm: Any, small: Write) -> None:
    """A folder below a file, a name that is too long, and standard output on a full disk."""
    for out, part in (("small.toml/r", "small.toml/r: Not a directory"), ("r" * 300, "File name too long")):
        done = lwm("run", str(small()), "--out", out)
        assert done.returncode == 1 and part in done.stderr and len(error_lines(done.stderr)) == 1, done.stderr
        assert len(done.stderr.splitlines()) == 1
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full:
            done = subprocess.run(lwm.arguments("greet", "you"), cwd=lwm.cwd, env=lwm.env, stdout=full,
                                  stderr=subprocess.PIPE, text=True, check=False)  # fmt: skip
        assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Also an OSError, where it is neither of a file nor of a disk."""
    from lwm_core.cli import doctor, main

    def refused(args: Any) -> int:
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(doctor, "run_doctor", refused)
    with pytest.raises(ConnectionRefusedError):
        main(["doctor"])
    assert capsys.readouterr().err == ""


def test_no_plugins_means_the_cores_own(lwm: Any, small: Write) -> None:
    done = lwm("run", str(small()), "--out", "r", "--no-plugins")
    assert done.returncode == 2 and "--no-plugins" in done.stderr


def test_a_value_of_the_run_can_be_overridden_for_once(lwm: Any, ran: Path) -> None:
    """For the reading alone: what run.json says stays, and a mistake is told as in any configuration."""
    words = ("generate", "r", "text", "--prompt", "And God", "--max-new-tokens", "3", "--json")
    before = (ran / "run.json").read_bytes()
    plain, other = (json.loads(lwm(*words, *more).stdout) for more in ((), ("-s", "trainer.token_seconds=0.3")))
    assert plain["text"] == other["text"] and other["tokens_per_second"] < 4  # it sleeps before each token
    assert (ran / "run.json").read_bytes() == before
    for verb in (words, ("chat", "r")):
        wrong = lwm(*verb, "-s", "trainer.token_second=0.3")
        assert wrong.returncode == 2 and "trainer.token_second" in wrong.stderr and "token_seconds" in wrong.stderr
        assert len(error_lines(wrong.stderr)) == 1


def test_generate_writes_and_is_seeded(lwm: Any, ran: Path) -> None:
    words = ("generate", "r", "text", "--prompt", "And God", "--max-new-tokens", "12", "--json")
    first, same, other = (json.loads(lwm(*words, "--seed", seed).stdout) for seed in ("1", "1", "2"))
    assert first["text"] == same["text"] != other["text"]
    assert first["tokens"] == 12 and first["source"] == "r/model"
    assert lwm(*words[:-1], "--seed", "1").stdout == first["text"] + "\n"
    assert "--top-p is 3.0; expected above 0" in lwm(*words, "--top-p", "3").stderr


@pytest.mark.parametrize("stops", [[], ["earth"], ["\n"], ["xyz", "he "]])
def test_streamed_text_is_the_whole_text_up_to_the_stop(stops: list[str]) -> None:
    tokenizer = BytesTokenizer()
    text = "Am Anfang schuf Gott – den Himmel; the earth\n und das Wasser 水"
    pieces = list(stream_text(iter(tokenizer.encode(text)), tokenizer.decode, stops))
    ends = [text.index(stop) for stop in stops if stop in text]
    assert "".join(pieces) == text[: min(ends, default=len(text))]
    assert len(pieces) > 10 and not any("\ufffd" in piece for piece in pieces)


def test_eval_runs_one_suite_and_names_the_others(lwm: Any, ran: Path) -> None:
    done = lwm("eval", "r", "--json", "--quiet")
    [row] = json.loads(done.stdout)["tally"]
    assert row["stage"] == "long" and row["samples"] == 4
    assert "no suite 'needle'; expected one of tally" in lwm("eval", "r", "--suite", "needle").stderr


def test_report_asks_the_plugins(lwm: Any, ran: Path) -> None:
    assert lwm("report", "r", STANDIN_REPORT="1").stdout == "r/report.html\n"
    none = lwm("report", "r")
    assert none.returncode == 2 and "pip install lwm-evals" in none.stderr


def test_doctor_tells_each_plugins_state(lwm: Any, standin_site: Path, tmp_path: Path, planted: Any) -> None:
    site = tmp_path / "more"
    planted(site, "lwm-broken", {"lwm.trainer.v1": {"broken": "lwm_broken:trainer"}})
    (site / "lwm_broken.py").write_text("raise RuntimeError('no luck')\n")
    both = {"PYTHONPATH": f"{standin_site}:{site}", "LWM_PLUGINS": "lwm-standin,lwm-broken"}
    done = lwm("doctor", "--json", **both)
    states = {one["name"]: (one["state"], one["reason"]) for one in json.loads(done.stdout)["plugins"]}
    assert done.returncode == 1 and states["tally"] == ("available", "")
    assert states["broken"][0] == "broken" and "no luck" in states["broken"][1]
    assert "python " in lwm("doctor").stdout
