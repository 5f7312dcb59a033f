"""The attention kit judged: a right backend passes all of it, and each wrong one fails where it should.

The kit runs in a pytest of its own over a file of subclasses, one a fault; its JUnit report is what is asserted on.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from lwm_core.testing import AttentionSuite

pytestmark = pytest.mark.slow

ORACLE = ("test_packed_rows_equal_the_oracle", "test_rows_without_documents_equal_the_oracle")
REACH = ("test_a_token_reaches_all_who_may_see_it_and_no_other", "test_a_gradient_reaches_only_what_was_seen")
DOCUMENTS = ("test_documents_do_not_leak", "test_packed_equals_unpacked", "test_rows_that_see_nothing")

#: Fault → (worlds to run at, tests each of which must fail).
FAULTS: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "off-by-one": ((2,), (*ORACLE, *REACH)),
    "ignores-segments": ((2,), (ORACLE[0], *DOCUMENTS)),
    "lse-log2": ((2,), ORACLE),
    "lse-zero-on-empty": ((2,), (ORACLE[0], "test_rows_that_see_nothing")),
    "tiled-heads": ((4,), (ORACLE[0], "test_grouped_heads_equal_repeated_heads")),
    "wrong-inverse": ((2,), (*ORACLE, REACH[0])),
    "forgets-last-hop": ((2,), (*ORACLE, *REACH, "test_large_logits")),
    "nondeterministic": ((2,), ("test_two_runs_are_bitwise_equal",)),
    "overflows": ((2,), ("test_large_logits",)),
    "bf16-accumulators": ((1, 8), ("test_bfloat16_loses_no_more_than_one_device",)),
    "pads-silently": ((2,), ("test_a_length_that_does_not_divide",)),
    "floors-groups": ((2,), ("test_heads_that_do_not_divide_are_refused",)),
}

#: Classes that are wrong by themselves, whatever the backend: name → (body, tests that must fail).
WRONG_CLASSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "DropsUnknownOptions": (
        """
    def make(self, world, **options):
        known = {"layout": ("contiguous", "zigzag", "striped")}
        return super().make(world, **{k: v for k, v in options.items() if v in known.get(k, ())})
""",
        ("test_unknown_options_are_refused",),
    ),
    "ClaimsTooLittle": (
        """
    masks = ("causal",)
""",
        ("test_what_is_not_claimed_is_refused",),
    ),
    "RefusesInWordsOnly": (
        """
    def refuses(self, world, layout, mask, heads, kv_heads):
        return "two ranks are one too many"
""",
        ("test_packed_rows_equal_the_oracle",),
    ),
    "OverridesATest": (
        """
    def test_two_runs_are_bitwise_equal(self):
        pass
""",
        ("test_no_standard_test_is_overridden",),
    ),
    "OverridesAHelper": (
        """
    def _masks_at(self, world, layout):
        return []
""",
        ("test_no_standard_test_is_overridden",),
    ),
    "ExpectsAFailureThatDoesNotCome": (
        """
    expected_failures = {"test_heads_that_do_not_divide_are_refused": "groups are floored"}
""",
        ("test_heads_that_do_not_divide_are_refused",),
    ),
    "ExpectsATestThatDoesNotExist": (
        """
    expected_failures = {"test_no_such_test": "it is not there"}
