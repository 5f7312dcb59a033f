"""``lwm plugins list | show NAME | why KIND``: what is installed, what one says of itself, why ``auto`` takes which.

``list`` runs no plugin code: it reads metadata, and the text of each light module for what would fail on import.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lwm_core.registry import Candidate, Registry


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``plugins`` and its verbs; each parser's default ``run`` takes the arguments and returns the exit code."""
    plugins = subparsers.add_parser("plugins", help="list, show and explain the installed plugins")
    verbs = plugins.add_subparsers(dest="plugins_verb", metavar="VERB", required=True)

    listing = verbs.add_parser("list", help="every installed plugin and its state; runs no plugin code")
    listing.add_argument("--kind", help="only this kind (attention, trainer, ...)")
    listing.add_argument(
        "--check", action="store_true", help="import each plugin and run its probe, to find what only running shows"
    )
    listing.set_defaults(run=run_list)

    show = verbs.add_parser("show", help="all that one plugin says of itself, its options included")
    show.add_argument("name", metavar="NAME", help="a plugin's name, DIST:NAME, or a distribution")
    show.set_defaults(run=run_show)

    why = verbs.add_parser("why", help="what 'auto' chooses of a kind, and why each other was rejected")
    why.add_argument("kind", metavar="KIND", help="attention, trainer, encoder, ...")
    why.add_argument(
        "-r", "--require", metavar="KEY=VALUE", action="append", default=[],
        help="a requirement, such as framework=jax, masks=causal,full, gqa=true or head_dim=128; may be repeated",
    )  # fmt: skip
    why.set_defaults(run=run_why)
    for verb in (listing, show, why):
        verb.add_argument("--json", action="store_true", help="print JSON")


def run_list(args: argparse.Namespace) -> int:
    """Print a row a plugin. Exit code 0, whatever state the plugins are in."""
    registry = _registry(args)
    candidates = registry.candidates(args.kind)
    rows = [_checked(registry, c) if args.check else _looked_at(c) for c in candidates]
    if args.json:
        keys = ("kind", "name", "dist", "version", "state", "reason", "traceback")
        _print_json([{key: getattr(c, key) for key in keys} for c in rows])
        return 0
    if not rows:
        print("no plugins installed" + (f" of kind {args.kind}" if args.kind else ""))
        return 0
    _print_table(
        ("kind", "name", "distribution", "version", "state", "reason"),
        [(c.kind, c.name, c.dist, c.version, c.state, c.reason) for c in rows],
    )
    return 0


def run_show(args: argparse.Namespace) -> int:
    """Print what the plugins of a name say of themselves, and why one of them cannot be used.

    Raises:
        PluginError: nothing of that name is installed.
    """
    from lwm_core.errors import PluginError
    from lwm_core.registry.catalogue import KNOWN, near_miss

    registry = _registry(args)
    everything = registry.candidates()
    meant = [c for c in everything if args.name in (c.name, c.label, c.dist)]
    if not meant:
        for (kind, name), dist in KNOWN.items():
            if args.name in (name, dist, f"{dist}:{name}"):
                raise PluginError(f"{kind} {name!r} is not installed: pip install {dist}")
        near = near_miss(args.name, [word for c in everything for word in (c.name, c.dist)])
        hint = f"; did you mean {near!r}?" if near else ""
        raise PluginError(f"plugin {args.name!r} is not installed{hint} (lwm plugins list)")
    described = [_described(registry, candidate) for candidate in meant]
    if args.json:
        _print_json(described)
        return 0
    for plugin in described:
        _print_plugin(plugin)
    return 0


def run_why(args: argparse.Namespace) -> int:
    """Print ``auto``'s choice of a kind with the reasons. Exit code 0 with a choice, 1 without.

    Hooks plugins are not asked: a run's ``lwm_select`` may still veto, and its log says so.
    """
    from lwm_core.errors import PluginError
    from lwm_core.registry import AUTO
    from lwm_core.registry.messages import check_kind

    check_kind(args.kind)
    registry = _registry(args)
    requirements = dict(_requirement(text) for text in args.require)
    try:
        choice = registry.choose(args.kind, AUTO, requirements)
    except PluginError as error:
        # The message tells each reason; it is this verb's answer, not its failure to answer.
        if args.json:
            _print_json({"kind": args.kind, "requirements": requirements, "chosen": None, "reason": str(error)})
        else:
            print(error)
        return 1
    chosen = choice.candidate
    if args.json:
        rejected = [{"name": name, "reason": reason} for name, reason in choice.rejected]
        _print_json(
            {
                "kind": args.kind,
                "requirements": requirements,
                "chosen": {"name": chosen.name, "dist": chosen.dist, "version": chosen.version},
                "rejected": rejected,
            }
        )
        return 0
    took = f"fits, priority {choice.spec.priority}"
    _print_table(
        ("name", "verdict", "reason"),
        [(f"{chosen.name} ({chosen.origin})", "chosen", took)]
        + [(name, "rejected", reason) for name, reason in choice.rejected],
    )
    return 0


