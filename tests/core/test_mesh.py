"""Meshes: what is written comes back, one axis may take what is left, the rest is refused."""

from __future__ import annotations

import string
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_core.errors import ShapeError
from lwm_core.mesh import MESH_AXES, data_ranks, parse_mesh, resolve_mesh

sizes = st.integers(1, 9)


@given(st.tuples(sizes, sizes, sizes, sizes))
def test_four_sizes_in_order(four: tuple[int, int, int, int]) -> None:
    text = ",".join(map(str, four))
    assert tuple(parse_mesh(text)[axis] for axis in ("dp", "fsdp", "tp", "sp")) == four
    assert resolve_mesh(text, prod(four)) == parse_mesh(text)


@given(st.dictionaries(st.sampled_from(MESH_AXES), sizes, min_size=1), st.randoms())
def test_named_axes_in_any_order(named: dict[str, int], random) -> None:  # type: ignore[no-untyped-def]
    items = list(named.items())
    random.shuffle(items)
    parsed = parse_mesh(", ".join(f"{axis}:{size}" for axis, size in items))
    assert parsed == {axis: named.get(axis, 1) for axis in MESH_AXES}


@given(st.tuples(sizes, sizes, sizes), st.integers(0, 3), sizes)
def test_one_axis_takes_what_is_left(three: tuple[int, int, int], place: int, left: int) -> None:
    written = [*map(str, three)]
    written.insert(place, "-1")
    resolved = resolve_mesh(",".join(written), prod(three) * left)
    assert resolved[MESH_AXES[place]] == left
    assert prod(resolved.values()) == prod(three) * left


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("1,1,1", "3 sizes"),
        ("1,1,1,1,1", "5 sizes"),
        ("", "1 sizes"),
        ("dp:1,ep:2", "'ep'"),
        ("dp:1,dp:2", "given twice"),
        ("dp:1,2", "unknown"),
        ("1,x,1,1", "'x'"),
        ("1,1.5,1,1", "'1.5'"),
        ("1,0,1,1", "fsdp is 0"),
        ("1,-2,1,1", "-2"),
        ("-1,-1,1,1", "more than one -1"),
        ("dp:", "''"),
    ],
)
def test_wrong_meshes_are_told(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        parse_mesh(text)
    assert repr(text) in str(caught.value) and "\n" not in str(caught.value)


@given(st.text(string.digits + "-:, dpfst", max_size=20))
def test_any_text_gives_four_sizes_or_a_value_error(text: str) -> None:
    try:
        parsed = parse_mesh(text)
    except ValueError:
        return
    assert tuple(parsed) == MESH_AXES
    assert all(size == -1 or size > 0 for size in parsed.values())


@pytest.mark.parametrize(("text", "devices"), [("1,1,1,3", 4), ("2,2,2,2", 8), ("3,-1,1,1", 4), ("1,-1,8,1", 4)])
def test_a_mesh_that_does_not_fit_is_refused(text: str, devices: int) -> None:
    with pytest.raises(ShapeError, match=rf"{devices} devices|{devices} are here"):
        resolve_mesh(text, devices)


def test_data_ranks_carry_rows() -> None:
    assert data_ranks(parse_mesh("2,3,5,7")) == 6
