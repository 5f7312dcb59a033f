"""Rank 0 leads: what it asks of the model is asked on every rank, in step.

Evaluation suites, samples and exports run on rank 0 alone, but a model that is dealt to several processes answers only
when all of them ask. Rank 0 shares each order before it carries it out; the others carry out the same until they hear
the end. A stream (tokens, parameters) goes on by one order an item, so whoever leaves it early leaves it everywhere. A
session is held on every rank until rank 0 has closed or dropped its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from typing import Any, Protocol, TypeVar, cast
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

from lwm_core.errors import EndedElsewhereError, LwmError
from lwm_core.protocols import Generator, SamplingSpec, Scorer, Session, Trainer
from lwm_core.run.processes import exit_code
from lwm_core.run.stopping import Stop

T = TypeVar("T")

_OVER = object()
"""What a stream gives after its last item."""


class Model(Protocol):
    """What can be asked of a trained model. Every trainer is one; see ``lwm_core.protocols.Trainer``."""

    def generator(self) -> Generator:
        """Generation."""
        ...

    def scorer(self) -> Scorer:
        """Log-likelihoods."""
        ...

    def iter_parameters(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """(canonical name, array), one at a time."""
        ...


def lead(trainer: Trainer, work: Callable[[Model], T], stop: Stop | None = None) -> T | None:
    """Call ``work`` with the trainer's model on rank 0; the other ranks answer along until it ends.

    Args:
        trainer: its stage must have begun.
        work: may ask the model it is given, in one thread; it must not call the trainer by itself.
        stop: requests to stop that have come to any rank become known to all with each question.

    Returns:
        what ``work`` returns, on rank 0; None on the others.

    Raises:
        EndedElsewhereError: on the other ranks, if it raises.
    """
    processes = trainer.processes
    if processes.world == 1:
        return work(trainer)
    if processes.rank > 0:
        _follow(trainer, stop)
        return None
    leader = LeadModel(trainer, stop)
    try:
        result = work(leader)
    except BaseException as error:
        with suppress(Exception):  # where they have gone themselves, this error is still the one to tell
            leader.end(exit_code(error))
        raise
    leader.end(0)
    return result


def _follow(trainer: Trainer, stop: Stop | None) -> None:
    hands = _Hands(trainer)
    failure: Exception | None = None
    while True:
        told = trainer.processes.share(None)
        if failure is not None and not told["failed"]:
            raise failure  # rank 0 went on without us
        failure = None
        if told["end"] is not None:
            if told["end"]:
                raise EndedElsewhereError(told["end"])
            return
        if stop is not None:
            stop.hear(trainer.processes.largest(stop.signal_number))
        try:
            hands.do(told)
        except Exception as error:
            # Rank 0 most likely met the same, and whoever asked there may be content with that: its next word tells.
            failure = error


class LeadModel:
    """The model on rank 0, whose questions are answered on every rank."""

    def __init__(self, trainer: Trainer, stop: Stop | None) -> None:
        self._processes = trainer.processes
        self._hands = _Hands(trainer)
        self._stop = stop
        self._opened = 0
        self._left: list[int] = []
        self._failed = False
        self._ended = False

    def generator(self) -> Generator:
        """Generation on every rank."""
        return _LeadGenerator(self)

    def scorer(self) -> Scorer:
        """Scoring on every rank."""
        return _LeadScorer(self)

    def iter_parameters(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """The parameters, gathered from every rank."""
        return self.stream("parameters")

    def order(self, word: str, *facts: Any) -> Any:
        """Have ``word`` done on every rank; returns what this one got."""
        told = self._share({"do": [word, *facts]})
        if self._stop is not None:
            self._stop.hear(self._processes.largest(self._stop.signal_number))
        self._failed = True
        result = self._hands.do(told)
        self._failed = False
        return result

    def stream(self, word: str, *facts: Any) -> Iterator[Any]:
        """The items that ``word`` gives, one order each."""
        number = self.number()
        try:
            self.order(word, number, *facts)
            while (item := self.order("next", number)) is not _OVER:
                yield item
                del item  # a whole parameter: not to be held while the next is gathered
        finally:
            self.leave(number)

    def number(self) -> int:
        """Of what is opened next: a stream or a session."""
        self._opened += 1
        return self._opened

    def leave(self, number: int) -> None:
        """Have what was opened by this number closed with the next order."""
        # No order of its own: what was dropped may be closed at any moment, by the garbage collector too.
        self._left.append(number)

    def end(self, code: int) -> None:
        """Let the others go: on with the run for 0, else out of it with this exit code."""
        self._share({"end": code})
        self._ended = True

    def _share(self, order: Mapping[str, Any]) -> dict[str, Any]:
        if self._ended:
            raise LwmError("this model is asked after the evaluation or export that it was made for has ended")
        left, self._left = self._left, []
        told = {"end": None, "left": left, "failed": self._failed, **order}
        return cast(dict[str, Any], self._processes.share(told))


class _Hands:
    """Does on every rank what rank 0 has ordered."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._open: dict[int, Any] = {}

    @cached_property
    def _generator(self) -> Generator:
        return self._trainer.generator()

    @cached_property
    def _scorer(self) -> Scorer:
        return self._trainer.scorer()

    def do(self, told: Mapping[str, Any]) -> Any:
        for number in told["left"]:
            close = getattr(self._open.pop(number, None), "close", None)
            if close is not None:
                close()
        match told["do"]:
            case ["generate", prompts, sampling]:
                return self._generator.generate(prompts, _sampling(sampling))
            case ["log_likelihood", tokens]:
                return self._scorer.log_likelihood(tokens)
            case ["stream", number, prompt, sampling]:
                self._open[number] = self._generator.stream(prompt, _sampling(sampling))
            case ["session", number, guided]:
                self._open[number] = self._generator.session(guided=guided)
            case ["read", number, tokens, unconditional, expected]:
                self._open[number].read(tokens, unconditional, expected=expected)
            case ["unguide", number]:
                self._open[number].unguide()
            case ["write", number, session, sampling]:
                self._open[number] = self._open[session].stream(_sampling(sampling))
            case ["parameters", number]:
                self._open[number] = self._trainer.iter_parameters()
            case ["next", number]:
                return next(self._open[number], _OVER)
            case other:
                raise LwmError(f"rank 0 orders {other!r}, which is unknown here; install the same version everywhere")
        return None


