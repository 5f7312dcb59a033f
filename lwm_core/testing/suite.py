"""What all kits share: expected failures that are named and strict, and no standard test silently replaced."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import getattr_static
from typing import Any, ClassVar

import pytest


class Suite:
    """Base of the kits.

    Attributes:
        expected_failures: test name (``test_x``, or ``test_x[2-zigzag]`` for one case) → why it fails today. Strict:
            one that passes fails, so that the list cannot outlive its reasons.
    """

    expected_failures: ClassVar[Mapping[str, str]] = {}

    @pytest.fixture(autouse=True)
    def _mark_expected_failures(self, request: pytest.FixtureRequest) -> None:
        name = request.node.name
        reason = self.expected_failures.get(name) or self.expected_failures.get(name.partition("[")[0])
        if reason:
            request.node.add_marker(pytest.mark.xfail(reason=reason, strict=True))

    def test_no_standard_test_is_overridden(self) -> None:
        """A subclass adds tests and fills in attributes; what the kit checks it leaves alone or lists as failing."""
        standard = {name: value for name, value in _standard(type(self)).items()}
        excused = {name.partition("[")[0] for name in self.expected_failures}
        unknown = sorted(excused - set(standard))
        assert not unknown, f"expected_failures names tests that the kit does not have: {', '.join(unknown)}"
        overridden = sorted(
            name
            for name, value in standard.items()
            if getattr_static(type(self), name) is not value and name not in excused
        )
        assert not overridden, f"overrides of the kit that expected_failures does not name: {', '.join(overridden)}"


def _standard(cls: type) -> dict[str, Any]:
    """The kit's own tests and inner helpers by name, as the kit defines them."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("lwm_core.testing."):
            found.update({n: v for n, v in vars(base).items() if n.startswith(("test_", "_")) and callable(v)})
    return {name: value for name, value in found.items() if not name.startswith("__")}
