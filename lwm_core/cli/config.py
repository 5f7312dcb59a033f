"""``lwm config show|validate|schema|diff``: what a configuration comes to, and whether it is right."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from lwm_core.cli.overrides import add_overrides

if TYPE_CHECKING:
    from lwm_core.config.document import KeyPath
    from lwm_core.config.load import LoadedConfig

SOURCE_HELP = "a .toml or .json file, or the name of a recipe (lwm recipes)"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb and its actions to the ``lwm`` command."""
    parser = subparsers.add_parser("config", help="show, check or compare configurations", description=__doc__)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)

    show = actions.add_parser("show", help="print the resolved configuration as TOML")
    _add_source(show)
    show.add_argument("--origin", action="store_true", help="say where each value comes from")
    show.add_argument("--defaults", action="store_true", help="print the values that were left at their defaults too")
    show.add_argument("--json", action="store_true", help="print {source, config, origins, notes} as JSON")
    show.set_defaults(run=run_show)

    validate = actions.add_parser("validate", help="check a configuration and its plugins' options")
    _add_source(validate)
    validate.add_argument("--json", action="store_true", help="print {source, valid, problems, notes} as JSON")
    validate.set_defaults(run=run_validate)

    schema = actions.add_parser("schema", help="print the JSON schema, with the options of the installed plugins")
    schema.set_defaults(run=run_schema)

    diff = actions.add_parser("diff", help="print the values in which two configurations differ, defaults included")
    diff.add_argument("a", metavar="A", help=SOURCE_HELP)
    diff.add_argument("b", metavar="B", help=SOURCE_HELP)
    diff.add_argument("--json", action="store_true", help="print a JSON list of {key, a, b, a_origin, b_origin}")
    diff.set_defaults(run=run_diff)


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    add_overrides(parser)


def run_show(args: argparse.Namespace) -> int:
    """Print the configuration: TOML that is itself a configuration, or JSON."""
    from lwm_core.config import dotted, dump_toml, load_config

    loaded = load_config(args.source, args.overrides)
    values = _with_defaults(loaded) if args.defaults else loaded.data
    if args.json:
        origins = {dotted(path): str(origin) for path, origin in loaded.origins.items() if path}
        _print_json({"source": loaded.source, "config": values, "origins": origins, "notes": list(loaded.notes)})
        return 0
    print(dump_toml(values, (lambda path: _origin(loaded, path)) if args.origin else None), end="")
    _print_notes(loaded)
    return 0


def run_validate(args: argparse.Namespace) -> int:
    """Check the envelope, then each plugin's options by the plugin's own model."""
    from lwm_core.config import load_config
    from lwm_core.errors import ConfigError

    try:
        loaded = load_config(args.source, args.overrides)
        from lwm_core.pipeline import check_options

        check_options(loaded)
    except ConfigError as error:
        if not args.json:
            raise
        _print_json({"source": args.source, "valid": False, "problems": error.problems, "notes": []})
        return error.exit_code
    if args.json:
        _print_json({"source": loaded.source, "valid": True, "problems": [], "notes": list(loaded.notes)})
        return 0
    print(f"{loaded.source}: valid")
    _print_notes(loaded)
    return 0


def run_schema(args: argparse.Namespace) -> int:
    """Print the schema that TOML editors read (``#:schema lwm.schema.json``)."""
    _print_json(config_schema())
    return 0


def config_schema() -> dict[str, Any]:
    """JSON schema of a configuration file; a plugin's table offers the installed plugins of its kind."""
    from lwm_core.config.envelope import RunConfig
    from lwm_core.registry import Registry, options_schema

    schema = RunConfig.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    properties = schema["properties"]
    properties["extends"] = {
        "type": "array",
        "items": {"type": "string"},
        "description": "files, relative to this one, or recipes, that this one is laid on",
    }
    registry = Registry.from_environment()
    for key in ("tokenizer", "trainer", "attention", "encoder", "context", "data", "evals"):
        kind = key.removesuffix("s")
        table = options_schema(registry, kind)
        definitions.update(table.pop("$defs", {}))
        definitions[f"{kind}.table"] = table
        properties[key] = _with_reference(properties[key], f"#/$defs/{kind}.table")
    definitions.pop("PluginTable", None)
    # Whatever a file extends may give what this file leaves out.
    schema.pop("required", None)
    return schema


def _with_reference(schema: Any, reference: str) -> Any:
    """``schema`` with the open plugin table in it replaced by ``reference``."""
    if isinstance(schema, dict):
        return {
            key: reference if key == "$ref" and value == "#/$defs/PluginTable" else _with_reference(value, reference)
            for key, value in schema.items()
        }
    if isinstance(schema, list):
        return [_with_reference(item, reference) for item in schema]
    return schema


def run_diff(args: argparse.Namespace) -> int:
    """Print ``-`` and ``+`` lines for each value that differs; nothing where the two come to the same."""
    from lwm_core.config import dotted, load_config
    from lwm_core.config.document import leaves

    first, second = load_config(args.a), load_config(args.b)
    before, after = dict(leaves(_with_defaults(first))), dict(leaves(_with_defaults(second)))
    changed = [path for path in {**before, **after} if not _same(before, after, path)]
    if args.json:
        rows = [
            {
                "key": dotted(path),
                "a": before.get(path),
                "b": after.get(path),
                "a_origin": _origin(first, path) if path in before else None,
                "b_origin": _origin(second, path) if path in after else None,
            }
            for path in changed
        ]
        _print_json(rows)
        return 0
    for path in changed:
        for sign, values, loaded in (("-", before, first), ("+", after, second)):
            if path in values:
                print(f"{sign} {_one_line(path, values[path])}  # {_origin(loaded, path)}")
    return 0


def _same(before: dict[KeyPath, Any], after: dict[KeyPath, Any], path: KeyPath) -> bool:
    if path not in before or path not in after:
        return False
    first, second = before[path], after[path]
    return bool(first == second) and isinstance(first, bool) == isinstance(second, bool)  # 1 and true are not the same


def _one_line(path: KeyPath, value: Any) -> str:
    from lwm_core.config import dotted, dump_toml

    written = dump_toml({"v": [value]}).strip().removeprefix("v = [").removesuffix("]") if value != {} else "{}"
    return f"{dotted(path)} = {written}"


def _with_defaults(loaded: LoadedConfig) -> dict[str, Any]:
    values: dict[str, Any] = loaded.config.model_dump(mode="json", exclude_none=True)
    return values


def _origin(loaded: LoadedConfig, path: KeyPath) -> str:
    return str(loaded.origins[path]) if path in loaded.origins else "default"


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def _print_notes(loaded: LoadedConfig) -> None:
    import sys

    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
