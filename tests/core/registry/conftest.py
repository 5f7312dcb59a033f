"""Real distributions, planted: a module and a ``.dist-info`` folder on ``sys.path``, as pip would leave them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import dedent

import pytest

from lwm_core.registry import KINDS, Registry, refresh

REPOSITORY = Path(__file__).parents[3]
HEADER = "from lwm_core.registry.spec import PluginSpec\n"


class Garden:
    """A folder of planted distributions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dists: list[str] = []

    def plant(
        self,
        dist: str,
        entry_points: Mapping[str, Mapping[str, str]] | None = None,
        modules: Mapping[str, str] | None = None,
        *,
        version: str = "1.0.0",
        requires: Sequence[str] = (),
        folder: Path | None = None,
    ) -> None:
        """``entry_points``: kind (or a whole group) → name → value. ``modules``: file name without .py → source."""
        folder = folder or self.folder
        for module, source in (modules or {}).items():
            path = folder / (module.replace(".", "/") + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(dedent(source))
        info = folder / f"{dist.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        lines = ["Metadata-Version: 2.1", f"Name: {dist}", f"Version: {version}"]
        (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {line}" for line in requires), ""]))
        text = ""
        for kind, names in (entry_points or {}).items():
            text += f"[{KINDS.get(kind, kind)}]\n" + "".join(f"{n} = {v}\n" for n, v in names.items())
        (info / "entry_points.txt").write_text(text)
        self.dists.append(dist)
        refresh()

    def attention(self, dist: str, module: str, name: str, fields: str = "", **kwargs: object) -> None:
        """A well-behaved attention plugin whose factory is the module's function ``build``."""
        source = HEADER + f"ring = PluginSpec(name={name!r}, summary='x', factory='{module}_impl:build', {fields})\n"
        impl = f"def build():\n    return {dist + ':' + name!r}\ndef probe_bad():\n    return ['no device']\n"
        self.plant(dist, {"attention": {name: f"{module}:ring"}}, {module: source, module + "_impl": impl}, **kwargs)  # type: ignore[arg-type]

    def registry(self, **kwargs: object) -> Registry:
        """A registry that sees the planted distributions and none of the machine's own."""
        from lwm_core.registry.scan import installed, normalise

        ours = {normalise(dist) for dist in self.dists}
        return Registry(found=[c for c in installed() if c.dist in ours], **kwargs)  # type: ignore[arg-type]


@pytest.fixture
def garden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Garden]:
    """Planted distributions on this process's ``sys.path``; their modules are forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    for variable in ("LWM_PLUGINS", "LWM_PLUGINS_DISABLE", "LWM_PLUGINS_STRICT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield Garden(folder)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "") or "").startswith(str(tmp_path)):
            del sys.modules[name]
    refresh()


@pytest.fixture
def python(garden: Garden) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a Python program with the planted distributions on its path."""

    def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(garden.folder), str(REPOSITORY)])
        env = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **environment}
        return subprocess.run(
            [sys.executable, "-c", dedent(program)], env=env, capture_output=True, text=True, timeout=60, check=False
        )

    return run