def _registry(args: argparse.Namespace) -> Registry:
    from lwm_core.registry import Registry

    return Registry.from_environment(no_plugins=getattr(args, "no_plugins", False))


def _looked_at(candidate: Candidate) -> Candidate:
    """The candidate, broken where the text of its module shows that its import would fail."""
    from dataclasses import replace

    from lwm_core.registry.source import source_fault

    fault = source_fault(candidate.value) if candidate.state == "available" else ""
    return replace(candidate, state="broken", reason=fault) if fault else candidate


def _checked(registry: Registry, candidate: Candidate) -> Candidate:
    if candidate.state != "available":
        return candidate
    return registry.check(candidate.kind, candidate.label)


def _described(registry: Registry, candidate: Candidate) -> dict[str, Any]:
    """Everything about one plugin as plain values; ``spec`` and ``options`` are none where they cannot be had."""
    from dataclasses import fields

    from lwm_core.errors import PluginError
    from lwm_core.registry.options import options_schema

    spec: dict[str, Any] | None = None
    schema: dict[str, Any] | None = None
    problem = ""
    try:
        found = registry.spec(candidate.kind, candidate.label)
        spec = {field.name: getattr(found, field.name) for field in fields(found)}
        spec["capabilities"] = dict(found.capabilities)
        schema = options_schema(registry, candidate.kind, candidate.label)
    except PluginError as error:
        problem = str(error)
    # Importing may have changed what is known of it.
    meant = (candidate.kind, candidate.label, candidate.version, candidate.value)
    known = next(c for c in registry.candidates() if (c.kind, c.label, c.version, c.value) == meant)
    return {
        "kind": known.kind, "name": known.name, "dist": known.dist, "version": known.version,
        "entry_point": known.value, "state": known.state, "reason": known.reason or problem,
        "requires": list(known.requires), "spec": spec, "options": schema, "traceback": known.traceback,
    }  # fmt: skip


def _print_plugin(plugin: dict[str, Any]) -> None:
    spec = plugin["spec"] or {}
    lines = [
        ("distribution", f"{plugin['dist']} {plugin['version']}"),
        ("entry point", plugin["entry_point"]),
        ("state", plugin["state"] + (f": {plugin['reason']}" if plugin["reason"] else "")),
    ]
    for key in ("summary", "framework", "devices", "needs", "priority", "factory", "probe"):
        if spec.get(key) not in (None, ()):
            lines.append((key, _plain(spec[key])))
    lines += [(key, _plain(value)) for key, value in sorted(spec.get("capabilities", {}).items())]
    print(f"{plugin['kind']} {plugin['name']}")
    for key, value in lines:
        print(f"  {key:14} {value}")
    properties = {k: v for k, v in (plugin["options"] or {}).get("properties", {}).items() if k != "name"}
    if properties:
        required = plugin["options"].get("required", [])
        rows = [
            (key, _type(option), _default(option, key in required), option.get("description", ""))
            for key, option in properties.items()
        ]
        _print_table(("option", "type", "default", "description"), rows)
    elif plugin["options"] is not None:
        print("  options        none")
    if plugin["traceback"]:
        print(plugin["traceback"].rstrip())


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _type(option: dict[str, Any]) -> str:
    """The type in a JSON schema property, in words."""
    for key in ("const", "enum"):
        if key in option:
            values = option[key] if key == "enum" else [option[key]]
            return " | ".join(map(repr, values))
    if "anyOf" in option:
        return " | ".join(_type(branch) for branch in option["anyOf"])
    if "$ref" in option:
        return str(option["$ref"]).rpartition(".")[2]
    return str(option.get("type", "any"))


def _default(option: dict[str, Any], required: bool) -> str:
    from json import dumps

    return "(required)" if required else dumps(option.get("default"))


def _requirement(text: str) -> tuple[str, object]:
    """``key=value`` as a requirement: true and false, numbers, or words between commas."""
    from lwm_core.errors import UsageError

    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise UsageError(f"--require {text}: expected KEY=VALUE, such as framework=jax")
    if value in ("true", "false"):
        return key, value == "true"
    try:
        return key, int(value)
    except ValueError:
        words = tuple(value.split(","))
        return key, words[0] if len(words) == 1 else words


def _print_json(value: object) -> None:
    from json import dumps

    print(dumps(value, indent=2))


def _print_table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    import sys

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles = {"available": "green", "chosen": "green", "broken": "red", "incompatible": "red", "unusable": "yellow"}
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in ("kind", "state", "version", "option"))
    for row in rows:
        table.add_row(*(Text(cell, style=styles.get(cell, "")) for cell in row))
    # A pipe has no width: rows stay whole there, so that grep and awk work.
    Console(width=None if sys.stdout.isatty() else 1000).print(table)
