"""The command answers at once, whatever is installed, and nothing heavy is imported for it."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BUDGET = 16
"""Times the processor time of bare Python's own start: 0.25 s where that takes 16 ms; 11 was measured there."""
POISON_BUDGET = 2
"""Of the same, more with a plugin whose module takes three seconds."""
HELP = "import sys; from lwm_core.cli import main; sys.exit(main(['--help']))"


def best(code: str, env: Mapping[str, str], tries: int = 9) -> float:
    """The least processor time of several runs: what else the machine does hardly adds to it."""
    times = []
    for _ in range(tries):
        before = processor_time()
        subprocess.run([sys.executable, "-c", code], env=dict(env), check=True, capture_output=True)
        times.append(processor_time() - before)
    return min(times)


def processor_time() -> float:
    """Seconds of all children that have ended; ``os.times`` counts them in hundredths."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_is_within_its_budget_and_a_heavy_plugin_costs_it_nothing(lwm: Any, tmp_path: Path, planted: Any) -> None:
    site = tmp_path / "poison"
    kinds = ("trainer", "attention", "hooks", "cli", "eval")
    planted(site, "lwm-poison", {f"lwm.{kind}.v1": {"poison": "lwm_poison:spec"} for kind in kinds})
    heavy = (
        "import time, pathlib\nend = time.process_time() + 3\nwhile time.process_time() < end:\n    pass\n"
        "pathlib.Path(__file__ + '.ran').touch()\n"
    )
    (site / "lwm_poison.py").write_text(heavy)
    bare = best("pass", lwm.env)
    clean = best(HELP, lwm.env)
    poisoned = best(HELP, {**lwm.env, "PYTHONPATH": f"{lwm.env['PYTHONPATH']}:{site}"})
    assert not (site / "lwm_poison.py.ran").exists()
    assert clean <= BUDGET * bare, f"lwm --help takes {1000 * clean:.0f} ms, bare Python {1000 * bare:.0f}"
    assert poisoned - clean <= POISON_BUDGET * bare, f"a heavy plugin costs {1000 * (poisoned - clean):.0f} ms"


def test_neither_help_nor_the_core_imports_a_framework(lwm: Any) -> None:
    heavy = "('jax', 'torch', 'flax', 'numpy', 'pydantic', 'rich', 'pluggy')"
    code = f"""
import sys
from lwm_core.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
assert not [name for name in {heavy} if name in sys.modules], [name for name in {heavy} if name in sys.modules]
import lwm_core.pipeline, lwm_core.run, lwm_core.weights, lwm_core.progress, lwm_core.builtins.text_rows
assert not [name for name in ("jax", "torch", "flax") if name in sys.modules]
"""
    subprocess.run([sys.executable, "-c", code], env=lwm.env, check=True, capture_output=True)
