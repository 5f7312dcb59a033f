"""Where processes meet, which rows each feeds, who is found lost; real runs are in the integration tests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from lwm_core.errors import ShapeError, UsageError
from lwm_core.protocols import Stage
from lwm_core.rope import RopeSpec
from lwm_jax_ring.train import stage as stages
from lwm_jax_ring.train.distributed import meeting_place
from lwm_jax_ring.train.heartbeat import LEFT, VERDICT, Heartbeat, PeerLost, naming_the_lost

MASTER = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (MASTER, ("10.0.0.1", 29500)),
        ({**MASTER, "JAX_COORDINATOR_ADDRESS": "host:7"}, ("host", 7)),
        ({"JAX_COORDINATOR_ADDRESS": "[fd00::1]:7"}, ("fd00::1", 7)),
    ],
)
def test_meeting_place(environment: dict[str, str], expected: tuple[str, int]) -> None:
    assert meeting_place(environment) == expected


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT not set, but WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "'jax': MASTER_PORT not set"),
        ({**MASTER, "MASTER_PORT": "0"}, "expected HOST:PORT"),
        ({"JAX_COORDINATOR_ADDRESS": "host"}, "expected HOST:PORT"),
        ({"JAX_COORDINATOR_ADDRESS": "host:99999"}, "expected HOST:PORT"),
    ],
)
def test_meeting_place_that_is_none(environment: dict[str, str], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        meeting_place(environment)


@dataclass(frozen=True)
class Device:
    id: int
    process_index: int


def fed(mesh: str, processes: int, each: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    devices: Any = [Device(i, i // each) for i in range(processes * each)]
    monkeypatch.setattr(
        stages, "make_mesh", lambda sizes, given: SimpleNamespace(devices=np.array(given).reshape(list(sizes.values())))
    )
    stage = Stage("s", 64, RopeSpec(1e4), 640, 64, 1e-3, 1e-3, mesh=mesh)
    return [stages.fed_rows(stage, devices, one) for one in range(processes)]


@pytest.mark.parametrize(
    ("mesh", "processes", "each", "expected"),
    [
        ("1,1,1,4", 2, 2, [(0, 1), (0, 1)]),
        ("1,2,1,2", 2, 2, [(0, 2), (1, 2)]),
        ("1,4,1,1", 2, 2, [(0, 2), (1, 2)]),
        ("2,1,4,1", 4, 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ("2,2,1,2", 2, 4, [(0, 2), (1, 2)]),
    ],
)
def test_a_process_feeds_the_rows_of_its_devices(
    mesh: str, processes: int, each: int, expected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fed(mesh, processes, each, monkeypatch) == expected


@pytest.mark.parametrize(("mesh", "processes", "each"), [("1,3,1,2", 2, 3), ("1,2,1,3", 3, 2)])
def test_rows_that_processes_would_share_in_part_are_refused(
    mesh: str, processes: int, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ShapeError, match="unevenly"):
        fed(mesh, processes, each, monkeypatch)


class Beating:
    """A store in which the ranks of ``alive`` count on each time they are looked at."""

    def __init__(self, words: dict[str, str], alive: list[int]) -> None:
        self.words, self.alive = words, alive

    def put(self, key: str, word: str) -> None:
        self.words[key] = word

    def get(self, key: str) -> str | None:
        if key in {f"lwm/beat/{rank}" for rank in self.alive}:
            self.words[key] = str(int(self.words[key]) + 1)
        return self.words.get(key)


def heart(alive: list[int], **left: str) -> tuple[Heartbeat, Beating]:
    store = Beating({f"lwm/beat/{rank}": "5" for rank in range(4)}, alive)
    store.words.update({f"lwm/beat/{rank[1:]}": word for rank, word in left.items()})
    one = Heartbeat(0, 4)
    one._store = store  # type: ignore[assignment]
    return one, store


def test_who_is_gone() -> None:
    assert heart([0, 1, 2, 3])[0].gone(0) is None
    assert heart([0, 1, 3])[0].gone(0) == "rank 2 has died"
    assert heart([0, 3])[0].gone(0) == "ranks 1, 2 have died"
    assert heart([0, 1, 2], r3=LEFT)[0].gone(0) == "rank 3 has ended"


def test_a_failed_transfer_names_the_lost_and_tells_all(monkeypatch: pytest.MonkeyPatch) -> None:
    one, store = heart([0, 1, 3])
    gone = one.gone
    monkeypatch.setattr(one, "gone", lambda: gone(0))
    monkeypatch.setattr("threading.Timer.start", lambda self: None)  # it would end this process
    with pytest.raises(PeerLost, match="rank 2 has died"), naming_the_lost(one):
        raise jax.errors.JaxRuntimeError("INTERNAL: connection closed by peer")
    assert store.words[VERDICT] == "rank 2 has died"
    with pytest.raises(PeerLost, match="rank 2"):
        one.check()


def test_an_error_of_its_own_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    one, store = heart([0, 1, 2, 3])
    gone = one.gone
    monkeypatch.setattr(one, "gone", lambda: gone(0))
    for said in ("RESOURCE_EXHAUSTED: out of memory", "INTERNAL: something else"):
        with pytest.raises(jax.errors.JaxRuntimeError, match=said[:8]), naming_the_lost(one):
            raise jax.errors.JaxRuntimeError(said)
    assert VERDICT not in store.words


def ranks(world: int, *meshes: str) -> list[dict[str, Any]]:
    """What each of ``world`` processes, with four devices together, gives on the meshes."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    started = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("jax_rank.py")), *meshes],
            env={
                **os.environ, "RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(4 // world),
            },
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        said = [one.communicate(timeout=300) for one in started]
    finally:
        for one in started:
            one.kill()
    assert [one.returncode for one in started] == [0] * world, [errors[-2000:] for _, errors in said]
    return [json.loads(output) for output, _ in said]


@pytest.mark.slow
@pytest.mark.parametrize("meshes", [("1,1,1,4", "2,1,2,1")])
def test_two_processes_give_what_one_gives(meshes: tuple[str, ...]) -> None:
    """Steps, losses, scores, tokens and parameters; data ranks, rings and tensor parallelism across processes."""
    (alone,), both = ranks(1, *meshes), ranks(2, *meshes)
    assert both[0] == both[1]
    for one, other in zip(alone["metrics"], both[0]["metrics"], strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    np.testing.assert_allclose(alone["scores"], both[0]["scores"], atol=1e-4)
    assert alone["tokens"] == both[0]["tokens"]
    assert alone["sums"] == pytest.approx(both[0]["sums"], rel=1e-4)
    assert alone["same"] and both[0]["same"]
