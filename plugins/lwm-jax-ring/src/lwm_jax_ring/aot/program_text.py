"""Reads what a compiler has made of a program: which instructions run, how often, and in which order.

XLA prints a scheduled module: one computation after the other, each a list of instructions in the order in which they
are issued. Loops count up from a constant to a constant by a constant, so that how often an instruction runs follows
from the text.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from lwm_core.errors import LwmError

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"^([\w\-]+)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CALLS = re.compile(r"\b(condition|body|to_apply|calls|branch_computations|true_computation|false_computation)=")
_INDEX = re.compile(r"\bindex=(\d+)")
CALLS = ("call", "call-start")
"""Opcodes that run what they name by ``to_apply``; a TPU's SparseCores are given collectives by ``call-start``."""

_BITS = {"pred": 8, "s4": 4, "u4": 4}


class ProgramTextError(LwmError):
    """The compiler's text is not what this reader knows."""


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str

    def called(self, attribute: str) -> list[str]:
        """Computations named by an attribute such as ``body``."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)", self.rest)
        return _NAME.findall(found[1]) if found else []


@dataclass
class Computation:
    """Instructions by name, in the order in which they are issued."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        """The last instruction, which gives the result."""
        return self.instructions[next(reversed(self.instructions))]


def _balanced(text: str) -> int:
    """Length of the first word of ``text``, brackets and what they hold taken as one."""
    depth = 0
    for at, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0 and char == " ":
            return at
    return len(text)


def _origin(computation: Computation, name: str) -> Instruction:
    """Where a value comes from, past what only moves it."""
    one = computation.instructions[name]
    while one.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        one = computation.instructions[one.operands[0]]
    return one


def _instruction(name: str, text: str) -> Instruction:
    width = _balanced(text)
    kind, after = text[:width], text[width + 1 :]
    found = _OPCODE.match(after)
    if found is None:
        raise ProgramTextError(f"compiled program: cannot read the instruction {name!r}: {text[:120]}")
    inside = after[found.end() - 1 :]
    end = _closing(inside)
    given, rest = inside[:end], inside[end:]
    return Instruction(name, kind, found[1], tuple(_NAME.findall(given)), given if found[1] == "constant" else rest)


def _closing(text: str) -> int:
    """Where the bracket that ``text`` begins with has closed."""
    depth = 0
    for at, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0:
            return at + 1
    return len(text)


def array_bytes(kind: str) -> int:
    """Bytes of all arrays in a type such as ``(bf16[1,8]{1,0}, u32[])``, without padding."""
    total = 0
    for name, dims in _ARRAY.findall(kind):
        count = 1
        for dim in filter(None, dims.split(",")):
            count *= int(dim)
        total += count * _bits(name) // 8
    return total


def _bits(name: str) -> int:
    if name in _BITS:
        return _BITS[name]
    digits = re.search(r"\d+", name)
    return int(digits[0]) if digits else 8


class ProgramText:
    """A module, parsed."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, Computation] = {}
        entry, current = None, None
        for line in text.splitlines():
            if current is None:
                header = _HEADER.match(line)
                if header:
                    current = Computation(header[2])
                    self.computations[current.name] = current
                    entry = current.name if header[1] else entry
            elif line.startswith("}"):
                current = None
            else:
                found = _INSTRUCTION.match(line)
                if found:
                    current.instructions[found[1]] = _instruction(found[1], found[2])
        if entry is None:
            raise ProgramTextError("compiled program: the text has no ENTRY computation")
        self.runs: dict[str, int] = defaultdict(int)
        """How often each computation runs; of the branches of a conditional each counts as taken."""
        self._count(entry, 1)

    def _count(self, name: str, times: int) -> None:
        self.runs[name] += times
        for one in self.computations[name].instructions.values():
            if one.opcode == "while":
                for body in one.called("body"):
                    self._count(body, times * self.trip_count(self.computations[name], one))
                continue
            for attribute in set(_CALLS.findall(one.rest)) - {"condition", "to_apply"} | (
                {"to_apply"} if one.opcode in CALLS else set()
            ):
                for called in one.called(attribute):
                    self._count(called, times)

    def trip_count(self, computation: Computation, loop: Instruction) -> int:
        """How often the body of ``loop`` runs: from its condition ``counter < limit``, where the counter starts, and
        what a round adds to it, which is more than one where the compiler has unrolled the body.

        Raises:
            ProgramTextError: the loop is not a counted one.
        """
        told = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
        if told:
            return int(told[1])
        condition = self.computations[loop.called("condition")[0]]
        test = condition.root
        if test.opcode == "fusion":  # the comparison alone, of the fusion's operands
            inner = self.computations[test.called("calls")[0]].root
            test = Instruction(inner.name, inner.type, inner.opcode, test.operands, inner.rest)
        direction = re.search(r"direction=(\w+)", test.rest)
        if test.opcode != "compare" or direction is None or direction[1] != "LT" or len(test.operands) != 2:
            raise ProgramTextError(f"compiled program: loop {loop.name!r} has no condition of the form i < n")
        start, limit = (self._constant(computation, loop, condition, operand) for operand in test.operands)
        return max(0, -(-(limit - start) // self._step(loop, condition.instructions[test.operands[0]])))

    def _step(self, loop: Instruction, counter: Instruction) -> int:
        """What a round of ``loop`` adds to ``counter``, an element of what the condition is given."""
        index = _INDEX.search(counter.rest)
        body = self.computations[loop.called("body")[0]]
        if index is None or body.root.opcode != "tuple":
            raise ProgramTextError(f"compiled program: the next value of loop {loop.name!r}'s counter cannot be read")
        following = _origin(body, body.root.operands[int(index[1])])
        added = [_origin(body, name) for name in following.operands]
        steps = [int(found[1]) for one in added if (found := re.fullmatch(r"\((\d+)\)", one.rest))]
        kept = [found[1] for one in added if (found := _INDEX.search(one.rest))]
        if following.opcode != "add" or kept != [index[1]] or len(steps) != 1 or not steps[0]:
            raise ProgramTextError(f"compiled program: loop {loop.name!r} does not count up by a constant")
        return steps[0]

    def _constant(self, outer: Computation, loop: Instruction, condition: Computation, name: str) -> int:
        """Value of an operand of a loop's condition before the first round."""
        one = condition.instructions[name]
        if one.opcode == "get-tuple-element":
            index = _INDEX.search(one.rest)
            initial = outer.instructions[loop.operands[0]]
            if index is None or initial.opcode != "tuple":
                raise ProgramTextError(f"compiled program: the first values of loop {loop.name!r} cannot be read")
            one = _origin(outer, initial.operands[int(index[1])])
        value = re.fullmatch(r"\((-?\d+)\)", one.rest)
        if one.opcode != "constant" or value is None:
            raise ProgramTextError(f"compiled program: loop {loop.name!r} does not count between constants")
        return int(value[1])

    def executed(self) -> Iterator[tuple[Instruction, Computation, int]]:
        """Every instruction that runs, the computation it is in, and how often."""
        for name, times in self.runs.items():
            computation = self.computations[name]
            for one in computation.instructions.values():
                yield one, computation, times
