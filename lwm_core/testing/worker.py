"""The other end of a harness: one process a (plugin, world), started as ``python -m lwm_core.testing.worker``.

It answers one request at a time until its input ends: ``forward`` and ``backward`` of a backend with given options.
The plugin sees to its own devices (a framework's device count is fixed once it has started), so nothing of a
framework is imported before the plugin's factory is.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Mapping
from typing import Any, BinaryIO, cast

from pydantic import ValidationError

from lwm_core.attention import AttentionMask
from lwm_core.errors import UnsupportedError
from lwm_core.protocols import AttentionFactory, AttentionHarness
from lwm_core.registry import Registry, validate_options
from lwm_core.testing import wire


class Desk:
    """One plugin at one world size; keeps a harness for each table of options that was asked for."""

    def __init__(self, name: str, world: int) -> None:
        self._name = name
        self._world = world
        self._registry = Registry.from_environment()
        self._harnesses: dict[str, AttentionHarness] = {}

    def answer(self, header: wire.Header, arrays: wire.Arrays) -> wire.Arrays:
        """Do what a request asks and return the arrays of the reply."""
        key = json.dumps(header["options"], sort_keys=True)
        if header["do"] == "close":
            harness = self._harnesses.pop(key, None)
            if harness is not None:
                harness.close()
            return {}
        if key not in self._harnesses:
            self._harnesses[key] = self._open(header["options"])
        if header["do"] == "open":
            return {}
        return _run(self._harnesses[key], header, arrays)

    def close(self) -> None:
        """Close every harness."""
        while self._harnesses:
            self._harnesses.popitem()[1].close()

    def _open(self, table: Mapping[str, object]) -> AttentionHarness:
        try:
            options = validate_options(self._registry, "attention", self._name, table)
        except ValidationError as error:
            told = "; ".join(
                f"{'.'.join(map(str, e['loc'])) or 'options'}: {e['msg']}, got {e['input']!r}" for e in error.errors()
            )
            raise UnsupportedError(f"attention {self._name!r} refuses its options: {told}") from error
        factory = cast(AttentionFactory, self._registry.load("attention", self._name))
        return factory.harness(options, self._world)


def _run(harness: AttentionHarness, header: wire.Header, arrays: wire.Arrays) -> wire.Arrays:
    mask = AttentionMask(**header["mask"])
    q, k, v, ids = arrays["q"], arrays["k"], arrays["v"], arrays.get("segment_ids")
    if header["do"] == "forward":
        out, lse = harness.forward(q, k, v, mask, ids)
        return {"out": out, "lse": lse}
    dq, dk, dv = harness.backward(q, k, v, mask, arrays["dout"], ids)
    return {"dq": dq, "dk": dk, "dv": dv}


def describe(error: BaseException) -> dict[str, Any]:
    """An exception as it travels: the names of its classes, its message on one line, its traceback."""
    return {
        "types": [cls.__name__ for cls in type(error).__mro__],
        "message": " ".join(str(error).split()) or type(error).__name__,
        "details": "".join(traceback.format_exception(error)),
    }


def serve(source: BinaryIO, sink: BinaryIO, desk: Desk) -> None:
    """Answer requests until ``source`` ends."""
    while (message := wire.receive(source)) is not None:
        header, arrays = message
        try:
            reply = desk.answer(header, arrays)
        except Exception as error:  # whatever a plugin raises is told to the kit, which raises it there
            wire.send(sink, {"error": describe(error)})
        else:
            wire.send(sink, {}, reply)


def main() -> None:
    """Serve the plugin ``argv[1]`` at world ``argv[2]`` on the standard streams."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # What the plugin or its own child processes print or read must not meet the messages.
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    desk = Desk(sys.argv[1], int(sys.argv[2]))
    try:
        serve(source, sink, desk)
    finally:
        desk.close()


if __name__ == "__main__":
    main()
