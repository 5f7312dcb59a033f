"""The registry in use: names, allow and deny, compatibility, broken plugins, ``auto`` with reasons."""

from __future__ import annotations

import itertools
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lwm_core.errors import PluginError, UnsupportedError
from lwm_core.registry import KNOWN, Candidate, PluginSpec, Registry
from lwm_core.registry.requirements import unmet


def _one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    return str(error)


# Names.


def test_load_gives_the_factory_once(garden) -> None:
    garden.attention("acme-ring", "acme_ring", "ring")
    registry = garden.registry()
    build = registry.load("attention", "ring")
    assert build() == "acme-ring:ring"
    assert registry.load("attention", "acme-ring:ring") is build
    assert registry.load("attention", "Acme_Ring:ring") is build


def test_spec_does_not_import_the_factory(garden) -> None:
    garden.attention("acme-ring", "acme_ring", "ring")
    assert garden.registry().spec("attention", "ring").factory == "acme_ring_impl:build"
    assert "acme_ring" in sys.modules and "acme_ring_impl" not in sys.modules


def test_a_name_offered_twice_is_an_error_on_use_that_names_both(garden) -> None:
    garden.attention("acme-ring", "acme_one", "ring", version="1.2.0")
    garden.attention("other-ring", "acme_two", "ring", version="0.3.1")
    registry = garden.registry()
    with pytest.raises(PluginError) as caught:
        registry.load("attention", "ring")
    assert _one_line(caught.value) == (
        "attention 'ring' is offered by acme-ring 1.2.0 and other-ring 0.3.1; "
        "write 'acme-ring:ring' or 'other-ring:ring'"
    )
    assert registry.load("attention", "other-ring:ring")() == "other-ring:ring"
    assert garden.registry(deny=["acme-ring"]).load("attention", "ring")() == "other-ring:ring"


@pytest.mark.parametrize(("key", "dist"), KNOWN.items())
def test_a_known_name_tells_what_to_install(key: tuple[str, str], dist: str) -> None:
    kind, name = key
    with pytest.raises(PluginError) as caught:
        Registry(found=()).load(kind, name)
    assert str(caught.value) == f"{kind} {name!r} is not installed: pip install {dist}"


def test_unknown_names_offer_the_near_miss(garden) -> None:
    garden.attention("acme-ring", "acme_ring", "spiral")
    registry = garden.registry()
    with pytest.raises(PluginError, match="did you mean 'spiral'") as caught:
        registry.spec("attention", "spirall")
    assert "installed: spiral" in _one_line(caught.value)
    with pytest.raises(PluginError, match=r"did you mean 'jax-ring'\? \(pip install lwm-jax-ring\)"):
        registry.spec("attention", "jax-rign")
    with pytest.raises(PluginError, match="'spiral' is offered by acme-ring"):
        registry.spec("attention", "nobody:spiral")
    with pytest.raises(PluginError, match="did you mean 'attention'"):
        registry.candidates("atention")


# Broken plugins.


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise RuntimeError('boom\\nand more')", "failed to import: RuntimeError: boom"),
        ("import not_there_at_all", "failed to import: ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("import sys; sys.exit(1)", "failed to import: SystemExit: 1"),
        ("x = (", "failed to import: SyntaxError"),
        ("x = 1", "failed to import: AttributeError"),
        ("ring = object()", "is broken: acme_bad:ring is object, expected a PluginSpec"),
        (
            "from lwm_core.registry import PluginSpec\nring = PluginSpec(name='other', summary='x', factory='a:b')",
            "is broken: its PluginSpec is named 'other'",
        ),
        (
            "from lwm_core.registry import PluginSpec\nring = PluginSpec(name='ring', summary='x', factory='ab')",
            "failed to import: PluginError: PluginSpec 'ring': factory",
        ),
    ],
)
def test_a_broken_plugin_is_named_and_stops_nobody(garden, source: str, said: str) -> None:
    garden.plant("acme-bad", {"attention": {"ring": "acme_bad:ring"}}, {"acme_bad": source}, version="0.0.3")
    garden.attention("acme-good", "acme_good", "good")
    registry = garden.registry()
    for _ in range(2):  # the second use tells the same as the first
        with pytest.raises(PluginError) as caught:
            registry.load("attention", "ring")
        message = _one_line(caught.value)
        assert said in message
        assert message.startswith("attention 'ring' (acme-bad 0.0.3) ")
        assert message.endswith("(lwm plugins show ring)")
    assert registry.load("attention", "good")() == "acme-good:good"
    assert registry.choose("attention", "auto").candidate.name == "good"
    (bad,) = [c for c in registry.candidates("attention") if c.name == "ring"]
    assert bad.state == "broken"
    if "failed to import" in said:
        assert "Traceback" in bad.traceback and "Traceback" in caught.value.details


