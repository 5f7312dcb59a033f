"""How many devices JAX sees. On a CPU the host can stand for several, if that is asked for before JAX starts."""

from __future__ import annotations

import jax
from lwm_core.errors import ShapeError


def ensure_devices(count: int) -> None:
    """Make the host's CPU stand for ``count`` devices, unless JAX has started already.

    Raises:
        ShapeError: JAX has started with fewer devices than that.
    """
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        if len(jax.devices()) < count:
            raise ShapeError(
                f"jax: {count} devices are asked for, but JAX has started with {len(jax.devices())}; "
                "set the number of devices before anything touches JAX"
            ) from None
