"""The largest values of a program before it is compiled, as far as the program says how they are laid out.

A compiler that refuses a step for its memory tells sums, not what they are made of. The traced program has every value,
but a layout only where it says so: at a sharding constraint, and inside ``shard_map``, where shapes are a device's own.
From there layouts are carried through operations that keep a shape, and into loops and out of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

Part = tuple[int, ...]
"""Shape of a device's part."""


class Value(NamedTuple):
    """A value of the program: a device's part of it, and the operation that makes it."""

    bytes: int
    dtype: str
    part: Part
    whole: Part
    made_by: str

    def __str__(self) -> str:
        whole = f" of {list(self.whole)}" if self.whole != self.part else ""
        return f"{self.bytes / 2**30:.2f} GiB {self.dtype}{list(self.part)}{whole} by {self.made_by}"


def largest_values(jaxpr: Any, shardings: Sequence[Any] = (), most: int = 5) -> list[Value]:
    """The largest values whose layout is known, one of each kind: dtype, shape and part.

    Args:
        jaxpr: of the whole program.
        shardings: of its arguments, in order; None where one has none.
        most: how many to give, the largest first.
    """
    found: dict[tuple[str, Part, Part], Value] = {}
    known = {
        variable: tuple(sharding.shard_shape(variable.aval.shape))
        for variable, sharding in zip(jaxpr.invars, shardings, strict=False)
        if sharding is not None
    }
    for value in _values(jaxpr, known, local=False):
        kind = value.dtype, value.part, value.whole
        found.setdefault(kind, value)
    return sorted(found.values(), key=lambda value: -value.bytes)[:most]


def _inner(equation: Any) -> Any | None:
    """The program that an operation runs once or many times; none where it has none or several."""
    found = [
        getattr(value, "jaxpr", value)
        for value in equation.params.values()
        if hasattr(getattr(value, "jaxpr", value), "eqns")
    ]
    return found[0] if len(found) == 1 else None


def _values(jaxpr: Any, known: dict[Any, Part], local: bool) -> Iterator[Value]:
    """Values of ``jaxpr`` with a known layout. ``known`` has its arguments' parts, and gets those of its results.

    ``local``: inside ``shard_map``, where every shape is a device's own.
    """

    def part_of(variable: Any) -> Part | None:
        if hasattr(variable, "val"):  # a constant in place
            return None
        return _shape(variable) if local else known.get(variable)

    for equation in jaxpr.eqns:
        parts = [part_of(one) for one in equation.invars]
        inner, name = _inner(equation), equation.primitive.name
        results: Sequence[Part | None] = [None] * len(equation.outvars)
        if name == "sharding_constraint":
            shape = equation.outvars[0].aval.shape
            results = [tuple(equation.params["sharding"].shard_shape(shape))]
        elif inner is not None:
            within: dict[Any, Part] = {}
            if len(inner.invars) == len(parts):
                for index, (variable, part) in enumerate(zip(inner.invars, parts, strict=True)):
                    if part is not None:
                        within[variable] = _one_step(equation, index, part)
            inside = local or name == "shard_map"
            yield from _values(inner, within, inside)
            if len(inner.outvars) == len(equation.outvars):
                ends = [
                    _shape(one) if inside else None if hasattr(one, "val") else within.get(one) for one in inner.outvars
                ]
                results = [None if end is None else _all_steps(equation, i, end) for i, end in enumerate(ends)]
        else:
            same = {_shape(one): part for one, part in zip(equation.invars, parts, strict=True) if part is not None}
            results = [same.get(_shape(out)) for out in equation.outvars]
        for out, part in zip(equation.outvars, results, strict=True):
            part = _shape(out) if local else part
            if part is not None and hasattr(out.aval, "dtype"):
                known[out] = part
                where = str(equation.source_info.name_stack)
                made_by = f"{name} in {where}" if where else name
                size = prod(part) * out.aval.dtype.itemsize
                yield Value(size, str(out.aval.dtype), part, _shape(out), made_by)


def _shape(variable: Any) -> Part:
    return tuple(getattr(variable.aval, "shape", ()))


def _one_step(equation: Any, index: int, part: Part) -> Part:
    """Of what is given to a loop, the part that a step sees."""
    if equation.primitive.name != "scan":
        return part
    steady = equation.params["num_consts"] + equation.params["num_carry"]
    return part if index < steady else part[1:]


def _all_steps(equation: Any, index: int, part: Part) -> Part:
    """Of what a step of a loop gives, the part that all steps together do."""
    if equation.primitive.name != "scan" or index < equation.params["num_carry"]:
        return part
    return (equation.params["length"], *part)