def test_a_factory_that_fails_to_import_marks_its_plugin_broken(garden) -> None:
    garden.attention("acme-ring", "acme_ring", "ring")
    (garden.folder / "acme_ring_impl.py").write_text("1 / 0\n")
    registry = garden.registry()
    assert registry.spec("attention", "ring").name == "ring"
    with pytest.raises(PluginError, match="ZeroDivisionError: division by zero"):
        registry.load("attention", "ring")
    assert registry.candidates("attention")[0].state == "broken"


def test_strict_lets_the_exception_out(garden, monkeypatch) -> None:
    garden.plant("acme-bad", {"attention": {"ring": "acme_bad:ring"}}, {"acme_bad": "1 / 0"})
    monkeypatch.setenv("LWM_PLUGINS_STRICT", "1")
    with pytest.raises(ZeroDivisionError):
        garden.registry().load("attention", "ring")


# Allow and deny.


def test_allow_and_deny(garden, monkeypatch) -> None:
    for letter in "abc":
        garden.attention(f"acme-{letter}", f"acme_{letter}", letter)
    core = Candidate("tokenizer", "bytes", "lwm-core", "0.1.0", "json:loads")

    def allowed(**kwargs) -> str:
        garden_found = garden.registry().candidates()
        registry = Registry.from_environment(found=[*garden_found, core], **kwargs)
        return "".join(c.name[0] for c in registry.candidates() if c.state != "disabled")

    assert allowed() == "abcb"  # the last b is lwm-core's bytes
    assert allowed(config_allow=["acme_A"]) == "ab"
    assert allowed(config_deny=["acme-a", "lwm-core", "not-installed"]) == "bcb"
    assert allowed(no_plugins=True) == "b"
    monkeypatch.setenv("LWM_PLUGINS", "acme-a, acme-b,")
    assert allowed() == "abb"
    assert allowed(config_allow=["acme-b", "acme-c"]) == "bb"
    monkeypatch.setenv("LWM_PLUGINS_DISABLE", "acme-b")
    assert allowed() == "ab"
    monkeypatch.setenv("LWM_PLUGINS", "")
    assert allowed() == "b"


def test_a_disabled_plugin_says_which_list_keeps_it_out(garden, monkeypatch) -> None:
    garden.attention("acme-a", "acme_a", "a")
    monkeypatch.setenv("LWM_PLUGINS", "acme-b")
    found = garden.registry().candidates()
    with pytest.raises(PluginError, match=r"is disabled: acme-a is not on the allow list LWM_PLUGINS$"):
        Registry.from_environment(found=found).load("attention", "a")
    assert "acme_a" not in sys.modules
    with pytest.raises(PluginError, match=r"acme-a is turned off by \[plugins\] deny"):
        Registry(deny=["acme-a"], found=found).load("attention", "acme-a:a")


# Compatibility.


def test_an_unmet_requirement_of_the_distribution_is_told_without_import(garden) -> None:
    garden.plant("acme-base", version="1.4.0")
    garden.attention("acme-a", "acme_a", "a", requires=["acme-base>=2,<3"], version="0.9.0")
    garden.attention("acme-b", "acme_b", "b", requires=["acme-base<2", "not-there>=1", "acme-base>9; extra == 'x'"])
    garden.attention("acme-c", "acme_c", "c", requires=["acme-base>9; python_version < '3'", "acme_base"])
    garden.attention("acme-d", "acme_d", "d", requires=["what ?"])
    registry = garden.registry()
    states = {c.name: c.state for c in registry.candidates("attention")}
    assert states == {"a": "incompatible", "b": "available", "c": "available", "d": "incompatible"}
    with pytest.raises(PluginError) as caught:
        registry.load("attention", "a")
    assert "attention 'a' (acme-a 0.9.0) needs acme-base<3,>=2; installed: 1.4.0" in _one_line(caught.value)
    assert not {"acme_a", "acme_b", "acme_c", "acme_d"} & set(sys.modules)


# Unusable here.


