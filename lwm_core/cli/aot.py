"""``lwm aot RECIPE|FILE --topology v5p:8x8x8``: compile each stage's training step for devices that are not at hand.

The real compiler takes the real step: model, attention, loss, optimizer, shardings. Nothing is allocated or trained.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from lwm_core.cli.overrides import add_overrides

if TYPE_CHECKING:
    from lwm_core.pipeline import Pipeline
    from lwm_core.protocols import Collective, CompiledStep, Stage

GIB = 2**30
SHOWN = 6
"""Kinds of transfers that are shown of a stage; ``--json`` has them all."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the ``lwm`` command."""
    parser = subparsers.add_parser(
        "aot", help="compile the training steps for devices that are not at hand", description=__doc__
    )
    parser.add_argument("source", metavar="RECIPE|FILE", help="the name of a recipe (lwm recipes), or a .toml file")
    parser.add_argument(
        "--topology", required=True, metavar="NAME", help="chip and torus, such as v4:8x8x4, v5p:8x8x8, v6e:16x16"
    )
    parser.add_argument("--stage", action="append", default=[], metavar="NAME", help="only this stage; repeatable")
    add_overrides(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON list with an object for each stage")
    parser.set_defaults(run=run_aot)


def run_aot(args: argparse.Namespace) -> int:
    """Compile; 1 where a stage does not fit."""
    import json
    import sys
    from dataclasses import asdict

    from lwm_core.config import load_config
    from lwm_core.errors import UsageError
    from lwm_core.pipeline import build
    from lwm_core.protocols import CompilesAhead
    from lwm_core.registry import Registry

    loaded = load_config(args.source, args.overrides)
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
    config = loaded.config
    pipeline = build(loaded, Registry.from_environment(config.plugins.allow, config.plugins.deny))
    stages = _stages(pipeline, args.stage)
    trainer = pipeline.make_trainer()
    if not isinstance(trainer, CompilesAhead):
        raise UsageError(f"trainer {pipeline.selection.trainer.name!r} cannot compile ahead of time")
    results = []
    for stage in stages:
        if not args.json:
            print(f"{stage.name}: {stage.rows} rows of {stage.seq_len} tokens, mesh {stage.mesh}", flush=True)
        step = trainer.compile_ahead(stage, args.topology)
        results.append({"stage": stage.name, "seq_len": stage.seq_len, "rows": stage.rows, "mesh": stage.mesh,
                        "bytes": step.bytes, **asdict(step)})  # fmt: skip
        if not args.json:
            print("\n".join(f"  {line}" for line in describe(step)), flush=True)
    if args.json:
        print(json.dumps(results, indent=2))
    return int(any(one["problem"] is not None for one in results))


def _stages(pipeline: Pipeline, names: list[str]) -> list[Stage]:
    """The stages that are asked for, in their own order; all if none is named."""
    from lwm_core.errors import UsageError

    known = [stage.name for stage in pipeline.stages]
    for name in names:
        if name not in known:
            raise UsageError(f"--stage {name}: there is no such stage; expected one of {', '.join(known)}")
    return [stage for stage in pipeline.stages if not names or stage.name in names]


def describe(step: CompiledStep) -> list[str]:
    """A stage's lines for people."""
    lines = [f"{step.devices} x {step.device_kind} ({step.topology}), compiled in {step.seconds:.0f} s"]
    if step.problem is not None:
        return [*lines, "does not fit", *(f"  {line}" for line in step.problem.splitlines())]
    parts = {
        "parameters, optimizer and batch": step.argument_bytes, "temporary": step.temporary_bytes,
        "results": step.output_bytes, "program": step.code_bytes,
    }  # fmt: skip
    of = f" of {_size(step.limit_bytes)}" if step.limit_bytes else ""
    lines.append(f"{_size(step.bytes)}{of} a device: " + ", ".join(f"{_size(n)} {what}" for what, n in parts.items()))
    lines.append(f"{_size(step.parameter_bytes)} of that are parameters, and as much the gradients among the temporary")
    if step.host_bytes:
        lines.append(f"{_size(step.host_bytes)} in the host's memory for each device")
    lines += [_transfer(one) for one in step.collectives[:SHOWN]]
    if len(step.collectives) > SHOWN:
        rest: Any = step.collectives[SHOWN:]
        total = sum(one.bytes * one.count for one in rest)
        lines.append(f"{sum(one.count for one in rest):>6} x smaller transfers, {_size(total)} in all")
    lines += [f"{count:>6} x kernel {name}" for name, count in step.kernels.items()]
    return lines + list(step.choices)


def _transfer(one: Collective) -> str:
    over = f" over {'+'.join(one.axes)}" if one.axes else ""
    return f"{one.count:>6} x {one.kind} of {_size(one.bytes)}{over}, {one.type}"


def _size(count: int) -> str:
    """Bytes in GiB or MiB."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.2f} MiB"
