"""What ranks agree on and how rank 0 leads, with a thread a rank: a rank that waits for nobody breaks the barrier."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from lwm_core.builtins.byte_tokens import BytesTokenizer
from lwm_core.builtins.text_rows import TextFileOptions, TextFileSource
from lwm_core.errors import DataError, EndedElsewhereError, LwmError, ShapeError
from lwm_core.protocols import ALONE, DataContext, FeedRequest, SamplingSpec, Stage
from lwm_core.rope import RopeSpec
from lwm_core.run.leading import lead
from lwm_core.run.loop import open_feeds
from lwm_core.run.processes import first, heed, together
from lwm_core.run.stopping import Stop, StoppedError
from lwm_core.vocab import Vocabulary

PATIENCE = 10.0  # seconds until a rank that nobody meets is taken for left waiting


class Threads:
    """The ranks of one world, as threads that must all make the same call."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._slots: list[Any] = [None] * world
        self._barrier = threading.Barrier(world, timeout=PATIENCE)

    def gather(self, rank: int, call: str, value: Any) -> list[Any]:
        self._slots[rank] = (call, value)
        self._barrier.wait()
        said = list(self._slots)
        self._barrier.wait()
        assert len({one for one, _ in said}) == 1, said
        return [one for _, one in said]

    def run(self, function: Callable[[Rank], Any]) -> list[Any]:
        """What ``function`` returns or raises on each rank. A rank left waiting fails the test."""

        def one(rank: int) -> Any:
            try:
                return function(Rank(self, rank))
            except threading.BrokenBarrierError:
                return AssertionError(f"rank {rank} was left waiting")
            except BaseException as error:
                return error

        with ThreadPoolExecutor(self.world) as pool:
            found = list(pool.map(one, range(self.world)))
        for result in found:
            if isinstance(result, AssertionError):
                raise result
        return found


class Rank:
    """See ``lwm_core.protocols.Processes``."""

    def __init__(self, threads: Threads, rank: int) -> None:
        self._threads, self.rank, self.world = threads, rank, threads.world

    def share(self, value: Any) -> Any:
        return json.loads(self.gather("share", json.dumps(value) if self.rank == 0 else None)[0])

    def largest(self, value: int) -> int:
        assert 0 <= value < 2**62
        return max(self.gather("largest", value))

    def gather(self, call: str, value: Any) -> list[Any]:
        return self._threads.gather(self.rank, call, value)


class Counter:
    """A model that counts on from the prompt's last token; a negative one is refused on every rank."""

    def __init__(self, processes: Any) -> None:
        self.processes = processes
        self.open = 0
        self.guided: Any = None
        self.told: Any = None
        self.seen: list[Any] = []

    def generator(self) -> Counter:
        return self

    def scorer(self) -> Counter:
        return self

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingSpec) -> list[list[int]]:
        return [list(self.stream(prompt, sampling)) for prompt in prompts]

    def stream(self, prompt: Sequence[int], sampling: SamplingSpec) -> Iterator[int]:
        if prompt[-1] < 0:
            raise ShapeError(f"{prompt[-1]} is no token")
        self.seen.append((list(prompt), sampling))
        self.open += 1
        try:
            for number in range(sampling.max_new_tokens):
                self._meet("token")
                yield prompt[-1] + 1 + number
        finally:
            self.open -= 1

    def session(self, *, guided: bool = False) -> Talk:
        self.open += 1
        self.guided = guided
        return Talk(self)

    def log_likelihood(self, tokens: Sequence[int]) -> Any:
        self._meet("score")
        if tokens[0] == 13 and self.processes.rank == 1:
            raise DataError("rank 1 cannot score 13")
        return np.asarray(tokens[1:], np.float32)

    def iter_parameters(self) -> Iterator[tuple[str, Any]]:
        for name in ("a", "b", "c"):
            self._meet(name)
            yield name, np.zeros(3)

    def _meet(self, call: str) -> None:
        if self.processes.world > 1:
            self.processes.gather(call, None)


