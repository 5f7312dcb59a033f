"""Arrays out of a pickle, and nothing else: what else it asks for is refused before anything of it runs.

A pickle is a program: it may name any importable object and call it. Here a name is looked up in the table below,
never imported, and what the table gives are stand-ins of this file. They take apart what NumPy writes and keep it as
plain numbers; NumPy's own loaders, which trust their input, are never called. A name that is not in the table ends
the reading. Before that, the program's instructions are read one by one, and those that plain data does not need
(making objects, extension codes, outside references) are refused too. Stand-ins are instances that cannot be changed,
so a pickle leaves no mark on them.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lwm_core.errors import CheckpointError

Tree = dict[str, Any]
"""Name → array or tree."""

_DTYPES: dict[str, np.dtype[Any]] = {
    "f2": np.dtype("f2"), "f4": np.dtype("f4"), "f8": np.dtype("f8"), "bfloat16": np.dtype(ml_dtypes.bfloat16),
    **{f"{kind}{size}": np.dtype(f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)},
    "b1": np.dtype("b1"),
}  # fmt: skip
_ORDERS = ("<", ">", "=", "|")
_MOST_DEEP = 64  # a model's tree has about ten levels; deeper ones, and those that hold themselves, are refused
_MOST_NODES = 100_000  # a model has hundreds; dictionaries that share dictionaries can unfold without end

_PLAIN = """
    PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1
    STRING BINSTRING SHORT_BINSTRING UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8
    SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS
    EMPTY_DICT DICT SETITEM SETITEMS PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET
    GLOBAL STACK_GLOBAL REDUCE BUILD
"""
_INSTRUCTIONS = frozenset(_PLAIN.split())
"""All that dictionaries, tuples and arrays are written with in any protocol."""

_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")


class _Refused(pickle.UnpicklingError):
    """The pickle holds what is not an array."""


class _Dtype:
    """A dtype by its code; numbers only."""

    __slots__ = ("dtype",)

    def __init__(self, code: object) -> None:
        if not isinstance(code, str) or code.lstrip("<>=|") not in _DTYPES:
            raise _Refused(f"an array of dtype {code!r}")
        order = code[0] if code[0] in "<>" else "="
        self.dtype = _DTYPES[code.lstrip("<>=|")].newbyteorder(order)

    def __setstate__(self, state: object) -> None:
        # (version, byte order, subdtype, names, fields, item size, alignment, flags): all but the order must be as
        # for plain numbers; ml_dtypes' own say nothing here.
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in _ORDERS or any(state[2:5]):
            raise _Refused(f"a dtype of the form {state!r}")
        if self.dtype != _DTYPES["bfloat16"]:
            self.dtype = self.dtype.newbyteorder("=" if state[1] == "|" else state[1])


class _Array:
    """An array whose shape, dtype and bytes come in its state."""

    __slots__ = ("array",)

    def __init__(self) -> None:
        self.array: NDArray[Any] | None = None

    def __setstate__(self, state: object) -> None:
        # (version, shape, dtype, Fortran order, bytes)
        if not isinstance(state, tuple) or len(state) != 5:
            raise _Refused("an array of unknown form")
        _, shape, dtype, fortran, content = state
        self.array = _filled(shape, dtype, "F" if fortran else "C", content)


def _filled(shape: object, dtype: object, order: object, content: object) -> NDArray[Any]:
    """An array made of checked parts.

    Raises:
        _Refused: the parts do not make an array of numbers.
    """
    if isinstance(shape, int):
        shape = (shape,)
    if not isinstance(shape, tuple) or not all(type(length) is int and length >= 0 for length in shape):
        raise _Refused(f"an array of shape {shape!r}")
    if not isinstance(dtype, _Dtype):
        raise _Refused("an array whose dtype is not a number's")
    if not isinstance(content, (bytes, bytearray)):
        raise _Refused(f"an array whose content is a {type(content).__name__}")
    if prod(shape) * dtype.dtype.itemsize != len(content):
        raise _Refused(f"an array of shape {shape} with {len(content)} bytes")
    if order not in ("C", "F"):
        raise _Refused(f"an array in order {order!r}")
    return np.frombuffer(content, dtype.dtype).reshape(shape, order=order)


def _begin_array(kind: object, *_: object) -> _Array:
    """NumPy's ``_reconstruct(ndarray, (0,), b"b")``: an empty array that its state then fills."""
    if kind is not _NDARRAY:
        raise _Refused("an array of a class of its own")
    return _Array()


def _make_dtype(code: object, *_: object) -> _Dtype:
    """``dtype("f4", False, True)``, and ``dtype(bfloat16, False, True)``."""
    return _Dtype("bfloat16" if code is _BFLOAT16 else code)


def _from_buffer(content: object, dtype: object, shape: object, order: object, *_: object) -> _Array:
    """NumPy's ``_frombuffer``, which it writes from protocol 5 on."""
    made = _Array()
    made.array = _filled(shape, dtype, order, content)
    return made


