"""JAX's own key-value store, through which the processes of a run have met. All private names of JAX are here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import jax
from jax._src import distributed

from lwm_core.errors import UnsupportedError

_NEEDED = ("key_value_set", "blocking_key_value_get", "key_value_try_get", "key_value_delete", "get_live_nodes")


class StoreGone(RuntimeError):
    """The process that keeps the store does not answer."""


class Store:
    """Words by key, the same for every process; process 0 keeps them.

    Raises:
        UnsupportedError: this JAX has no such store.
    """

    def __init__(self) -> None:
        client = getattr(getattr(distributed, "global_state", None), "client", None)
        missing = [name for name in _NEEDED if not hasattr(client, name)]
        if missing:
            raise UnsupportedError(
                f"trainer 'jax': the distributed client of jax {jax.__version__} has no {missing[0]}, which several "
                "processes need; install jax 0.10"
            )
        self._client = client

    def put(self, key: str, word: str) -> None:
        """Write; what was there before is gone."""
        _asked(lambda: self._client.key_value_set(key, word, allow_overwrite=True))

    def get(self, key: str) -> str | None:
        """What is there now."""
        found: str | None = _asked(lambda: self._client.key_value_try_get(key))
        return found

    def wait(self, key: str, seconds: float) -> str | None:
        """What is there, or comes within so many seconds."""
        found: str | None = _asked(lambda: self._client.blocking_key_value_get(key, int(1000 * seconds)))
        return found

    def wait_alone(self, world: int, seconds: float) -> None:
        """Wait until the other processes have shut JAX's connection down, or so many seconds."""

        # The call is answered when each of them has either asked the same, which none does, or gone.
        def ask_for_all() -> None:
            with suppress(jax.errors.JaxRuntimeError):  # cut off when the wait is given up
                self._client.get_live_nodes(list(range(world)))

        ask = threading.Thread(target=ask_for_all, name="lwm-alone", daemon=True)
        ask.start()
        ask.join(seconds)

    def drop(self, key: str) -> None:
        """Forget ``key`` and all keys below it."""
        _asked(lambda: self._client.key_value_delete(key))


def _asked(ask: Callable[[], Any]) -> Any:
    """What the store answers; None where it has no such key, or not in time.

    Raises:
        StoreGone: it does not answer.
    """
    try:
        return ask()
    except jax.errors.JaxRuntimeError as error:
        if str(error).startswith(("NOT_FOUND", "DEADLINE_EXCEEDED")):
            return None
        raise StoreGone(str(error)) from error


def quiet_service() -> None:
    """Before joining: that a process has died, or ends, is told by the heartbeat here.

    JAX would abort all others with a stack trace, and let a process that ends by an error wait for them all. Nor is
    SIGTERM its to hear.
    """
    for flag, value in (("jax_enable_recoverability", True), ("jax_enable_preemption_service", False)):
        try:
            jax.config.update(flag, value)
        except AttributeError:
            raise UnsupportedError(
                f"trainer 'jax': jax {jax.__version__} has no {flag}, which several processes need; install jax 0.10"
            ) from None
