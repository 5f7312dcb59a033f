"""The conformance kits on this plugin: every strategy on real gloo processes with both kernels, and the light spec.

The suite runs a part of it; ``LWM_KITS=whole`` runs every strategy and kernel at every number of processes.
"""

from __future__ import annotations

import os
from math import lcm
from typing import ClassVar

from lwm_core.attention import AttentionMask
from lwm_core.testing import AttentionSuite, PluginSuite
from lwm_core.testing.attention_cases import WORLDS

WHOLE = os.environ.get("LWM_KITS") == "whole"
FLASH = {"kernel": "cpu-flash", "chunk": 4}  # so that tiles of every kind occur
MATH = {"kernel": "math", "chunk": 4}


def worlds(*few: int) -> tuple[int, ...]:
    """All numbers of processes, or the few that stand for them."""
    return WORLDS if WHOLE else few


class TestRing(AttentionSuite):
    name = "torch-ring"
    options: ClassVar = {"strategy": "ring", **FLASH}
    worlds = worlds(1, 3, 4)


class TestRingMath(TestRing):
    options: ClassVar = {"strategy": "ring", **MATH}
    worlds, thorough = worlds(2), WHOLE


class TestRingLargeChunks(TestRing):
    """As people run it, with what the options are by default."""

    options: ClassVar = {"strategy": "ring"}
    worlds, thorough = worlds(2), WHOLE


class TestAllgather(AttentionSuite):
    name = "torch-ring"
    options: ClassVar = {"strategy": "allgather", **FLASH}
    worlds, thorough = worlds(3), WHOLE


class TestAllgatherByHeads(TestAllgather):
    options: ClassVar = {"strategy": "allgather", "gather_heads": 1, **FLASH}
    worlds, thorough = worlds(2), WHOLE


class TestAllgatherMath(TestAllgather):
    __test__ = WHOLE
    options: ClassVar = {"strategy": "allgather", **MATH}


def heads_refused(processes: int, heads: int, kv_heads: int) -> str:
    """Why Ulysses over ``processes`` refuses these heads."""
    times = lcm(kv_heads, processes) // kv_heads
    fits = heads % processes == 0 and (heads // kv_heads) % times == 0
    return "" if fits else f"{heads} query and {kv_heads} key-value heads cannot be dealt to {processes}"


class TestUlysses(AttentionSuite):
    name = "torch-ring"
    options: ClassVar = {"strategy": "ulysses", **FLASH}
    worlds, thorough = worlds(3, 4), WHOLE

    def refuses(self, world: int, layout: str, mask: AttentionMask, heads: int, kv_heads: int) -> str:
        return heads_refused(world, heads, kv_heads)

    def multiple(self, world: int, layout: str) -> int:
        return world


class TestUlyssesMath(TestUlysses):
    __test__ = WHOLE
    options: ClassVar = {"strategy": "ulysses", **MATH}


INNER = {1: 1, 2: 1, 3: 1, 4: 2, 8: 2}
"""Neighbours that exchange heads where ``inner`` is left out: the largest divisor up to the root."""


class TestUsp(AttentionSuite):
    name = "torch-ring"
    options: ClassVar = {"strategy": "usp", **FLASH}
    worlds, thorough = worlds(4), WHOLE

    def refuses(self, world: int, layout: str, mask: AttentionMask, heads: int, kv_heads: int) -> str:
        return heads_refused(INNER[world], heads, kv_heads)

    def multiple(self, world: int, layout: str) -> int:
        return lcm(world, super().multiple(world // INNER[world], layout))


class TestUspMath(TestUsp):
    __test__ = WHOLE
    options: ClassVar = {"strategy": "usp", **MATH}


class TestAttentionPlugin(PluginSuite):
    kind, name = "attention", "torch-ring"
