"""``--hardware FILE``: what it says is what is planned with, and what is wrong with it is told in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from plan_cases import llama, stage

from lwm_plan.hardware_file import read_hardware
from lwm_plan.job import Job
from lwm_plan.stage_plan import evaluate

GOOD = 'name = "mine"\npeak_flops = 4e14\nmemory = 9e10\nmemory_bandwidth = 3e12\n'
Run = Any


@pytest.fixture
def written(tmp_path: Path) -> Any:
    """Write a file of this text; gives its path."""

    def write(text: str) -> str:
        path = tmp_path / "machine.toml"
        path.write_text(text)
        return str(path)

    return write


def test_a_file_is_planned_like_the_table(written: Any) -> None:
    """v5p's own figures in a file give v5p's plan."""
    told = read_hardware("v5p-128")
    device = told.device
    path = written(
        f'name = "v5p"\ndevices = 64\npeak_flops = {device.peak_flops}\nmemory = {device.memory}\n'
        f"memory_bandwidth = {device.memory_bandwidth}\nlink = {device.link}\n"
    )
    given = stage(1 << 17, 8, "1,4,4,4")
    mine, theirs = (evaluate(Job(llama()), given, machine) for machine in (read_hardware(path), told))
    assert (mine.timing, mine.memory) == (theirs.timing, theirs.memory)


def test_shares_of_the_peak_are_the_files_own(written: Any) -> None:
    given, job = stage(1 << 15, 1, "1,1,1,1"), Job(llama(name="1b"))
    plain, shared = (
        evaluate(job, given, read_hardware(written(GOOD + more)))
        for more in ("", "matrix_share = 0.375\nattention_share = 0.1\n")
    )
    assert shared.timing.matrices == pytest.approx(2 * plain.timing.matrices)
    assert shared.timing.attention == pytest.approx(5 * plain.timing.attention)
    assert shared.timing.executed_flops == pytest.approx(plain.timing.executed_flops)


def test_the_command_takes_a_file(lwm: Run, written: Any) -> None:
    path = written(GOOD + 'devices = 4\nlink = 9e10\nsource = "made up"\n')
    code, out, _ = lwm("lwm-text", "--hardware", path, "--stage", "32K", "--json", "-s", 'stages.0.mesh="1,1,4,1"')
    facts = json.loads(out)
    assert (facts["hardware"], facts["devices"], facts["device"]) == (path, 4, "mine") and code in (0, 1)
    code, out, _ = lwm("lwm-text", "--hardware", path, "--stage", "32K", "--explain", "-s", 'stages.0.mesh="1,1,4,1"')
    assert "(0.75·4e+14)" in out and "(made up)" in out


def test_the_page_has_a_file_that_works(lwm: Run, written: Any) -> None:
    """docs/how-to/plan.md, as it stands there; the recipe's trainer is one that is installed."""
    pytest.importorskip("lwm_jax_ring")
    page = (Path(__file__).parents[3] / "docs" / "how-to" / "plan.md").read_text()
    path = written(page.split("```toml\n")[1].split("```")[0])
    assert "lwm plan first-run --hardware machine.toml" in page
    code, out, _ = lwm("first-run", "--hardware", path)
    assert code == 0 and "1 devices of 0.09 TFLOP/s" in out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read: No such file"),
        ("name = ", "is no TOML"),
        (GOOD + "speed = 3\n", "speed: Extra inputs are not permitted; the keys are name, peak_flops"),
        (GOOD.replace("9e10", "-1.0"), "memory: Input should be greater than 0"),
        ('name = "x"\n', "peak_flops: Field required; memory: Field required"),
        (GOOD + "matrix_share = 1.2\n", "matrix_share: Input should be less than or equal to 1"),
        (GOOD + "devices = 8\n", "link is missing; 8 devices"),
        (GOOD + "devices = 16\nlink = 1e9\nisland = 8\n", "network is missing"),
    ],
)
def test_a_wrong_file_is_one_line(lwm: Run, written: Any, tmp_path: Path, text: str | None, said: str) -> None:
    path = str(tmp_path / "none.toml") if text is None else written(text)
    code, out, err = lwm("lwm-text", "--hardware", path)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: --hardware {path}: ") and err.count("\n") == 1 and said in err
