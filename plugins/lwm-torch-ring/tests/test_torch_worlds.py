"""One model on many meshes of real processes: the same losses, gradients, tokens and checkpoints as on one.

Every world is started once and does several cases.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch_cases import run_ranks

SCRIPT = Path(__file__).parent / "torch_trainer_world.py"

MESHES = {
    1: ["1,1,1,1"],
    2: ["1,1,1,2", "1,2,1,1", "2,1,1,1", "1,1,2,1"],
    3: ["1,1,1,3"],
    4: ["1,1,2,2", "1,2,2,1", "2,1,1,2"],
}
MORE: dict[str, list[dict[str, Any]]] = {
    "1,1,1,1": [{"accumulate": 2}, {"remat": "full", "token_chunk": 16}, {"remat": "offload"}, {"remat": "none"},
                {"remat": "dots"}],
    "1,1,1,2": [{"shard_parameters": []}, {"accumulate": 2, "remat": "full"}, {"attention": {"strategy": "ulysses"}}],
    "1,1,2,2": [{"token_chunk": 8, "remat": "offload"}],
    "2,1,1,2": [{"accumulate": 2, "shard_parameters": ["dp"]}],
}  # fmt: skip
PLAIN = [(world, mesh, {}) for world, meshes in MESHES.items() for mesh in meshes]
CHANGED = [(world, mesh, more) for world, mesh, _ in PLAIN for more in MORE.get(mesh, [])]
CASES = PLAIN + CHANGED
CHUNKS: dict[str, list[dict[str, Any]]] = {
    "1,1,1,1": [{"read_chunk": 16}, {"read_chunk": 33}], "1,1,1,2": [{"read_chunk": 16}],
    "1,1,1,3": [{"read_chunk": 40}], "1,1,2,2": [{"read_chunk": 16}], "1,2,1,1": [{"read_chunk": 16}],
}  # fmt: skip
READ = [(world, mesh, more) for world, mesh, _ in PLAIN for more in [{}, *CHUNKS.get(mesh, [])]]
"""Of generation: a prompt at once, and in chunks."""


pytestmark = pytest.mark.slow


def told(world: int, cases: list[dict[str, Any]]) -> list[Any]:
    results: list[Any] = json.loads(run_ranks(world, SCRIPT, json.dumps(cases))[0])
    return results


SHORT: dict[str, Any] = {"compute_dtype": "bfloat16", "token_chunk": 8}
IN_SHORT = [(1, "1,1,1,1"), (2, "1,1,1,2"), (4, "1,1,2,2")]


@cache
def results(world: int) -> dict[str, Any]:
    """Everything that a world can tell of training and generation, by mesh and options."""
    asked = [
        {"do": do, "mesh": mesh, "more": more}
        for do, cases in (("train", [*CASES, *((*one, SHORT) for one in IN_SHORT)]), ("generate", READ))
        for size, mesh, more in cases
        if size == world
    ]
    found = zip(asked, told(world, asked), strict=True)
    return {f"{one['do']} {one['mesh']} {one['more']}": result for one, result in found}


def result(do: str, world: int, mesh: str, more: dict[str, Any] | None = None) -> Any:
    return results(world)[f"{do} {mesh} {more or {}}"]


@pytest.mark.parametrize(("world", "mesh", "more"), CASES)
def test_losses_and_gradients_are_those_of_one_process(world: int, mesh: str, more: dict[str, Any]) -> None:
    expected, got = result("train", 1, "1,1,1,1"), result("train", world, mesh, more)
    for name, values in expected["gradients"].items():
        np.testing.assert_allclose(got["gradients"][name], values, rtol=1e-5, atol=1e-7, err_msg=name)
    for key in ("steps", "evaluated", "after"):
        np.testing.assert_allclose(got[key], expected[key], rtol=1e-5, err_msg=key)
    assert got["steps"][2][0] < got["steps"][0][0]


@pytest.mark.parametrize(("world", "mesh"), IN_SHORT)
def test_bfloat16_errs_no_more_on_many(world: int, mesh: str) -> None:
    """Gradients are added up in float32 over slices and ranks: their errors do not grow with either."""
    exact = result("train", 1, "1,1,1,1")["gradients"]
    errors = [
        np.mean([abs(of["gradients"][name][0] / norm - 1) for name, (norm, _) in exact.items()])
        for of in (result("train", 1, "1,1,1,1", SHORT), result("train", world, mesh, SHORT))
    ]
    assert 0 < errors[0] < 0.01 and errors[1] < max(1.5 * errors[0], 2e-3)


@pytest.mark.parametrize(("world", "mesh", "more"), READ)
def test_tokens_and_scores_are_those_of_one_process(world: int, mesh: str, more: dict[str, Any]) -> None:
    expected, got = result("generate", 1, "1,1,1,1"), result("generate", world, mesh, more)
    for key in ("greedy", "drawn", "apart", "streamed", "guided"):
        assert got[key] == expected[key], key
    assert got["apart"] == got["greedy"] and got["streamed"] == got["greedy"][1]
    np.testing.assert_allclose(got["scores"], expected["scores"], rtol=1e-4)
    np.testing.assert_allclose(got["steps"], expected["steps"], rtol=1e-5)


def test_a_conversation_is_that_of_one_process() -> None:
    """Answers that are longer than a page, wherever the cache lies; training goes on after it."""
    talk = {"do": "converse", "most": 140}
    meshes = {1: ["1,1,1,1"], 2: ["1,1,1,2", "1,2,1,1"], 3: ["1,1,1,3"], 4: ["1,1,2,2"]}
    cases = {
        world: [{**talk, "mesh": mesh, "more": more} for size, mesh, more in READ if size == world and mesh in of]
        for world, of in meshes.items()
    }
    [expected, *_], *_ = found = [told(world, of) for world, of in cases.items()]
    for world, of in zip(cases, found, strict=True):
        for case, got in zip(cases[world], of, strict=True):
            assert [turn[:2] for turn in got[:3]] == [turn[:2] for turn in expected[:3]], case
            for given, anew, joined in got[:3]:
                assert given == anew and len(given) == joined
            assert [joined for _, _, joined in got[:3]] == [5, 140, 5]
            np.testing.assert_allclose(got[3], expected[3], rtol=1e-5)


def test_parameters_are_shared_out() -> None:
    """A rank holds its part of them, and all of them where the mesh says that they are copied."""
    whole = result("train", 1, "1,1,1,1")["held"]
    for mesh, world, ranks in (("1,1,1,2", 2, 2), ("1,1,1,3", 3, 3), ("1,1,2,2", 4, 4), ("2,1,1,2", 4, 2)):
        held = result("train", world, mesh)["held"]
        assert whole / ranks <= held < 1.05 * whole / ranks, mesh  # norms are whole on every rank of tp
    assert result("train", 2, "2,1,1,1")["held"] == whole
    assert result("train", 2, "1,1,1,2", {"shard_parameters": []})["held"] == whole


@pytest.mark.parametrize("world", [1, 2])  # more ranks than cores take minutes
def test_an_export_is_whole_and_takes_twice_the_largest_at_most(world: int, tmp_path: Path) -> None:
    """Parameters lie in parts on all ranks, also uneven ones, and are brought together in blocks of a few rows."""
    cases = [
        {"do": "export", "mesh": mesh, "block": 12_000, "dtype": "float32", "folder": str(tmp_path / mesh)}
        for mesh in MESHES[world]
    ]
    large = {"text": 17_000, "hidden_size": 512, "num_layers": 1, "tie_embeddings": False}  # two tables of 34 MiB
    cases += [
        {"do": "export", "mesh": mesh, "dtype": dtype, "model": large, "folder": str(tmp_path / f"{mesh} {dtype}")}
        for mesh in MESHES[world][-1:] for dtype in ("float32", "bfloat16")
    ]  # fmt: skip
    for case, got in zip(cases, told(world, cases), strict=True):
        assert got["same"], case
        if "model" in case:
            print(case["mesh"], case["dtype"], got["growth"])
            assert got["growth"] < 2.1, case


@pytest.mark.parametrize(("world", "mesh", "other"), [(1, "1,1,1,1", 3), (2, "1,1,1,2", 1), (4, "1,1,2,2", 2)])
def test_a_checkpoint_continues(world: int, mesh: str, other: int, tmp_path: Path) -> None:
    """Bit for bit on the same mesh, though training went on while it was written; to rounding on any other."""
    cases = [{"do": "save", "mesh": mesh, "folder": str(tmp_path)}]
    cases += [{"do": "restore", "mesh": one, "folder": str(tmp_path)} for one in MESHES[world]]
    saved, *restored = told(world, cases)
    for case, [again] in zip(cases[1:], restored, strict=True):
        np.testing.assert_allclose(again, saved[2], rtol=1e-5)
        assert case["mesh"] != mesh or again == saved[2]
    [[again]] = told(other, [{"do": "restore", "mesh": MESHES[other][0], "folder": str(tmp_path)}])
    np.testing.assert_allclose(again, saved[2], rtol=1e-5)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".safetensors"]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_queries_find_what_is_cached_wherever_it_lies(world: int) -> None:
    """Rows of unequal lengths, one of them all on a few ranks: queries that travel, keys that travel, one at a time."""
    cases = [{"do": "read", "mesh": f"1,1,1,{world}", "lengths": lengths} for lengths in ([40, 40], [7, 90, 23])]
    for far in told(world, cases):
        assert far.keys() == {"pass-Q", "pass-KV", "one"} and max(far.values()) < 1e-5


def test_a_stage_may_have_another_mesh() -> None:
    [expected] = told(1, [{"do": "move", "mesh": "1,1,1,1", "to": "1,1,1,1"}])
    cases = [{"do": "move", "mesh": "1,1,1,4", "to": "1,2,2,1"}, {"do": "move", "mesh": "1,2,2,1", "to": "1,1,1,4"}]
    for got in told(4, cases):
        np.testing.assert_allclose(got, expected, rtol=1e-5)
