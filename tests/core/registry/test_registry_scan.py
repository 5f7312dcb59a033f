"""Discovery: planted distributions are found without running them, and an independent reader agrees."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest

from lwm_core.registry import KINDS, refresh
from lwm_core.registry.scan import installed, normalise
from lwm_core.registry.source import source_fault


def _ours(*dists: str) -> list:
    return [c for c in installed() if c.dist in dists]


def test_importing_the_registry_is_cheap(python) -> None:
    done = python(
        """
        import sys
        import lwm_core.registry, lwm_core.cli.plugins
        heavy = ("pluggy", "pydantic", "numpy", "jax", "torch", "rich", "packaging", "importlib.metadata")
        print([name for name in heavy if name in sys.modules])
        """
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_lazy_names_are_real_and_unknown_ones_are_not() -> None:
    import lwm_core.registry as registry

    assert all(getattr(registry, name) is not None for name in registry.__all__)
    assert len(set(registry.__all__)) == len(registry.__all__)
    with pytest.raises(AttributeError, match="hookimp"):
        _ = registry.hookimp


def test_a_planted_plugin_is_found_and_not_run(garden) -> None:
    garden.plant(
        "Acme_Ring", {"attention": {"ring": "acme_ring:ring"}}, {"acme_ring": "raise SystemExit(3)"}, version="2.1"
    )
    (found,) = _ours("acme-ring")
    assert (found.kind, found.name, found.version, found.value) == ("attention", "ring", "2.1", "acme_ring:ring")
    assert found.state == "available" and found.label == "acme-ring:ring"
    assert "acme_ring" not in sys.modules


def test_the_scan_is_cached_until_refreshed(garden) -> None:
    garden.plant("acme-a", {"data": {"a": "acme_a:x"}})
    first = installed()
    assert installed() is first
    refresh()
    assert installed() is not first and installed() == first


def test_a_path_that_is_there_twice_gives_each_plugin_once(garden, tmp_path: Path, monkeypatch) -> None:
    garden.plant("acme-a", {"data": {"a": "acme_a:x"}})
    link = tmp_path / "lib64"
    link.symlink_to(garden.folder)
    monkeypatch.setattr(sys, "path", [*sys.path, str(garden.folder), str(link)])
    refresh()
    assert len(_ours("acme-a")) == 1


def test_the_second_copy_of_a_distribution_is_shadowed(garden, tmp_path: Path, monkeypatch) -> None:
    garden.plant("acme-a", {"data": {"a": "acme_a:x"}}, version="2.0")
    garden.plant("acme-a", {"data": {"a": "acme_a:x"}}, version="1.0", folder=tmp_path / "later")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "later")])
    refresh()
    states = {c.version: c.state for c in _ours("acme-a")}
    assert states == {"2.0": "available", "1.0": "shadowed"}
    assert "acme-a 2.0" in next(c.reason for c in _ours("acme-a") if c.version == "1.0")


def test_a_copy_without_plugins_shadows_too(garden, tmp_path: Path, monkeypatch) -> None:
    garden.plant("acme-a", version="2.0")
    garden.plant("acme-a", {"data": {"a": "acme_a:x"}}, version="1.0", folder=tmp_path / "later")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "later")])
    refresh()
    assert [(c.version, c.state) for c in _ours("acme-a")] == [("1.0", "shadowed")]


def test_malformed_entry_points_are_that_distributions_own_trouble(garden) -> None:
    garden.plant("acme-good", {"data": {"good": "acme_good:x"}})
    garden.plant("acme-torn", {"data": {"torn": "acme_torn:x"}})
    path = next(garden.folder.glob("acme_torn*")) / "entry_points.txt"
    path.write_text("[lwm.data.v1]\nno equals sign\n")
    garden.plant("acme-odd", {"data": {"Odd": "acme_odd:x", "novalue": "acme_odd"}, "lwm.atention.v1": {"a": "b:c"}})
    states = {(c.dist, c.name): (c.state, c.reason) for c in _ours("acme-good", "acme-torn", "acme-odd")}
    assert states["acme-good", "good"][0] == "available"
    assert states["acme-torn", "?"][0] == "broken"
    assert states["acme-odd", "Odd"][0] == "broken" and "kebab" in states["acme-odd", "Odd"][1]
    assert states["acme-odd", "novalue"][0] == "broken"
    assert states["acme-odd", "a"][0] == "incompatible" and "'lwm.attention.v1'" in states["acme-odd", "a"][1]


def test_a_plugin_may_serve_two_versions_of_the_interface(garden) -> None:
    garden.plant("acme-both", {"lwm.data.v1": {"both": "b:one"}, "lwm.data.v2": {"both": "b:two"}})
    assert [(c.kind, c.value) for c in _ours("acme-both")] == [("data", "b:one")]


def test_one_distribution_that_offers_a_name_twice(garden) -> None:
    garden.plant("acme-twice")
    path = next(garden.folder.glob("acme_twice*")) / "entry_points.txt"
    path.write_text("[lwm.data.v1]\na = m:one\na = m:one\na = m:two\n")
    refresh()
    assert [(c.value, c.state) for c in _ours("acme-twice")] == [("m:one", "available"), ("m:two", "shadowed")]


def test_the_entrypoints_package_agrees(garden) -> None:
    """An independent reader of the same files, for the planted distributions and all that this machine has."""
    entrypoints = pytest.importorskip("entrypoints")
    garden.plant("acme-a", {"attention": {"ring": "acme_a:ring"}, "hooks": {"tell": "acme_a.hooks:spec"}})
    garden.plant("acme-b", {"attention": {"ring": "acme_b:ring"}, "console_scripts": {"x": "acme_b:main"}})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = {
            (kind, ep.name, f"{ep.module_name}:{ep.object_name}", normalise(ep.distro.name))
            for kind, group in KINDS.items()
            for ep in entrypoints.get_group_all(group)
        }
    ours = {(c.kind, c.name, c.value, c.dist) for c in installed() if c.kind in KINDS and c.state != "shadowed"}
    assert ours == theirs
    assert len([row for row in ours if row[3] in ("acme-a", "acme-b")]) == 3


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("x = 1\n", ""),
        ("raise RuntimeError('boom')\n", "line 1: raises on import: raise RuntimeError('boom')"),
        ("import json, not_there_at_all.sub\n", "line 1: imports 'not_there_at_all', which is not installed"),
        ("from not_there_at_all import x\n", "imports 'not_there_at_all'"),
        ("def f(:\n", "line 1: SyntaxError"),
        ("try:\n    import not_there_at_all\nexcept ImportError:\n    pass\n", ""),
        ("def f():\n    raise RuntimeError\n", ""),
        ("if False:\n    raise RuntimeError\n", ""),
    ],
)
def test_a_look_at_the_source_agrees_with_the_import(garden, source: str, fault: str) -> None:
    (garden.folder / "acme_look.py").write_text(source)
    assert fault in source_fault("acme_look:spec") if fault else source_fault("acme_look:spec") == ""
    assert "acme_look" not in sys.modules
    if fault:
        with pytest.raises((RuntimeError, ImportError, SyntaxError)):
            __import__("acme_look")
    else:
        __import__("acme_look")


def test_a_look_reaches_into_packages_without_running_them(garden) -> None:
    package = garden.folder / "acme_pack"
    (package / "sub").mkdir(parents=True)
    (package / "space").mkdir()
    (package / "sub" / "__init__.py").touch()
    (package / "space" / "x.py").touch()
    (package / "__init__.py").write_text("import sys; sys.acme_pack_ran = True\n")
    (package / "sub" / "light.py").write_text("raise ValueError\n")
    assert source_fault("acme_pack.sub.light:spec") == "acme_pack.sub.light line 1: raises on import: raise ValueError"
    assert source_fault("acme_pack.nowhere:spec") == "module 'acme_pack.nowhere' does not exist"
    assert source_fault("acme_pack.space.x:spec") == ""
    assert source_fault("acme_nowhere:spec") == "module 'acme_nowhere' is not installed"
    assert not hasattr(sys, "acme_pack_ran")


def test_scan_results_are_plain_data(garden) -> None:
    """Workers get them through JSON or pickle."""
    import dataclasses

    garden.plant("acme-a", {"data": {"a": "acme_a:x"}}, requires=["numpy>=1"])
    (found,) = _ours("acme-a")
    assert json.loads(json.dumps(dataclasses.asdict(found)))["requires"] == ["numpy>=1"]