class Talk:
    """A counter's session: it counts on from the last token that was read or written."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self.tokens: list[int] = []
        self.closed = False

    def read(self, tokens: Sequence[int], unconditional: Sequence[int] | None = None, *, expected: int = 0) -> None:
        self._counter.told = (unconditional, expected)
        if self.closed or not len(tokens):
            raise ShapeError("closed" if self.closed else "nothing to read")
        self._counter._meet("read")
        self.tokens += [int(one) for one in tokens]

    def unguide(self) -> None:
        assert self._counter.guided is True
        self._counter.guided = "not any more"

    def stream(self, sampling: SamplingSpec) -> Iterator[int]:
        if self.closed:
            raise ShapeError("closed")
        for token in self._counter.stream(list(self.tokens), sampling):
            self.tokens.append(token)
            yield token

    def close(self) -> None:
        if not self.closed:
            self._counter.open -= 1
        self.closed = True


def led(world: int, work: Callable[[Any], Any], stops: Sequence[Stop] = ()) -> tuple[list[Any], list[Counter]]:
    trainers: list[Counter] = [Counter(ALONE)] * world

    def one(rank: Rank) -> Any:
        trainers[rank.rank] = Counter(rank if world > 1 else ALONE)
        return lead(trainers[rank.rank], work, stops[rank.rank] if stops else None)  # type: ignore[arg-type]

    return Threads(world).run(one), trainers


@pytest.mark.parametrize("world", [1, 2, 3])
def test_first_runs_on_rank_0_alone_and_all_learn_the_result(world: int) -> None:
    ran: list[int] = []
    found = Threads(world).run(lambda rank: first(rank, lambda: ran.append(rank.rank) or {"a": [1, None]}))
    assert found == [{"a": [1, None]}] * world and ran == [0]


@pytest.mark.parametrize(("error", "code"), [(ShapeError("x"), 2), (KeyError("bug"), 1), (KeyboardInterrupt(), 130)])
def test_first_tells_of_its_failure(error: BaseException, code: int) -> None:
    def fail() -> None:
        raise error

    found = Threads(3).run(lambda rank: first(rank, fail))
    assert found[0] is error and [type(one) for one in found[1:]] == [EndedElsewhereError] * 2
    assert [one.exit_code for one in found[1:]] == [code] * 2


@pytest.mark.parametrize("failing", [(0,), (2,), (1, 2), (0, 1, 2)])
def test_of_those_that_fail_together_the_lowest_rank_tells(failing: tuple[int, ...]) -> None:
    def one(rank: Rank) -> Any:
        def act() -> int:
            if rank.rank in failing:
                raise UsageLike(rank.rank)
            return rank.rank

        return together(rank, act)

    found = Threads(3).run(one)
    for rank, result in enumerate(found):
        if rank == failing[0]:
            assert isinstance(result, UsageLike) and result.rank == rank
        else:
            assert isinstance(result, EndedElsewhereError) and result.exit_code == 40 + failing[0]
    assert Threads(3).run(lambda rank: together(rank, lambda: rank.rank)) == [0, 1, 2]


class UsageLike(LwmError):
    """An error with a code of its own."""

    def __init__(self, rank: int) -> None:
        super().__init__("x")
        self.rank, self.exit_code = rank, 40 + rank


def test_a_stop_that_one_rank_hears_is_heeded_by_all_at_once() -> None:
    asked: list[int] = []
    stops = [Stop(lambda one=one: asked.append(one)) for one in range(3)]  # type: ignore[misc]

    def one(rank: Rank) -> Any:
        stop = stops[rank.rank]
        heed(rank, stop)
        if rank.rank == 2:
            stop.ask(15)
        before = stop.agreed
        heed(rank, stop)
        return before

    found = Threads(3).run(one)
    assert [type(error) for error in found] == [StoppedError] * 3
    assert [error.signal_number for error in found] == [15] * 3 and sorted(asked) == [0, 1, 2]
    stop = Stop()
    heed(ALONE, stop)
    stop.ask(2)
    with pytest.raises(StoppedError):
        heed(ALONE, stop)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_what_rank_0_asks_is_asked_on_all_with_the_same_words(world: int) -> None:
    sampling = SamplingSpec(max_new_tokens=3, temperature=0.5, stop_ids=(7, 8), seed=4)

    def work(model: Any) -> Any:
        texts = model.generator().generate([np.arange(3, dtype=np.int32), [9]], sampling)
        return texts, list(model.scorer().log_likelihood([1, 2, 3])), [name for name, _ in model.iter_parameters()]

    found, trainers = led(world, work)
    assert found == [([[3, 4, 5], [10, 11, 12]], [2.0, 3.0], ["a", "b", "c"]), *[None] * (world - 1)]
    assert all(one.seen == [([0, 1, 2], sampling), ([9], sampling)] for one in trainers)


@pytest.mark.parametrize("world", [1, 3])
def test_a_stream_that_is_left_early_is_left_by_all(world: int) -> None:
    def work(model: Any) -> Any:
        one, two = (model.generator().stream([start], SamplingSpec(max_new_tokens=5)) for start in (0, 100))
        got = [next(one), next(two), next(one)]
        one.close()
        del two
        parameters = model.iter_parameters()
        got.append(next(parameters)[0])
        del parameters
        model.scorer().log_likelihood([1, 2])
        never = model.generator().stream([50], SamplingSpec())
        return got, never

    found, trainers = led(world, work)
    assert found[0][0] == [1, 101, 2, "a"]
    assert all(one.open == 0 for one in trainers)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_session_is_held_on_all(world: int) -> None:
    """Two of them in turns, one stream left early: every rank holds the same tokens."""
    sampling = SamplingSpec(max_new_tokens=3)

    def work(model: Any) -> Any:
        one, two = (model.generator().session() for _ in range(2))
        one.read(np.arange(3, dtype=np.int32))
        two.read([50])
        told = [list(one.stream(sampling))]
        left = two.stream(sampling)
        told.append([next(left)])
        left.close()
        two.read([60, 61])
        told.append(list(two.stream(sampling)))
        told += [list(one.tokens), list(two.tokens)]
        one.close()
        two.close()
        model.scorer().log_likelihood([1, 2])
        return told

    found, trainers = led(world, work)
    assert found[0] == [[3, 4, 5], [51], [62, 63, 64], [0, 1, 2, 3, 4, 5], [50, 51, 60, 61, 62, 63, 64]]
    asked = [[0, 1, 2], [50], [50, 51, 60, 61]]
    assert all([tokens for tokens, _ in one.seen] == asked and one.open == 0 for one in trainers)


def test_a_guided_session_is_one_on_all() -> None:
    """What the other row reads, what is expected, and how it is drawn come to every rank as they were said."""

    def work(model: Any) -> Any:
        session = model.generator().session(guided=True)
        session.read(np.arange(2), np.arange(5, 7, dtype=np.int32), expected=9)
        told = list(session.stream(sampling))
        session.unguide()
        session.close()
        return told

    sampling = SamplingSpec(max_new_tokens=2, modality="vision", ids=(1, 9), guidance=5.0)
    found, trainers = led(2, work)
    assert found[0] == [2, 3]
    for one in trainers:
        assert one.guided == "not any more" and one.told == ([5, 6], 9) and one.seen == [([0, 1], sampling)]


def test_a_session_that_was_dropped_is_closed_everywhere() -> None:
    def work(model: Any) -> Any:
        dropped, kept = model.generator().session(), model.generator().session()
        for session in (dropped, kept):
            session.read([1])
        open_then = [one.open for one in trainers.values()]
        del dropped, session
        stream = kept.stream(SamplingSpec(max_new_tokens=3))
        del kept  # its stream still needs it
        first = next(stream)
        model.generator().session()  # dropped at once
        told = [first, *stream]
        model.scorer().log_likelihood([1, 2])
        return open_then, told

    trainers: dict[int, Counter] = {}

    def one(rank: Rank) -> Any:
        trainers[rank.rank] = Counter(rank)
        return lead(trainers[rank.rank], work)  # type: ignore[arg-type]

    found = Threads(3).run(one)
    open_then, tokens = found[0]
    assert (open_then[0], tokens) == (2, [2, 3, 4])
    assert [one.open for one in trainers.values()] == [0, 0, 0]


def test_wrong_use_of_a_session_is_told_and_it_goes_on() -> None:
    def work(model: Any) -> Any:
        session = model.generator().session()
        with pytest.raises(ShapeError, match="nothing to read"):
            session.read([])
        session.read([-4])
        with pytest.raises(ShapeError, match="-4 is no token"):
            next(session.stream(SamplingSpec()))
        session.read([4])
        told = list(session.stream(SamplingSpec(max_new_tokens=2)))
        kept = list(session.tokens)
        session.close()
        session.close()
        for use in (lambda: session.read([1]), lambda: next(session.stream(SamplingSpec()))):
            with pytest.raises(LwmError, match="was closed; open another"):
                use()
        return told, kept

    assert led(3, work)[0] == [([5, 6], [-4, 4, 5, 6]), None, None]


def test_what_rank_0_is_content_with_goes_on_for_all() -> None:
    def work(model: Any) -> Any:
        with pytest.raises(ShapeError, match="-5 is no token"):
            model.generator().generate([[-5]], SamplingSpec())
        with pytest.raises(ShapeError):
            next(model.generator().stream([-1], SamplingSpec()))
        return model.generator().generate([[1]], SamplingSpec(max_new_tokens=2))

    assert led(3, work)[0] == [[[2, 3]], None, None]


def test_a_failure_of_rank_0_ends_all_and_one_of_another_is_its_own() -> None:
    def fail(model: Any) -> None:
        next(model.generator().stream([1], SamplingSpec()))
        raise DataError("no questions")

    found, _ = led(3, fail)
    assert isinstance(found[0], DataError)
    assert [(type(one), one.exit_code) for one in found[1:]] == [(EndedElsewhereError, 1)] * 2

    def score(model: Any) -> None:
        model.scorer().log_likelihood([13, 1])

    found, _ = led(2, score)
    assert found[0] is None and isinstance(found[1], DataError)


def test_a_model_is_not_asked_after_its_time() -> None:
    kept: list[Any] = []
    found, _ = led(2, lambda model: kept.append(model.generator().stream([1], SamplingSpec())))
    assert found == [None, None]
    with pytest.raises(LwmError, match="has ended"):
        next(kept[0])


def test_a_stop_reaches_rank_0_with_the_next_question() -> None:
    stops = [Stop(), Stop(), Stop()]

    def work(model: Any) -> None:
        for number in range(5):
            if number == 2:
                stops[1].ask(15)
            model.scorer().log_likelihood([1, 2])
            stops[0].check()
        raise AssertionError("nobody stopped")

    found, _ = led(3, work, stops)
    assert isinstance(found[0], StoppedError) and found[0].signal_number == 15
    assert [one.exit_code for one in found[1:]] == [143, 143]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_data_ranks_rows_are_disjoint_and_complete(world: int) -> None:
    class Dealt:
        """A trainer whose second stage has half as many data ranks."""

        def __init__(self, rank: int) -> None:
            self._rank = rank

        def data_rank(self, stage: Stage) -> tuple[int, int]:
            return (self._rank, world) if stage.name == "a" else (self._rank // 2, max(1, world // 2))

    source = TextFileSource(
        TextFileOptions(path="shipped:genesis"), DataContext(BytesTokenizer(), Vocabulary(256, 0), seed=1)
    )
    stages = tuple(
        Stage(name=name, seq_len=32, rope=RopeSpec(1e4), tokens=1024, batch_tokens=128, lr=1.0, min_lr=0.1)
        for name in ("a", "b")
    )
    feeds = [open_feeds(source, Dealt(rank), stages) for rank in range(world)]  # type: ignore[arg-type]
    for index, ranks in enumerate((world, max(1, world // 2))):
        every = source.open(FeedRequest(index, 32, 4)).batch(3).tokens
        parts = [feeds[rank][index].batch(3).tokens for rank in range(0, world, world // ranks)]
        assert all(part.shape == (4 // ranks, 32) for part in parts)
        assert (np.concatenate(parts) == every).all()
        assert all((feeds[rank][index].batch(3).tokens == parts[rank * ranks // world]).all() for rank in range(world))
