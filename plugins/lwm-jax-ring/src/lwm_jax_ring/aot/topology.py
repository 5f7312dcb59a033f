"""Devices of a TPU topology that is not at hand, for the compiler alone."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from lwm_core.errors import UnsupportedError, UsageError

_NAME = re.compile(r"(?P<chip>[a-z]\w*):(?P<shape>\d+(x\d+)+)")
_AVAILABLE = re.compile(r"exceeds available HBM \((\d+(?:\.\d+)?)G\)|of (\d+(?:\.\d+)?)G hbm")
MEGACORE = ("v4",)
"""Chips whose two cores are always one device."""


def topology_devices(name: str) -> Sequence[jax.Device]:
    """The devices of ``name``, such as ``v5p:8x8x8``: chip, and chips along each axis of the torus.

    Raises:
        UsageError: the name cannot be read, or the compiler does not know it.
        UnsupportedError: the TPU compiler is not installed.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise UsageError(
            f"topology {name!r} cannot be read; expected a chip and its torus, such as v4:8x8x4, v5p:8x8x8, "
            "v6e:16x16 or tpu7x:4x4x4"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UnsupportedError(
            "compiling for a TPU needs libtpu, which is not installed: pip install 'lwm-jax-ring[tpu]' (no TPU needed)"
        )
    # Without these libtpu asks a metadata server, which only a TPU machine has, for its neighbours.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no device is opened, so that there is nothing to lock
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")  # what is not compiled for the topology runs here
    from jax.experimental import topologies

    more = {"chip_config_name": "megacore"} if found["chip"] in MEGACORE else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **more).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"topology {name!r} is refused by the TPU compiler: {reason}") from error


def usable_memory(device: jax.Device) -> int | None:
    """Bytes that a program may use on ``device``; None where the compiler does not say.

    A device that is not at hand tells nothing of itself. What its compiler knows it tells in refusing a program that
    fits nowhere.
    """
    array = jax.ShapeDtypeStruct((2**28, 2**12), jnp.int8, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(jnp.negative).lower(array).compile()
    except jax.errors.JaxRuntimeError as error:
        told = _AVAILABLE.search(str(error))
        return int(float(told[1] or told[2]) * 2**30) if told else None
    return None
