"""Layouts without any attention: the stand-in trainer's model looks at one token alone."""

from __future__ import annotations

from typing import Any

from lwm_core.errors import UnsupportedError
from lwm_core.layout import SequenceLayout
from lwm_core.protocols import AttentionChoice


class _Factory:
    def resolve(self, options: Any, shape: Any, mesh: Any, axes: Any) -> AttentionChoice:
        return AttentionChoice(options)

    def layout(self, options: Any, seq_len: int, world: int) -> SequenceLayout:
        layout = SequenceLayout(getattr(options, "layout", "contiguous"), world)
        layout.check(seq_len)
        return layout

    def build(self, options: Any, mesh: Any, axes: Any, seq_len: int) -> Any:
        raise UnsupportedError("attention 'standin': it has layouts only")

    def harness(self, options: Any, world: int) -> Any:
        raise UnsupportedError("attention 'standin': it has layouts only")


factory = _Factory()
