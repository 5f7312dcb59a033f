"""``lwm plugins``: in a process of its own, among planted distributions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

PROGRAM = """
import argparse, sys
from lwm_core.cli.plugins import add_parser
from lwm_core.errors import LwmError
parser = argparse.ArgumentParser(prog="lwm")
add_parser(parser.add_subparsers(required=True))
args = parser.parse_args({argv!r})
try:
    code = args.run(args)
except LwmError as error:
    print("error:", error, file=sys.stderr)
    code = error.exit_code
print("LOADED", [m for m in ("jax", "torch", "numpy", "acme_ring") if m in sys.modules], file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture
def lwm(garden, python):
    """``lwm("plugins", "list", **environment)`` among the planted distributions only."""

    def run(*argv: str, **environment: str):
        environment.setdefault("LWM_PLUGINS", ",".join(garden.dists))
        return python(PROGRAM.format(argv=list(argv)), **environment)

    return run


def _rows(done) -> dict[str, dict]:
    assert done.returncode == 0, done.stderr
    return {row["name"]: row for row in json.loads(done.stdout) if row["dist"].startswith("acme-")}


def test_list_runs_no_plugin_code(garden, lwm, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    source = f"open({str(trace)!r}, 'a').write('ran')\nimport numpy\n"
    garden.plant("acme-ring", {"attention": {"ring": "acme_ring:ring"}}, {"acme_ring": source})
    done = lwm("plugins", "list")
    assert "ring" in done.stdout and "acme-ring" in done.stdout and "available" in done.stdout
    assert "LOADED []" in done.stderr
    assert not trace.exists()
    _rows(lwm("plugins", "list", "--check", "--json"))
    assert trace.exists()  # the trap works


def test_list_tells_every_state(garden, lwm) -> None:
    garden.attention("acme-fine", "acme_fine", "fine")
    garden.plant("acme-raises", {"attention": {"raises": "acme_raises:x"}}, {"acme_raises": "raise ValueError('boom')"})
    garden.plant("acme-hidden", {"attention": {"hidden": "acme_hidden:x"}}, {"acme_hidden": "1 / 0"}, version="0.3")
    garden.plant("acme-old", {"attention": {"old": "acme_old:x"}}, {"acme_old": ""}, requires=["lwm-core>=2,<3"])
    garden.plant("lwm-core", version="1.4.0")
    garden.attention("acme-needy", "acme_needy", "needy", "needs=('not_there_at_all',)")
    garden.attention("acme-off", "acme_off", "off")
    off = {"LWM_PLUGINS_DISABLE": "acme-off"}
    rows = _rows(lwm("plugins", "list", "--json", **off))
    states = {name: row["state"] for name, row in rows.items()}
    assert states == {
        "fine": "available", "raises": "broken", "hidden": "available", "old": "incompatible",
        "needy": "available", "off": "disabled",
    }  # fmt: skip
    assert "boom" in rows["raises"]["reason"]
    assert rows["old"]["reason"] == "needs lwm-core<3,>=2; installed: 1.4.0"
    checked = _rows(lwm("plugins", "list", "--json", "--check", **off))
    assert checked["hidden"]["state"] == "broken" and "ZeroDivisionError" in checked["hidden"]["traceback"]
    assert checked["hidden"]["dist"] == "acme-hidden" and checked["hidden"]["version"] == "0.3"
    assert checked["needy"]["state"] == "unusable" and checked["fine"]["state"] == "available"
    table = lwm("plugins", "list", "--kind", "attention", **off).stdout.splitlines()
    assert table[0].split() == ["kind", "name", "distribution", "version", "state", "reason"]
    assert next(line for line in table if " old " in line).split()[:5] == [
        "attention", "old", "acme-old", "1.0.0", "incompatible",
    ]  # fmt: skip
    done = lwm("plugins", "list", "--kind", "atention")
    assert done.returncode == 2 and "did you mean 'attention'" in done.stderr


def test_show_tells_spec_and_options(garden, lwm) -> None:
    garden.attention(
        "acme-ring", "acme_ring", "ring",
        "options='acme_options:Options', needs=('json',), framework='jax', capabilities={'masks': ('causal', 'full')}",
    )  # fmt: skip
    (garden.folder / "acme_options.py").write_text(
        "from pydantic import BaseModel, ConfigDict, Field\nclass Options(BaseModel):\n"
        "    model_config = ConfigDict(extra='forbid')\n"
        "    block_size: int = Field(512, description='tokens a block')\n"
        "    layout: str | None = None\n    must: bool\n"
    )
    for name in ("ring", "acme-ring:ring", "acme-ring"):
        done = lwm("plugins", "show", name)
        assert done.returncode == 0, done.stderr
        for text in ("acme-ring 1.0.0", "causal, full", "block_size", "512", "tokens a block", "string | null"):
            assert text in done.stdout
        assert "(required)" in done.stdout
    (plugin,) = json.loads(lwm("plugins", "show", "ring", "--json").stdout)
    assert plugin["spec"]["framework"] == "jax" and plugin["state"] == "available"
    assert plugin["options"]["properties"]["block_size"]["default"] == 512


def test_show_of_what_is_broken_absent_or_misspelt(garden, lwm) -> None:
    garden.plant("acme-bad", {"attention": {"bad": "acme_bad:x"}}, {"acme_bad": "1 / 0"}, version="0.0.3")
    done = lwm("plugins", "show", "bad")
    assert done.returncode == 0
    assert "acme-bad 0.0.3" in done.stdout and "broken: failed to import: ZeroDivisionError" in done.stdout
    assert "Traceback" in done.stdout and "acme_bad.py" in done.stdout
    done = lwm("plugins", "show", "baad")
    assert done.returncode == 2 and "did you mean 'bad'" in done.stderr


def test_why_explains_every_candidate(garden, lwm) -> None:
    garden.attention("acme-a", "acme_a", "aaa", "framework='torch', priority=9")
    garden.attention("acme-b", "acme_b", "bbb", "framework='jax', priority=5")
    garden.plant("acme-c", {"attention": {"ccc": "acme_c:x"}}, {"acme_c": "1 / 0"})
    deny = {"LWM_PLUGINS_DISABLE": "lwm-jax-ring,lwm-torch-ring"}
    answer = json.loads(lwm("plugins", "why", "attention", "-r", "framework=jax", "--json", **deny).stdout)
    assert answer["chosen"]["name"] == "bbb"
    reasons = {row["name"]: row["reason"] for row in answer["rejected"]}
    assert reasons["aaa"] == "is for torch, not jax"
    assert reasons["ccc"] == "broken: failed to import: ZeroDivisionError: division by zero"
    done = lwm("plugins", "why", "attention", **deny)
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert "chosen" in lines["aaa"] and "fits, priority 9" in lines["aaa"]
    assert "priority 5 is below 9 of aaa" in lines["bbb"]
    done = lwm("plugins", "why", "attention", "-r", "head_dim=64", "-r", "masks=causal,full", **deny)
    assert done.returncode == 1 and "states no masks" in done.stdout
    assert lwm("plugins", "why", "nonsense").returncode == 2
    assert lwm("plugins", "why", "attention", "-r", "framework").returncode == 2


def test_a_plugin_that_imports_jax_costs_the_listing_nothing(garden, lwm) -> None:
    pytest.importorskip("numpy")
    garden.plant("acme-ring", {"attention": {"ring": "acme_ring:ring"}}, {"acme_ring": "import jax, torch, numpy\n"})
    for verb in (("list",), ("list", "--json")):
        assert "LOADED []" in lwm("plugins", *verb).stderr


def test_the_parser_help_loads_nothing(python) -> None:
    done = python(
        """
        import argparse, sys
        from lwm_core.cli.plugins import add_parser
        parser = argparse.ArgumentParser(prog="lwm")
        add_parser(parser.add_subparsers())
        parser.format_help()
        heavy = ("rich", "pydantic", "pluggy", "importlib.metadata", "lwm_core.registry")
        print([m for m in heavy if m in sys.modules])
        """
    )
    assert done.stdout.strip() == "[]", done.stderr
