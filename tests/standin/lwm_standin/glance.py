"""A suite that needs the encoder, and a data source that tells which encoder its codes are of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lwm_core.builtins.text_rows import TextFileOptions, TextFileSource
from lwm_core.errors import DataError
from lwm_core.protocols import DataContext, EvalContext, EvalSetup
from lwm_core.shards import Settings
from lwm_standin.options import CodedOptions, GlanceOptions


class Glance:
    """See the module. Its rows tell which object the encoder was, so that tests can see that it is one."""

    def __init__(self, options: GlanceOptions) -> None:
        self._options = options
        self._rows: list[dict[str, Any]] = []

    def check(self, setup: EvalSetup) -> None:
        assert setup.encoder is not None
        if self._options.refuse:
            raise DataError(f"glance: {self._options.refuse}")

    def run(self, context: EvalContext) -> Sequence[Mapping[str, Any]]:
        assert context.encoder is not None
        [[code]] = context.encoder.encode(np.full((1, 16, 16, 3), 255, np.uint8))
        row = {"stage": context.stage, "code": int(context.vocabulary.vision_ids(code)), "who": id(context.encoder)}
        self._rows.append(row)
        Path(f"{context.out}.json").write_text(json.dumps({"rows": self._rows}))
        return [row]

    def draw(self, out: Path) -> Mapping[str, bytes]:
        return {}


class Coded(TextFileSource):
    """See the module."""

    def __init__(self, options: CodedOptions, context: DataContext) -> None:
        super().__init__(TextFileOptions(path="shipped:genesis"), context)
        self._checksum = options.checksum

    def code_settings(self) -> Mapping[str, Settings]:
        return {"clips": Settings("lwm-standin:patches", self._checksum, {}, 256, 16, None, None, 1, 1)}
