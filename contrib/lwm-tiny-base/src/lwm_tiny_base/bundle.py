"""Where the weights lie."""

from __future__ import annotations

from pathlib import Path

from lwm_core.protocols import WeightsBundle


def tiny_base() -> WeightsBundle:
    """The factory of ``lwm.weights.v1``."""
    return WeightsBundle("tiny-base", Path(__file__).with_name("model"))
