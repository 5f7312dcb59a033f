"""The whole system with the Torch trainer as several real processes, as a launcher starts them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("lwm_torch_ring")

WRONG = {
    (2, "-s context.mesh=1,1,1,3"): "needs 3 devices, but 2 are here",
    (3, ""): "do not divide",
    (1, "-s context.mesh=1,1,1,4"): "a process is started for each device: torchrun --nproc-per-node",
    (1, "-s attention.strategy=rings"): "attention.strategy",
    (1, "-s attention.name=jax-ring"): "jax",
    (2, "-s attention.name=full-only"): "attention 'full-only' (lwm-full-only 0.1.0) does not fit: has no masks causal "
    "(it has full); name another attention or 'auto'",
}

FULL_ONLY = """
from lwm_core.registry import PluginSpec

attention = PluginSpec(
    name="full-only", summary="No causal mask", factory="nowhere:factory", framework="torch",
    capabilities={"masks": ("full",), "gqa": True},
)
"""
"""A backend that is refused by what it states alone: its factory cannot even be imported."""


@pytest.mark.parametrize(("world", "override"), WRONG)
def test_wrong_use_is_one_clear_error(
    world: int, override: str, ranks: Any, tmp_path: Path, planted: Callable[..., None]
) -> None:
    (tmp_path / "site" / "full_only.py").write_text(FULL_ONLY)
    planted(tmp_path / "site", "lwm-full-only", {"lwm.attention.v1": {"full-only": "full_only:attention"}})
    words = override.split(" ", 1) if override else []
    processes = ranks.start(world, "run", "extend.toml", "--out", "out", *words)
    said = ranks.finish(processes)
    assert all(process.returncode in (1, 2) for process in processes), said
    assert WRONG[world, override] in said[0][1], said[0][1]
    assert "Traceback" not in "".join(errors for _, errors in said)
    if "full-only" in override:
        assert [line for line in said[0][1].splitlines() if not line.startswith("note: ")][1:] == []
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.slow
def test_torchrun_starts_it(ranks: Any, tmp_path: Path) -> None:
    """The launcher itself, with the command as the how-to has it."""
    short = ("-s", "context.tokens=[4096,4096]", "-s", "evals=[]")
    process = ranks.launch(2, "run", "extend.toml", "--out", "out", *short, "--json")
    [(told, errors)] = ranks.finish([process])
    assert process.returncode == 0, errors
    assert json.loads(told)["steps"] == 4
    assert json.loads((tmp_path / "out" / "run.json").read_text())["processes"] == 2