class _LeadGenerator:
    """See ``lwm_core.protocols.Generator``."""

    def __init__(self, leader: LeadModel) -> None:
        self._leader = leader

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingSpec) -> list[list[int]]:
        """New tokens for each prompt."""
        answers = self._leader.order("generate", [_ids(prompt) for prompt in prompts], asdict(sampling))
        return cast(list[list[int]], answers)

    def stream(self, prompt: Sequence[int], sampling: SamplingSpec) -> Iterator[int]:
        """New tokens of one prompt, as they come."""
        return self._leader.stream("stream", _ids(prompt), asdict(sampling))

    def session(self, *, guided: bool = False) -> Session:
        """A conversation, held on every rank."""
        return _LeadSession(self._leader, guided)


class _LeadSession:
    """See ``lwm_core.protocols.Session``."""

    def __init__(self, leader: LeadModel, guided: bool) -> None:
        self._leader, self._number = leader, leader.number()
        leader.order("session", self._number, guided)
        self._leave = finalize(self, leader.leave, self._number)
        self._tokens: list[int] = []

    @property
    def tokens(self) -> Sequence[int]:
        """All that was read and written, in order."""
        return tuple(self._tokens)

    def read(self, tokens: Sequence[int], unconditional: Sequence[int] | None = None, *, expected: int = 0) -> None:
        """Append tokens, at least one."""
        ids = _ids(tokens)
        other = None if unconditional is None else _ids(unconditional)
        self._leader.order("read", self._usable(), ids, other, expected)
        self._tokens += ids

    def stream(self, sampling: SamplingSpec) -> Iterator[int]:
        """New tokens, as they come."""
        for token in self._leader.stream("write", self._usable(), asdict(sampling)):
            self._tokens.append(token)
            yield token

    def unguide(self) -> None:
        """Go on without the unconditional row."""
        self._leader.order("unguide", self._usable())

    def close(self) -> None:
        """Drop the cache on every rank, with the next order."""
        self._leave()

    def _usable(self) -> int:
        if not self._leave.alive:
            raise LwmError("generate: this session was closed; open another")
        return self._number


class _LeadScorer:
    """See ``lwm_core.protocols.Scorer``."""

    def __init__(self, leader: LeadModel) -> None:
        self._leader = leader

    def log_likelihood(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """``[N-1]`` natural-log probability of each token after the first."""
        return cast(NDArray[np.float32], self._leader.order("log_likelihood", _ids(tokens)))


def _ids(tokens: Sequence[int]) -> list[int]:
    return [int(one) for one in tokens]


def _sampling(fields: Mapping[str, Any]) -> SamplingSpec:
    values: dict[str, Any] = {key: tuple(one) if isinstance(one, list) else one for key, one in fields.items()}
    return SamplingSpec(**values)
