"""LWM's pickled file: arrays come out as they went in, and nothing else comes out or runs."""

from __future__ import annotations

import io
import os
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.core import FrozenDict
from hypothesis import given
from hypothesis import strategies as st

from lwm_core.errors import CheckpointError
from lwm_vqgan.weights.unpickle import read_arrays

RANDOM = np.random.default_rng(0)
TREE = {
    "encoder": {"Conv_0": {"kernel": RANDOM.normal(size=(3, 3, 2, 4)).astype(np.float32), "bias": np.zeros(4, "f4")}},
    "half": RANDOM.normal(size=7).astype(np.float16),
    "columns": np.asfortranarray(RANDOM.normal(size=(3, 5))),
    "scalar": np.array(2.5, np.float32),
    "none": np.zeros((0, 3), np.float32),
    "big-endian": np.arange(5, dtype=">f4"),
    "whole": np.arange(4, dtype=np.int64),
    "strided": np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2],
    "brain": np.arange(6).astype(ml_dtypes.bfloat16),
}


def written(folder: Path, content: bytes) -> Path:
    path = folder / "vqgan"
    path.write_bytes(content)
    return path


def assert_same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, np.ndarray):
        assert isinstance(found, np.ndarray) and found.dtype.kind == wanted.dtype.kind
        assert found.shape == wanted.shape
        np.testing.assert_array_equal(found.astype(np.float64), wanted.astype(np.float64))
        return
    assert type(found) is dict and list(found) == list(wanted)
    for key in wanted:
        assert_same(found[key], wanted[key])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_come_out_of_every_protocol(protocol: int, tmp_path: Path) -> None:
    assert_same(read_arrays(written(tmp_path, pickle.dumps(TREE, protocol))), TREE)


@pytest.mark.parametrize("wrap", [FrozenDict, OrderedDict], ids=["flax", "collections"])
def test_other_dictionaries_come_out_as_plain_ones(wrap: Callable[..., Any], tmp_path: Path) -> None:
    tree = {"params": {"a": TREE["half"], "b": {"c": TREE["whole"]}}}
    assert_same(read_arrays(written(tmp_path, pickle.dumps(wrap(tree)))), tree)


def test_jax_arrays_come_out(tmp_path: Path) -> None:
    tree = {"a": {"b": jnp.arange(6.0).reshape(2, 3)}, "c": jnp.ones(3, jnp.bfloat16)}
    found = read_arrays(written(tmp_path, pickle.dumps(tree)))
    assert_same(found, {"a": {"b": np.arange(6.0, dtype="f4").reshape(2, 3)}, "c": np.ones(3, ml_dtypes.bfloat16)})


def test_names_of_an_older_numpy_are_known(tmp_path: Path) -> None:
    """NumPy 1, with which LWM's file was written, kept its functions in ``numpy.core``."""
    for protocol in (2, 5):
        content = pickle.dumps({"a": TREE["half"]}, protocol)
        old = content.replace(b"numpy._core", b"numpy.core")
        if protocol >= 4:  # the name's length, and the frame's
            old = old.replace(b"\x8c\x16numpy.core.numeric", b"\x8c\x12numpy.core.numeric")
            old = old.replace(b"\x8c\x13numpy.core.numeric", b"\x8c\x12numpy.core.numeric")
            at = old.index(b"\x95") + 1
            size = struct.unpack("<Q", old[at : at + 8])[0] - (len(content) - len(old))
            old = old[:at] + struct.pack("<Q", size) + old[at + 8 :]
        assert b"numpy.core" in old
        assert_same(read_arrays(written(tmp_path, old)), {"a": TREE["half"]})


class Calls:
    """Pickles as a call of ``function`` with ``arguments``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Mine(np.ndarray):
    """A class of arrays of its own."""


class Outside(pickle.Pickler):
    """Says of a set that it is to be found elsewhere."""

    def persistent_id(self, value: Any) -> Any:
        return "elsewhere" if isinstance(value, set) else None


def outside(tree: Any) -> bytes:
    buffer = io.BytesIO()
    Outside(buffer, 4).dump(tree)
    return buffer.getvalue()


def named(module: str, name: str, arguments: bytes, build: bytes = b"") -> bytes:
    """A pickle of protocol 2 that calls ``module.name`` and then maybe sets its state."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + arguments + b"R" + build + b"."


