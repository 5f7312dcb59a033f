"""The ``lwm`` command. Nothing heavy is imported until a verb runs, so that ``lwm --help`` answers at once."""

from __future__ import annotations

from lwm_core.cli.main import main

__all__ = ["main"]
