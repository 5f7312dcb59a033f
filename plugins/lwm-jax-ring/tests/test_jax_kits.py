"""The conformance kits on this plugin: every strategy with both kernels, and the light specs.

The suite runs a part of it; ``nox -s kits`` runs every strategy and kernel at every number of devices.
"""

from __future__ import annotations

import os
from math import lcm
from typing import ClassVar

from lwm_core.attention import AttentionMask
from lwm_core.testing import AttentionSuite, PluginSuite
from lwm_core.testing.attention_cases import WORLDS

WHOLE = os.environ.get("LWM_KITS") == "whole"
XLA = {"query_chunk": 4, "key_chunk": 4}  # so that chunks are skipped and masked
PALLAS = {"kernel": "pallas-tpu", "interpret": True}
CUDNN = {"kernel": "cudnn", "interpret": True, "fused_block": 8, **XLA}  # so that all its kinds of blocks occur


def worlds(*few: int) -> tuple[int, ...]:
    """All numbers of devices, or the few that stand for them."""
    return WORLDS if WHOLE else few


class TestRing(AttentionSuite):
    name = "jax-ring"
    options: ClassVar = {"strategy": "ring", **XLA}
    worlds = worlds(1, 3, 4)


class TestRingPallas(TestRing):
    options: ClassVar = {"strategy": "ring", **PALLAS}
    worlds, thorough = worlds(2), WHOLE


class TestRingCudnn(TestRing):
    options: ClassVar = {"strategy": "ring", **CUDNN}
    worlds, thorough = worlds(3), WHOLE


class TestAllgather(AttentionSuite):
    name = "jax-ring"
    options: ClassVar = {"strategy": "allgather", **XLA}
    worlds, thorough = worlds(3), WHOLE


class TestAllgatherPallas(TestAllgather):
    __test__ = WHOLE
    options: ClassVar = {"strategy": "allgather", **PALLAS}


class TestAllgatherCudnn(TestAllgather):
    __test__ = WHOLE
    options: ClassVar = {"strategy": "allgather", **CUDNN}


def heads_refused(devices: int, heads: int, kv_heads: int) -> str:
    """Why Ulysses over ``devices`` refuses these heads."""
    times = lcm(kv_heads, devices) // kv_heads
    fits = heads % devices == 0 and (heads // kv_heads) % times == 0
    return "" if fits else f"{heads} query and {kv_heads} key-value heads cannot be dealt to {devices}"


class TestUlysses(AttentionSuite):
    name = "jax-ring"
    options: ClassVar = {"strategy": "ulysses", **XLA}
    worlds, thorough = worlds(4), WHOLE

    def refuses(self, world: int, layout: str, mask: AttentionMask, heads: int, kv_heads: int) -> str:
        return heads_refused(world, heads, kv_heads)

    def multiple(self, world: int, layout: str) -> int:
        return world


class TestUlyssesPallas(TestUlysses):
    __test__ = WHOLE
    options: ClassVar = {"strategy": "ulysses", **PALLAS}


class TestUlyssesCudnn(TestUlysses):
    __test__ = WHOLE
    options: ClassVar = {"strategy": "ulysses", **CUDNN}


class TestUsp(AttentionSuite):
    name = "jax-ring"
    options: ClassVar = {"strategy": "usp", **XLA}
    worlds, thorough = worlds(4), WHOLE

    def refuses(self, world: int, layout: str, mask: AttentionMask, heads: int, kv_heads: int) -> str:
        return heads_refused(INNER[world], heads, kv_heads)

    def multiple(self, world: int, layout: str) -> int:
        return lcm(world, super().multiple(world // INNER[world], layout))


class TestUspPallas(TestUsp):
    __test__ = WHOLE
    options: ClassVar = {"strategy": "usp", **PALLAS}


class TestUspCudnn(TestUsp):
    __test__ = WHOLE
    options: ClassVar = {"strategy": "usp", **CUDNN}


INNER = {1: 1, 2: 1, 3: 1, 4: 2, 8: 2}
"""Neighbours that exchange heads where ``inner`` is left out: the largest divisor up to the root."""


class TestAttentionPlugin(PluginSuite):
    kind, name = "attention", "jax-ring"


class TestTrainerPlugin(PluginSuite):
    kind, name = "trainer", "jax"