SHELL = "touch {mark}"
HOSTILE: dict[str, Callable[[str], bytes]] = {
    "os.system": lambda run: pickle.dumps({"a": Calls(os.system, run)}),
    "system.0": lambda run: pickle.dumps({"a": Calls(os.system, run)}, 0),
    "builtins.eval": lambda run: pickle.dumps({"a": Calls(eval, f"__import__('os').system({run!r})")}),
    "builtins.exec": lambda run: pickle.dumps(Calls(exec, f"import os; os.system({run!r})")),
    "subprocess": lambda run: named("subprocess", "getoutput", pickle.dumps((run,), 2)[2:-1]),
    "numpy's own loader": lambda run: named("numpy", "load", pickle.dumps((run,), 2)[2:-1]),
    "a dotted name": lambda run: b"\x80\x04\x8c\x05numpy\x8c\x14core.multiarray.load\x93)R.",
    "os through numpy": lambda run: (
        b"\x80\x04\x8c\x05numpy\x8c\x09os.system\x93" + pickle.dumps((run,), 4)[2:-1] + b"R."
    ),
    "objects in an array": lambda run: pickle.dumps({"a": np.array([Calls(os.system, run)], object)}),
    "objects of no content": lambda run: pickle.dumps({"a": np.array([None, 1], object)}),
    "a structured array": lambda run: pickle.dumps({"a": np.zeros(2, [("x", "f4"), ("y", "O")])}),
    "text in an array": lambda run: pickle.dumps({"a": np.array(["x"])}),
    "dates": lambda run: pickle.dumps({"a": np.zeros(2, "M8[s]")}),
    "a class of arrays": lambda run: pickle.dumps({"a": np.zeros(2).view(Mine)}),
    "numpy's scalar": lambda run: pickle.dumps({"a": np.float32(1.0)}),
    "a number": lambda run: pickle.dumps({"a": 1}),
    "a list": lambda run: pickle.dumps([np.zeros(2)]),
    "an object": lambda run: pickle.dumps({"a": io.BytesIO()}),
    "an instance": lambda run: b"(i__main__\nCalls\n.",
    "an outside reference": lambda run: outside({"a": set()}),
    "an extension code": lambda run: b"\x80\x02\x82\x01.",
    "a change to a stand-in": lambda run: b"\x80\x02cnumpy\ndtype\n}X\x05\x00\x00\x00_callNsb.",
    "slots of a stand-in": lambda run: b"\x80\x02cnumpy\ndtype\nN}X\x05\x00\x00\x00_callNs\x86b.",
    "a call of a marker": lambda run: b"\x80\x02cnumpy\nndarray\n)R.",
    "a name alone": lambda run: b"\x80\x02cnumpy\ndtype\n.",
    "an encoding": lambda run: named("_codecs", "encode", b"X\x01\x00\x00\x00aX\x05\x00\x00\x00utf-7\x86"),
    "a slot far out": lambda run: b"\x80\x02}r\xff\xff\xff\x7f.",
    "a length beyond the file": lambda run: b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.",
    "a dictionary in itself": lambda run: b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
    "text": lambda run: b"not a pickle at all",
    "nothing": lambda run: b"",
    "half of one": lambda run: pickle.dumps(TREE)[:200],
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_not_arrays_is_refused_and_never_runs(what: str, tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    content = HOSTILE[what](SHELL.format(mark=mark))
    path = written(tmp_path, content)
    with pytest.raises(CheckpointError) as caught:
        read_arrays(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message, message
    assert not mark.exists()


def test_the_hostile_pickle_would_have_run(tmp_path: Path) -> None:
    """The same bytes in the plain loader run the command: so the test above can fail."""
    mark = tmp_path / "it-ran"
    pickle.loads(HOSTILE["os.system"](SHELL.format(mark=mark)))
    assert mark.exists()


def test_a_refusal_names_what_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"asks for (posix|nt)\.system; arrays alone are read"):
        read_arrays(written(tmp_path, HOSTILE["os.system"]("true")))


@pytest.mark.parametrize(
    ("shape", "content"), [((2, 3), bytes(20)), ((-1, 4), bytes(16)), ((1 << 40,), bytes(8)), (("2",), bytes(8))]
)
def test_an_array_holds_what_its_shape_says(shape: Any, content: bytes, tmp_path: Path) -> None:
    """The parts of an array that lie about each other; ``numpy.frombuffer`` is never asked."""
    function, arguments, _ = np.zeros(2, np.float32).__reduce__()
    state = (1, shape, np.dtype(np.float32), False, content)

    class Lying:
        def __reduce__(self) -> Any:
            return function, arguments, state

    with pytest.raises(CheckpointError, match="refused: the pickle asks for an array of shape"):
        read_arrays(written(tmp_path, pickle.dumps({"a": Lying()}, 2)))


def test_dictionaries_that_unfold_without_end_are_refused(tmp_path: Path) -> None:
    tree: dict[str, Any] = {"a": np.zeros(1)}
    for _ in range(40):
        tree = {"a": tree, "b": tree}
    with pytest.raises(CheckpointError, match="over 100000"):
        read_arrays(written(tmp_path, pickle.dumps(tree)))


@given(st.data())
def test_a_damaged_file_is_refused_or_gives_arrays(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(pickle.dumps({"a": {"b": TREE["half"]}, "c": TREE["whole"]}, data.draw(st.integers(0, 5))))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = written(tmp_path_factory.getbasetemp(), bytes(content))
    try:
        found = read_arrays(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert type(found) is dict