""",
        ("test_no_standard_test_is_overridden",),
    ),
}

Outcomes = dict[str, dict[str, list[str]]]


def _class_name(fault: str) -> str:
    return "Test" + "".join(word.capitalize() for word in fault.split("-"))


def _source() -> str:
    lines = ["from lwm_core.testing import AttentionSuite\n"]
    for fault, (worlds, _) in FAULTS.items():
        lines.append(
            f"class {_class_name(fault)}(AttentionSuite):\n"
            f"    name, worlds, options = 'acme-numpy', {worlds}, {{'fault': {fault!r}}}\n"
        )
    for name, (body, _) in WRONG_CLASSES.items():
        lines.append(f"class Test{name}(AttentionSuite):\n    name, worlds = 'acme-numpy', (2,)\n{body}")
    lines.append(
        "class TestExpectedFailure(AttentionSuite):\n"
        "    name, worlds, options = 'acme-numpy', (2,), {'fault': 'floors-groups'}\n"
        "    expected_failures = {'test_heads_that_do_not_divide_are_refused': 'groups are floored'}\n"
    )
    lines.append("class TestRight(AttentionSuite):\n    name, worlds = 'acme-numpy', (1, 3, 4)\n")
    return "\n".join(lines)


def _selection(file: Path) -> list[str]:
    """Only the tests that must fail of the wrong ones, and all of the right one."""
    chosen = [(_class_name(fault), tests) for fault, (_, tests) in FAULTS.items()]
    chosen += [(f"Test{name}", tests) for name, (_, tests) in WRONG_CLASSES.items()]
    ids = [f"{file}::{cls}::{test}" for cls, tests in chosen for test in tests]
    expected = ("test_heads_that_do_not_divide_are_refused", "test_no_standard_test_is_overridden")
    return [*ids, *(f"{file}::TestExpectedFailure::{test}" for test in expected), f"{file}::TestRight"]


@pytest.fixture(scope="module")
def outcomes(acme_site: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Class → test → the outcomes of its cases."""
    folder = tmp_path_factory.mktemp("kit")
    file, report = folder / "test_mutants.py", folder / "report.xml"
    file.write_text(_source())
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", f"--rootdir={folder}",
         f"--junitxml={report}", *_selection(file)],
        capture_output=True, text=True, check=False, timeout=500, cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([os.fspath(acme_site), *filter(None, sys.path)])},
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    found: Outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        cls = case.attrib["classname"].rpartition(".")[2]
        test = case.attrib["name"].partition("[")[0]
        tags = {child.tag: child.attrib.get("type", "") for child in case}
        outcome = next((tag for tag in ("error", "failure") if tag in tags), "")
        if not outcome:
            outcome = {None: "passed", "pytest.xfail": "xfailed"}.get(tags.get("skipped"), "skipped")
        found.setdefault(cls, {}).setdefault(test, []).append(outcome)
    return found


def _standard_tests() -> set[str]:
    return {name for name in dir(AttentionSuite) if name.startswith("test_")}


def test_the_right_backend_passes_everything(outcomes: Outcomes) -> None:
    right = outcomes["TestRight"]
    assert set(right) == _standard_tests()
    wrong = {test: cases for test, cases in right.items() if not set(cases) <= {"passed", "skipped"}}
    assert not wrong
    assert {test for test, cases in right.items() if "passed" not in cases} == set()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_backend_fails(outcomes: Outcomes, fault: str) -> None:
    found = outcomes[_class_name(fault)]
    missed = [test for test in FAULTS[fault][1] if "failure" not in found[test]]
    assert not missed, found


@pytest.mark.parametrize("name", WRONG_CLASSES)
def test_a_wrong_use_of_the_kit_fails(outcomes: Outcomes, name: str) -> None:
    found = outcomes[f"Test{name}"]
    assert all("failure" in found[test] for test in WRONG_CLASSES[name][1]), found


def test_an_expected_failure_that_fails_is_expected(outcomes: Outcomes) -> None:
    found = outcomes["TestExpectedFailure"]
    assert found["test_heads_that_do_not_divide_are_refused"] == ["xfailed"]
    assert found["test_no_standard_test_is_overridden"] == ["passed"]


def test_every_standard_test_can_fail() -> None:
    """No check of the kit is without a wrong backend, or a wrong subclass, that it is known to find."""
    caught = {test for _, tests in FAULTS.values() for test in tests}
    caught |= {test for _, tests in WRONG_CLASSES.values() for test in tests}
    assert caught == _standard_tests()
