"""What comes next is made in a thread while this one works: decoding goes on while frames are encoded."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from queue import Empty, Full, Queue
from typing import Any, TypeVar

T = TypeVar("T")

_PATIENCE = 0.1  # seconds after which a full queue is looked at again, in case nobody takes from it any more


def made_ahead(items: Iterator[T], most: int) -> Generator[T, None, None]:
    """The items, of which at most ``most`` are made ahead. What making them raises is raised in their place.

    Close the generator to end the thread; ``items`` is closed in it.
    """
    queue: Queue[tuple[str, Any]] = Queue(most)
    stopped = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not stopped.is_set():
            try:
                queue.put((kind, value), timeout=_PATIENCE)
                return True
            except Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put("item", item):
                    break
            else:
                put("end", None)
        except BaseException as error:
            put("error", error)
        finally:
            if isinstance(items, Generator):
                items.close()

    thread = threading.Thread(target=work, name="lwm-decode", daemon=True)
    thread.start()
    try:
        while True:
            try:
                # With a time limit, so that Ctrl-C is heard while a long file is being looked through.
                kind, value = queue.get(timeout=_PATIENCE)
            except Empty:
                continue
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stopped.set()
        thread.join()