def test_needs_and_probe(garden) -> None:
    garden.attention("acme-a", "acme_a", "a", "needs=('not_there_at_all', 'json')")
    garden.attention("acme-b", "acme_b", "b", "probe='acme_b_impl:probe_bad'")
    garden.attention("acme-c", "acme_c", "c", "probe='acme_c_impl:nothing'")
    registry = garden.registry()
    with pytest.raises(PluginError, match="cannot be used here: needs not_there_at_all, which is not installed"):
        registry.load("attention", "a")
    with pytest.raises(PluginError, match=r"attention 'b' \(acme-b 1.0.0\) cannot be used here: no device"):
        registry.choose("attention", "b")
    with pytest.raises(PluginError, match="its probe failed: AttributeError"):
        registry.choose("attention", "c")
    assert {c.name: c.state for c in registry.candidates()} == dict.fromkeys("abc", "unusable")
    with pytest.raises(PluginError, match=r"no attention fits: a .*needs.*; b .*no device; c .*probe failed"):
        registry.choose("attention", "auto")


# Choosing.


def test_a_named_choice_never_falls_back(garden) -> None:
    garden.attention("acme-a", "acme_a", "a", "framework='jax', capabilities={'masks': ('causal',)}")
    garden.attention("acme-b", "acme_b", "b", "framework='jax', capabilities={'masks': ('causal', 'full')}")
    registry = garden.registry()
    with pytest.raises(UnsupportedError) as caught:
        registry.choose("attention", "a", {"masks": "full"})
    assert "has no masks full (it has causal)" in _one_line(caught.value)
    with pytest.raises(NotImplementedError, match="is for jax, not torch"):
        registry.choose("attention", "a", {"framework": "torch"})
    assert registry.choose("attention", "a", {"masks": "causal", "framework": "jax"}).spec.name == "a"


def test_auto_takes_the_best_and_tells_why_not_each_other(garden) -> None:
    garden.attention("acme-a", "acme_a", "torchy", "framework='torch', priority=99")
    garden.attention("acme-b", "acme_b", "nodevice", "probe='acme_b_impl:probe_bad', priority=50")
    garden.attention("acme-c", "acme_c", "small", "capabilities={'max_head_dim': 64}, priority=40")
    garden.attention("acme-d", "acme_d", "low", "priority=1")
    garden.attention("acme-e", "acme_e", "best", "framework='jax', priority=7")
    garden.attention("acme-f", "acme_f", "zebra", "priority=7")
    garden.attention("acme-g", "acme_g", "off", "priority=100")
    garden.plant("acme-h", {"attention": {"bad": "acme_h:x"}}, {"acme_h": "raise RuntimeError('boom')"})
    choice = garden.registry(deny=["acme-g"]).choose("attention", "auto", {"framework": "jax", "head_dim": 128})
    assert choice.spec.name == "best"
    assert dict(choice.rejected) == {
        "torchy": "is for torch, not jax",
        "nodevice": "no device",
        "small": "head_dim 128 is over its limit 64",
        "low": "priority 1 is below 7 of best",
        "zebra": "equal priority, comes after best by name",
        "off": "disabled: acme-g is turned off by [plugins] deny",
        "bad": "broken: failed to import: RuntimeError: boom",
    }
    assert choice.explain().startswith("attention=best (acme-e 1.0.0); rejected bad: broken")
    assert "\n" not in choice.explain()


def test_auto_does_not_probe_what_the_requirements_rule_out(garden) -> None:
    garden.attention("acme-a", "acme_a", "torchy", "framework='torch', probe='acme_poison:probe'")
    garden.attention("acme-b", "acme_b", "ok", "framework='jax'")
    (garden.folder / "acme_poison.py").write_text("raise RuntimeError('probed')")
    choice = garden.registry().choose("attention", "auto", {"framework": "jax"})
    assert choice.rejected == [("torchy", "is for torch, not jax")]


def test_auto_with_a_name_offered_twice_takes_one_and_labels_the_other(garden) -> None:
    garden.attention("acme-b", "acme_b", "ring")
    garden.attention("acme-a", "acme_a", "ring")
    choice = garden.registry().choose("attention", "auto")
    assert choice.candidate.label == "acme-a:ring"
    assert choice.rejected[0][0] == "acme-b:ring"


def test_auto_with_nothing_installed_says_what_to_install() -> None:
    with pytest.raises(PluginError) as caught:
        Registry(found=()).choose("attention", "auto")
    assert str(caught.value) == "no attention is installed: pip install lwm-jax-ring or lwm-torch-ring"


