"""How close is close: one measure (relative error in L2 norm, float64) and one tolerance a dtype."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Largest relative L2 error against the float64 oracle. bfloat16 has no number of its own: it is held to
#: :data:`SINGLE_DEVICE_FACTOR` times what the same kernel loses on one device (:func:`assert_no_worse`).
TOLERANCES: Mapping[str, float] = MappingProxyType({"float32": 1e-5, "float64": 1e-12})

SINGLE_DEVICE_FACTOR = 1.5


def _wide(array: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(array).astype(np.float64)


def relative_l2(actual: ArrayLike, expected: ArrayLike) -> float:
    """``‖actual − expected‖ / ‖expected‖`` in float64 over all elements, places where both are −inf left out.

    Returns:
        0 where both are nothing but zeros, inf where only ``expected`` is, and inf where the two are not finite in
        the same places.
    """
    a, e = _wide(actual), _wide(expected)
    empty = np.isneginf(e)
    if a.shape != e.shape or not np.array_equal(np.isneginf(a), empty):
        return float("inf")
    a, e = a[~empty], e[~empty]
    if not (np.all(np.isfinite(a)) and np.all(np.isfinite(e))):
        return float("inf")
    error, size = float(np.linalg.norm(a - e)), float(np.linalg.norm(e))
    if error == 0.0:
        return 0.0
    return error / size if size > 0.0 else float("inf")


def assert_close(actual: ArrayLike, expected: ArrayLike, rtol: float, what: str) -> None:
    """Raise AssertionError unless the relative L2 error is at most ``rtol``; −inf must stand in the same places."""
    a, e = _wide(actual), _wide(expected)
    assert a.shape == e.shape, f"{what}: shape {a.shape}, expected {e.shape}"
    wrong = int(np.sum(np.isneginf(a) != np.isneginf(e)))
    assert not wrong, f"{what}: -inf differs in {wrong} of {a.size} places"
    bad = int(np.sum(~np.isfinite(a) & ~np.isneginf(e)))
    assert not bad, f"{what}: {bad} of {a.size} values are not finite"
    error = relative_l2(a, e)
    assert error <= rtol, f"{what}: relative L2 error {error:.3g} is over {rtol:.3g}"


def assert_no_worse(
    actual: ArrayLike, expected: ArrayLike, single: ArrayLike, what: str, factor: float = SINGLE_DEVICE_FACTOR
) -> None:
    """Raise AssertionError unless ``actual`` errs at most ``factor`` times as much as one device's ``single``."""
    allowed = relative_l2(single, expected)
    assert np.isfinite(allowed), f"{what}: the single-device result is not finite where it should be"
    assert_close(actual, expected, factor * allowed, f"{what} (one device errs by {allowed:.3g})")
