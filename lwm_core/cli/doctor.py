"""``lwm doctor``: what is here: Python, packages, devices, and what state each plugin is in."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the ``lwm`` command."""
    parser = subparsers.add_parser("doctor", help="check this machine and every installed plugin", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print {machine, packages, plugins}")
    parser.set_defaults(run=run_doctor)


def run_doctor(args: argparse.Namespace) -> int:
    """Import every plugin and run its probe; 1 where one is broken or incompatible."""
    facts = examine()
    if args.json:
        import json

        print(json.dumps(facts, indent=2))
    else:
        _print(facts)
    return int(any(one["state"] in ("broken", "incompatible") for one in facts["plugins"]))


def examine() -> dict[str, Any]:
    """Machine, package versions, and each plugin's state with its reason. Runs the plugins' code."""
    from importlib.metadata import PackageNotFoundError, version

    from lwm_core.errors import LwmError
    from lwm_core.registry import Registry
    from lwm_core.run.facts import machine

    registry = Registry.from_environment()
    plugins = []
    for candidate in registry.candidates():
        state, reason = candidate.state, candidate.reason
        if state == "available":
            try:
                checked = registry.check(candidate.kind, candidate.label)
                state, reason = checked.state, checked.reason
            except LwmError as error:
                state, reason = "broken", str(error)
        plugins.append(
            {"kind": candidate.kind, "name": candidate.name, "dist": candidate.dist, "version": candidate.version,
             "state": state, "reason": reason}
        )  # fmt: skip
    packages = {}
    core = ("lwm-core", "numpy", "ml-dtypes", "pydantic", "pluggy", "safetensors", "rich")
    for name in dict.fromkeys((*core, *(one["dist"] for one in plugins), "jax", "torch")):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"machine": machine(), "packages": packages, "plugins": plugins}


def _print(facts: dict[str, Any]) -> None:
    machine = facts["machine"]
    memory = "" if machine["memory"] is None else f", {machine['memory'] / 2**30:.1f} GiB"
    print(f"python   {machine['python']} on {machine['platform']}")
    print(f"machine  {machine['cpu']}, {machine['cores']} cores{memory}")
    print("packages " + ", ".join(f"{name} {version}" for name, version in facts["packages"].items()))
    width = max((len(f"{one['kind']} {one['name']}") for one in facts["plugins"]), default=0)
    for one in facts["plugins"]:
        reason = f": {one['reason']}" if one["reason"] else ""
        title = f"{one['kind']} {one['name']}"
        print(f"plugin   {title:<{width}}  {one['state']} ({one['dist']} {one['version']}){reason}")
