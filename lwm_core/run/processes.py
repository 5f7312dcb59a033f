"""What the processes of one run do together: rank 0 alone acts, or all act, and all learn whether it went well.

A failure is told by one process, which raises its own error; the others raise ``EndedElsewhereError`` and end with the
same exit code, so nobody is left waiting. In one process the functions are called as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar, cast

from lwm_core.errors import EndedElsewhereError, UnsupportedError
from lwm_core.launched import launched
from lwm_core.pipeline import Pipeline
from lwm_core.protocols import Processes, Trainer
from lwm_core.run.folder import RunFolder
from lwm_core.run.stopping import Stop, StoppedError

T = TypeVar("T")

_FAILED = 1 << 16
"""What a failure is told as, is a multiple of this plus its exit code; every signal's number is below."""


def first(processes: Processes, function: Callable[[], T]) -> T:
    """What ``function``, called on rank 0 alone, returns (JSON must be able to hold it), on every rank.

    Raises:
        EndedElsewhereError: on the other ranks, if it raises on rank 0.
    """
    if processes.world == 1:
        return function()
    if processes.rank > 0:
        told = processes.share(None)
        if told["exit_code"]:
            raise EndedElsewhereError(told["exit_code"])
        return cast(T, told["result"])
    try:
        result = function()
    except BaseException as error:
        with suppress(Exception):  # where they have gone themselves, this error is still the one to tell
            processes.share({"exit_code": exit_code(error)})
        raise
    return cast(T, processes.share({"exit_code": 0, "result": result})["result"])


def together(processes: Processes, function: Callable[[], T], stop: Stop | None = None) -> T:
    """Call ``function`` on every rank; every rank returns its own result, or all raise.

    The function must not wait for another rank: one that failed before would never come.

    Args:
        processes: of the run.
        function: what to do.
        stop: requests to stop that have come anywhere until now become known everywhere, as ``stop.agreed``.

    Raises:
        EndedElsewhereError: it raised, and the lowest rank on which it did is not this one, which tells its own error.
    """
    if processes.world == 1:
        result = function()
        if stop is not None:
            stop.hear(stop.signal_number)
        return result
    failure: BaseException | None = None
    done: Any = None
    try:
        done = function()
    except BaseException as error:
        failure = error
    if failure is not None:
        own = (processes.world - processes.rank) * _FAILED + exit_code(failure)
    else:
        own = 0 if stop is None else stop.signal_number
    try:
        said = processes.largest(own)
    except Exception:
        if failure is not None:
            raise failure from None
        raise
    if said >= _FAILED:
        if failure is not None and said == own:
            raise failure
        raise EndedElsewhereError(said % _FAILED) from failure
    if stop is not None:
        stop.hear(said)
    return cast(T, done)


def heed(processes: Processes, stop: Stop) -> None:
    """Raise :class:`StoppedError` on every rank if an end was asked for on any."""
    together(processes, lambda: None, stop)
    if stop.agreed:
        raise StoppedError(stop.agreed)


def exit_code(error: BaseException) -> int:
    """The code that the command ends with for ``error``, never 0."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    code = getattr(error, "exit_code", 1)
    return code if isinstance(code, int) and 0 < code < 256 else 1


@contextmanager
def locked(processes: Processes, folder: RunFolder) -> Iterator[None]:
    """Rank 0 holds the folder's lock.

    Raises:
        UsageError: another run's process has it.
    """
    with ExitStack() as stack:
        together(processes, lambda: None if processes.rank else stack.enter_context(folder.locked()))
        yield


def make_trainer(pipeline: Pipeline) -> Trainer:
    """The trainer, connected to its siblings.

    Raises:
        UnsupportedError: it is not in as many processes as were launched; each would take itself for the whole run.
    """
    trainer = pipeline.make_trainer()
    has, was = (trainer.processes.rank, trainer.processes.world), launched()
    if has == was:
        return trainer
    if has == (0, 1) and was[0] > 0:
        raise EndedElsewhereError(UnsupportedError.exit_code)  # rank 0 finds the same
    raise UnsupportedError(
        f"trainer {pipeline.selection.trainer.name!r} runs as rank {has[0]} of {has[1]}, but this process was launched "
        f"as rank {was[0]} of {was[1]} (RANK, WORLD_SIZE); start the command once, without a launcher, or choose a "
        "trainer for several processes"
    )
