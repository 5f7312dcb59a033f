"""``lwm plan RECIPE|FILE|FOLDER``: does it fit, how long does it take, what hides, and what would be better."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lwm_core.cli.overrides import add_overrides

if TYPE_CHECKING:
    from lwm_core.protocols import CompiledStep
    from lwm_plan.hardware import Machine
    from lwm_plan.plan import StagePlan
    from lwm_plan.sources import Source

DEFAULT = "v5p-512"


def add_plan(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``lwm plan``."""
    parser = subparsers.add_parser(
        "plan", help="what a recipe's stages take on a machine: memory, time, meshes",
        description="Tell memory, time and meshes of every stage before a device is rented. Only --aot compiles.",
    )  # fmt: skip
    parser.add_argument(
        "source", metavar="RECIPE|FILE|FOLDER", nargs="?",
        help="a recipe (lwm recipes), a .toml file, or with --to the folder of a Llama (config.json)",
    )  # fmt: skip
    parser.add_argument(
        "--hardware", metavar="NAME|FILE",
        help=f"such as v4-512, v6e-256, tpu7x-128, h100x64, a topology, v5p:8x8x4, a .toml file (default: {DEFAULT})",
    )  # fmt: skip
    parser.add_argument(
        "--aot", metavar="TOPOLOGY",
        help="compile each stage for this topology, such as v5p:8x8x8; its compiler's figures beside the plan's",
    )  # fmt: skip
    parser.add_argument("--stage", action="append", default=[], metavar="NAME", help="only this stage; repeatable")
    parser.add_argument(
        "--to", type=_length, metavar="N", help="a folder: tokens that its context is to reach: 1M, 128K"
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="a folder: tokens to train on (1000000000)")
    parser.add_argument("--batch-tokens", type=_length, metavar="N", help="a folder: tokens a step (4M, or a row)")
    add_overrides(parser)
    parser.add_argument("--explain", action="store_true", help="print every formula with its numbers")
    parser.add_argument("--json", action="store_true", help="print {source, hardware, devices, stages} as JSON")
    parser.add_argument("--list-hardware", action="store_true", help="print the devices that are known, with sources")
    parser.set_defaults(run=run_plan)


def _length(text: str) -> int:
    """Tokens, as stages are named: ``1M`` is 1,048,576."""
    units = {"K": 1 << 10, "M": 1 << 20}
    unit = units.get(text[-1:].upper())
    digits = text if unit is None else text[:-1]
    if not digits.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens; expected one such as 131072, 128K or 1M")
    return int(digits) * (unit or 1)


def run_plan(args: argparse.Namespace) -> int:
    """Plan and tell; 1 where a stage does not fit, or its compiler refuses it."""
    import json
    import sys

    from lwm_core.errors import UsageError
    from lwm_plan.hardware_file import read_hardware, read_topology
    from lwm_plan.plan import plan, to_json
    from lwm_plan.sources import read_source

    if args.list_hardware:
        from lwm_plan.show import hardware

        print("\n".join(hardware()))
        return 0
    if args.source is None:
        raise UsageError("lwm plan: name a recipe (lwm recipes), a file, or a model's folder with --to")
    compiles = args.aot is not None
    machine = read_topology(args.aot, args.hardware) if compiles else read_hardware(args.hardware or DEFAULT)
    source = read_source(args.source, args.overrides, args.to, args.tokens, args.batch_tokens)
    _check_names(args.stage, source)
    stages = plan(source, machine, tuple(args.stage), _compiled(args, source, machine))
    if args.json:
        facts = {
            "source": source.name, "hardware": machine.name, "devices": machine.devices,
            "device": machine.device.name, "memory": machine.device.memory, "notes": list(source.notes),
            "stages": [to_json(one) for one in stages],
        }  # fmt: skip
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        for note in source.notes:
            print(f"note: {note}", file=sys.stderr)
        _tell(stages, machine, source, args.explain)
    refused = [one.compiled is not None and one.compiled.problem is not None for one in stages]
    return int(any(refused) or any(one.problem is not None for one in stages))


def _compiled(args: argparse.Namespace, source: Source, machine: Machine) -> dict[str, CompiledStep]:
    """What ``--aot`` asks for; refused before anything is told."""
    import sys

    from lwm_plan.compiled import compile_stages

    if args.aot is None:
        return {}
    return compile_stages(source, machine, args.aot, args.stage, lambda line: print(line, file=sys.stderr, flush=True))


def _check_names(names: list[str], source: Source) -> None:
    from lwm_core.errors import UsageError

    known = [stage.name for stage in source.stages]
    for name in names:
        if name not in known:
            raise UsageError(f"--stage {name}: there is no such stage; expected one of {', '.join(known)}")


def _tell(stages: tuple[StagePlan, ...], machine: Machine, source: Source, explained: bool) -> None:
    from lwm_plan.explain import explain
    from lwm_plan.show import below, table

    print("\n".join(table(stages, machine, source)))
    for one in stages:
        for line in [*below(one, source), *(explain(one) if explained else [])]:
            print(f"{one.stage.name}: {line}")