def test_select_may_choose_and_veto(garden) -> None:
    garden.attention("acme-a", "acme_a", "a", "priority=5")
    garden.attention("acme-b", "acme_b", "b")
    registry = garden.registry()

    def only_b(kind: str, candidates: tuple[Candidate, ...]) -> list[Candidate]:
        assert kind == "attention"
        return [c for c in candidates if c.name == "b"]

    choice = registry.choose("attention", "auto", select=only_b)
    assert choice.spec.name == "b"
    assert choice.rejected == [("a", "vetoed by a hooks plugin (lwm_select)")]
    turned = registry.choose("attention", "auto", select=lambda _, candidates: candidates[::-1])
    assert turned.rejected == [("a", "a hooks plugin (lwm_select) prefers b")]
    with pytest.raises(PluginError, match="vetoed"):
        registry.choose("attention", "a", select=only_b)
    with pytest.raises(PluginError, match=r"no attention fits: a .*vetoed.*; b .*vetoed"):
        registry.choose("attention", "auto", select=lambda *_: ())
    with pytest.raises(PluginError, match="expected some of the attention candidates"):
        registry.choose("attention", "auto", select=lambda *_: ["a"])
    assert registry.choose("attention", "auto", select=lambda *_: None).spec.name == "a"


# Requirements.


def _spec(**fields: object) -> PluginSpec:
    return PluginSpec(name="x", summary="x", factory="a:b", **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "requirements", "reason"),
    [
        ({}, {"framework": "jax"}, ""),
        ({"framework": "torch"}, {"framework": None}, ""),
        ({}, {"gqa": True}, "has no gqa"),
        ({"capabilities": {"gqa": False}}, {"gqa": True}, "has no gqa"),
        ({"capabilities": {"gqa": True}}, {"gqa": True}, ""),
        ({}, {"gqa": False}, ""),
        ({}, {"head_dim": 512}, ""),
        ({"capabilities": {"max_head_dim": 128}}, {"head_dim": 128}, ""),
        ({"capabilities": {"max_head_dim": 128}}, {"max_head_dim": 129}, "max_head_dim 129 is over its limit 128"),
        ({"capabilities": {"head_dim": (64, )}}, {"head_dim": 64}, None),
        ({}, {"masks": "causal"}, "states no masks"),
        ({"devices": ("cpu",)}, {"devices": ("tpu",)}, "has no devices tpu (it has cpu)"),
        ({"capabilities": {"dtypes": ("float32",)}}, {"dtypes": ["float32"]}, ""),
    ],
)  # fmt: skip
def test_requirements(fields: dict, requirements: dict, reason: str | None) -> None:
    if reason is None:
        with pytest.raises(PluginError):
            _spec(**fields)
    else:
        assert unmet(_spec(**fields), requirements) == reason


_words = st.lists(st.sampled_from(["causal", "full", "block", "window"]), unique=True)


@settings(max_examples=60)
@given(
    stated=st.fixed_dictionaries({"masks": _words.map(tuple), "gqa": st.booleans(), "max_head_dim": st.integers(1, 9)}),
    wanted=st.fixed_dictionaries({}, optional={"masks": _words, "gqa": st.booleans(), "head_dim": st.integers(1, 9)}),
)
def test_the_filter_equals_its_definition_in_any_order(stated: dict, wanted: dict) -> None:
    spec = _spec(capabilities=stated)
    meets = (
        set(wanted.get("masks", ())) <= set(stated["masks"])
        and (not wanted.get("gqa") or stated["gqa"])
        and wanted.get("head_dim", 0) <= stated["max_head_dim"]
    )
    answers = {unmet(spec, dict(order)) for order in itertools.permutations(wanted.items())}
    assert len(answers) == 1
    assert (answers == {""}) == meets


@settings(max_examples=40)
@given(st.permutations(range(5)), st.lists(st.integers(0, 2), min_size=5, max_size=5))
def test_auto_does_not_depend_on_the_order_of_discovery(order: list[int], priorities: list[int]) -> None:
    import types

    module = types.ModuleType("acme_order")
    for i, priority in enumerate(priorities):
        setattr(module, f"p{i}", PluginSpec(name=f"p{i}", summary="x", factory="json:loads", priority=priority))
    sys.modules["acme_order"] = module
    try:
        found = [Candidate("attention", f"p{i}", "acme", "1", f"acme_order:p{i}") for i in order]
        choice = Registry(found=found).choose("attention", "auto")
    finally:
        del sys.modules["acme_order"]
    assert choice.spec.name == f"p{priorities.index(max(priorities))}"
    assert [name for name, _ in choice.rejected] == [f"p{i}" for i in range(5) if f"p{i}" != choice.spec.name]