def _jax_array(begin: object, arguments: object, state: object, *_: object) -> _Array:
    """JAX's ``_reconstruct_array``: a NumPy array's own three parts, and a record that does not matter here."""
    if begin not in (_TABLE["numpy._core.multiarray", "_reconstruct"], _TABLE["numpy._core.numeric", "_frombuffer"]):
        raise _Refused("a JAX array that is not made of a NumPy array")
    if not isinstance(arguments, tuple):
        raise _Refused("a JAX array of unknown form")
    made: _Array = begin(*arguments)  # type: ignore[operator]
    if state is not None:
        made.__setstate__(state)
    return made


def _latin_1(text: object, encoding: object) -> bytes:
    """``_codecs.encode(text, "latin1")``, as which the protocols up to 2 write bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise _Refused("text in an encoding")
    return text.encode("latin-1")


def _no_bytes(*given: object) -> bytes:
    """``bytes()``, as which the protocols up to 2 write that there are none."""
    if given:
        raise _Refused("bytes made from something else")
    return b""


def _plain_dict(*items: object) -> dict[Any, Any]:
    """``FrozenDict(dict)`` and ``OrderedDict()`` as a plain dictionary."""
    if len(items) > 1 or not all(isinstance(item, dict) for item in items):
        raise _Refused("a dictionary of unknown form")
    return dict(*items)  # type: ignore[call-overload,no-any-return]


class _StandIn:
    """What a name in the pickle gives: it can be called, and nothing else can be done with it."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any] | None) -> None:
        object.__setattr__(self, "_call", call)

    def __call__(self, *arguments: object) -> Any:
        if self._call is None:
            raise _Refused("a call of what is only a name")
        return self._call(*arguments)

    def __setattr__(self, name: str, value: object) -> None:
        raise _Refused("a change to what makes arrays")

    def __setstate__(self, state: object) -> None:
        raise _Refused("a change to what makes arrays")


_NDARRAY, _BFLOAT16 = _StandIn(None), _StandIn(None)
_RECONSTRUCT, _FROMBUFFER, _DICT = _StandIn(_begin_array), _StandIn(_from_buffer), _StandIn(_plain_dict)
_TABLE: dict[tuple[str, str], _StandIn] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _StandIn(_make_dtype),
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy.core.numeric", "_frombuffer"): _FROMBUFFER,
    ("numpy._core.numeric", "_frombuffer"): _FROMBUFFER,
    ("ml_dtypes", "bfloat16"): _BFLOAT16,
    ("_codecs", "encode"): _StandIn(_latin_1),
    ("__builtin__", "bytes"): _StandIn(_no_bytes),
    ("collections", "OrderedDict"): _DICT,
    ("flax.core.frozen_dict", "FrozenDict"): _DICT,
    ("jax._src.array", "_reconstruct_array"): _StandIn(_jax_array),
}


class _ArraysOnly(pickle.Unpickler):
    """Names come from the table alone."""

    def find_class(self, module: str, name: str) -> Any:
        found = _TABLE.get((module, name))
        if found is None:
            raise _Refused(f"{module}.{name}")
        return found

    def persistent_load(self, pid: object) -> Any:
        raise _Refused("a reference to something outside of it")


def _check_instructions(file: BinaryIO) -> None:
    """Refuse what is not in ``_INSTRUCTIONS``, and memo slots out of order, for which memory would be taken.

    Raises:
        _Refused: there is such a thing; the file was only looked at.
    """
    slots = 0
    for instruction, argument, _ in pickletools.genops(file):
        if instruction.name not in _INSTRUCTIONS:
            raise _Refused(f"the instruction {instruction.name}")
        if instruction.name in _PUTS:
            if argument is None or not 0 <= int(argument) <= slots:
                raise _Refused(f"memo slot {argument} after {slots}")
            slots += 1
        slots += instruction.name == "MEMOIZE"


def read_arrays(path: Path) -> Tree:
    """The tree of arrays that a pickle holds: dictionaries with text keys, and arrays of numbers at their ends.

    Raises:
        CheckpointError: the file cannot be read, is no pickle, or holds anything but that. Nothing of it has run.
    """
    try:
        with path.open("rb") as file:
            _check_instructions(file)
            file.seek(0)
            return _tree(_ArraysOnly(file).load(), (), [0])
    except _Refused as error:
        raise CheckpointError(
            f"{path}: refused: the pickle asks for {error}; arrays alone are read, and nothing of it was run"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # pickle documents that a damaged file may raise any exception
        raise CheckpointError(f"{path}: not a whole pickle of arrays: {type(error).__name__}: {error}") from None


def _tree(node: object, path: tuple[str, ...], seen: list[int]) -> Tree:
    if not isinstance(node, dict):
        raise _Refused(f"a {type(node).__name__} at {'/'.join(path) or 'the top'}, where a dictionary belongs")
    if len(path) > _MOST_DEEP:
        raise _Refused(f"dictionaries over {_MOST_DEEP} deep")
    seen[0] += len(node)
    if seen[0] > _MOST_NODES:
        raise _Refused(f"over {_MOST_NODES} arrays and dictionaries")
    tree: Tree = {}
    for key, value in node.items():
        if not isinstance(key, str):
            raise _Refused(f"a key of type {type(key).__name__}")
        if isinstance(value, _Array):
            if value.array is None:
                raise _Refused(f"an array without content at {'/'.join((*path, key))}")
            tree[key] = value.array
        else:
            tree[key] = _tree(value, (*path, key), seen)
    return tree
