"""What ``run.json`` tells about a run: configuration with origins, plugins, choices, versions, machine."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import lwm_core
from lwm_core.config.document import dotted
from lwm_core.errors import PluginError
from lwm_core.pipeline import Pipeline, Plugged
from lwm_core.registry import Candidate


def describe_run(
    pipeline: Pipeline, trainer: Mapping[str, Any], hooks: Sequence[Candidate], command: Sequence[str], processes: int
) -> dict[str, Any]:
    """The contents of a new run's ``run.json``."""
    config = pipeline.loaded.config
    return {
        "name": config.name,
        "summary": config.summary,
        "status": "running",
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": list(command),
        "base_dir": str(pipeline.base_dir.absolute()),
        "config": resolved(pipeline),
        "origins": {dotted(path): str(origin) for path, origin in pipeline.loaded.origins.items() if path},
        "notes": list(pipeline.loaded.notes),
        "stages": [asdict(stage) for stage in pipeline.stages],
        "start": {
            "init": config.init,
            "seq_len": pipeline.start.seq_len,
            "rope": None if pipeline.start.rope is None else asdict(pipeline.start.rope),
        },
        "model": {**pipeline.model.to_dict(), "parameter_count": pipeline.model.parameter_count},
        "plugins": _plugins(pipeline, hooks),
        "choices": [
            {
                "kind": one.kind,
                "asked": one.asked,
                "chosen": one.name,
                "rejected": [{"name": name, "reason": reason} for name, reason in one.choice.rejected],
            }
            for one in pipeline.selection.plugged
        ],
        "versions": _versions(pipeline),
        "machine": machine(),
        "processes": processes,
        "trainer": dict(trainer),
    }


def resolved(pipeline: Pipeline) -> dict[str, Any]:
    """The configuration with every default and every choice written out: what ``lwm resume`` reads.

    Raises:
        PluginError: a plugin's options do not read back from JSON as what they were.
    """
    data = pipeline.loaded.config.model_dump(mode="json")
    if pipeline.weights is not None:
        # The shape is the starting model's: a default written out here would contradict it when the run is read again.
        data["model"] = dict(pipeline.loaded.data.get("model", {}))
    for one in pipeline.selection.plugged:
        table = {"name": _writable_name(pipeline, one), **_dumped(one)}
        if one.kind == "eval":
            data["evals"][one.path[1]] = table
        else:
            data[str(one.path[0])] = table
    return data


def _dumped(one: Plugged) -> dict[str, Any]:
    values: dict[str, Any] = one.options.model_dump(mode="json", by_alias=True, exclude_none=True)
    try:
        same = type(one.options).model_validate(values) == one.options
    except ValidationError:
        same = False
    if not same:
        raise PluginError(
            f"{one.kind} {one.name!r} ({one.choice.candidate.origin}): its options do not read back from JSON as they "
            "were, so the run could not be resumed; its options model must round-trip"
        )
    return values


def _writable_name(pipeline: Pipeline, one: Plugged) -> str:
    """The plain name, or ``dist:name`` where another distribution offers the same."""
    same = [c for c in pipeline.registry.candidates(one.kind) if c.name == one.name]
    return one.name if len(same) == 1 else one.label


def _plugins(pipeline: Pipeline, hooks: Sequence[Candidate]) -> list[dict[str, str]]:
    used = [one.choice.candidate for one in pipeline.selection.plugged]
    if pipeline.selection.weights_plugin is not None:
        used.append(pipeline.selection.weights_plugin.candidate)
    return [{"kind": c.kind, "name": c.name, "dist": c.dist, "version": c.version} for c in (*used, *hooks)]


def _versions(pipeline: Pipeline) -> dict[str, str]:
    dists = {one.choice.candidate.dist for one in pipeline.selection.plugged} - {"lwm-core"}
    found = {"python": platform.python_version(), "lwm-core": lwm_core.__version__}
    for name in ("numpy", *sorted(dists)):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """This machine: ``cpu`` (model), ``cores``, ``memory`` in bytes, ``platform``, ``python``."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": _memory(),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
