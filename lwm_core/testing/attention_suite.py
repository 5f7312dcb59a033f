"""The conformance kit of attention backends: eight of the ten tests that a sharded attention owes, through a harness.

The two that need a look inside stay with each backend: the algebra of its merge, and the structure of its program
(transfers, memory). What a plugin's spec does not state is skipped by name here and must be refused by the backend;
:meth:`AttentionSuite.test_what_is_not_claimed_is_refused` holds it to that.

Shapes: B batch, S sequence, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import pytest
from numpy.typing import NDArray

from lwm_core.attention import AttentionMask
from lwm_core.errors import ShapeError
from lwm_core.layout import LAYOUTS, SequenceLayout
from lwm_core.protocols import AttentionHarness
from lwm_core.reference import attention_backward, attention_forward
from lwm_core.registry import Registry
from lwm_core.testing import attention_cases as cases
from lwm_core.testing.attention_cases import HEADS, KV_HEADS, MASKS, SEQ_LEN, WORLDS, Arrays
from lwm_core.testing.harness import attention_harness
from lwm_core.testing.suite import Suite
from lwm_core.testing.tolerance import TOLERANCES, assert_close, assert_no_worse

FLOAT32 = TOLERANCES["float32"]
_NAMES = ("out", "lse", "dq", "dk", "dv")

Results = dict[str, NDArray[Any]]


_Test = TypeVar("_Test", bound=Callable[..., None])
_Cases = Sequence[tuple[Any, ...]]


def _over(names: str, table: _Cases | Callable[[bool], _Cases]) -> Callable[[_Test], _Test]:
    """The cases of a test, the world first; a suite runs those of its worlds. A function is asked with ``thorough``."""

    def mark(test: _Test) -> _Test:
        test.over = names.split(), table  # type: ignore[attr-defined]
        return test

    return mark


class AttentionSuite(Suite):
    """Subclass it in a backend's tests, once a strategy.

    Attributes:
        name: the plugin, ``name`` or ``dist:name``.
        options: options that every harness gets (``{"strategy": "ring"}``); ``layout`` is the kit's to set.
        worlds: numbers of devices to test; leave out what the machine cannot hold.
        thorough: whether every layout meets every mask at worlds 2, 4 and 8, or one mask each as at 3; every test is
            there either way, with fewer cases.
        layouts, masks, dtypes: what is claimed; None takes it from the plugin's spec. Masks are named ``causal``,
            ``full``, ``block_causal`` and ``window``.
        gqa: whether fewer key-value than query heads are claimed; None takes it from the spec.
    """

    name: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}
    worlds: ClassVar[tuple[int, ...]] = WORLDS
    thorough: ClassVar[bool] = True
    layouts: ClassVar[tuple[str, ...] | None] = None
    masks: ClassVar[tuple[str, ...] | None] = None
    dtypes: ClassVar[tuple[str, ...] | None] = None
    gqa: ClassVar[bool | None] = None

    _harnesses: ClassVar[dict[tuple[int, str], AttentionHarness]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls._harnesses = {}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Give a test its cases at the suite's worlds."""
        names, table = getattr(metafunc.function, "over", (None, ()))
        if names is not None:
            found = table(self.thorough) if callable(table) else table
            metafunc.parametrize(names, [case for case in found if case[0] in self.worlds])

    @classmethod
    def teardown_class(cls) -> None:
        """Close the harnesses; their workers stay for the next suite."""
        while cls._harnesses:
            cls._harnesses.popitem()[1].close()

    def make(self, world: int, **options: Any) -> AttentionHarness:
        """The harness under test; override where a name is not enough."""
        return attention_harness(self.name, world, **{**self.options, **options})

    def refuses(self, world: int, layout: str, mask: AttentionMask, heads: int, kv_heads: int) -> str:
        """Why this combination of claimed parts is refused, as when heads do not divide over ranks; empty if it works.

        A reason is no excuse to be silent: the kit then checks that the backend does raise NotImplementedError.
        """
        return ""

    def multiple(self, world: int, layout: str) -> int:
        """What a length must be a multiple of; override where ranks of the layout are not the devices."""
        return SequenceLayout(layout, world).multiple  # type: ignore[arg-type]

    # -- what is claimed ---------------------------------------------------------------------------------------------

    def _claims(self, what: str) -> tuple[str, ...]:
        own: tuple[str, ...] | None = getattr(self, what)
        if own is not None:
            return own
        stated = Registry.from_environment().spec("attention", self.name).capability(what)
        return stated if isinstance(stated, tuple) else ()

    def _kv_heads(self) -> int:
        """K of the standard inputs: grouped wherever grouping is claimed."""
        own = self.gqa
        if own is None:
            own = Registry.from_environment().spec("attention", self.name).capability("gqa") is True
        return KV_HEADS if own else HEADS

    def _unclaimed(self, what: str, wanted: str) -> str:
        claims = self._claims(what)
        return "" if wanted in claims else f"{self.name} does not claim {what[:-1]} {wanted!r} (claims: {claims})"

    def _mask_unclaimed(self, mask: AttentionMask) -> str:
        return self._unclaimed("masks", mask.kind) or (self._unclaimed("masks", "window") if mask.window else "")

    def _backend(
        self,
        world: int,
        layout: str,
        mask: str = "causal",
        kv_heads: int | None = None,
        dtype: str = "float32",
    ) -> AttentionHarness:
        """The harness for a case, or the case skipped with the name of what is not claimed."""
        kv_heads = kv_heads or self._kv_heads()
        reason = self._unclaimed("layouts", layout) or self._mask_unclaimed(MASKS[mask])
        reason = reason or self._unclaimed("dtypes", dtype)
        if not reason and kv_heads != HEADS and self._kv_heads() == HEADS:
            reason = f"{self.name} does not claim gqa"
        if reason:
            pytest.skip(reason)
        reason = self.refuses(world, layout, MASKS[mask], HEADS, kv_heads)
        if reason:
            a = cases.inputs(cases.packed(), kv_heads)
            with pytest.raises(NotImplementedError):
                self._harness(world, layout).forward(a.q, a.k, a.v, MASKS[mask], a.segment_ids)
            pytest.skip(f"refused, as stated: {reason}")
        return self._harness(world, layout)

    def _harness(self, world: int, layout: str) -> AttentionHarness:
        if (world, layout) not in self._harnesses:
            self._harnesses[world, layout] = self.make(world, layout=layout)
        return self._harnesses[world, layout]

    def _masks_at(self, world: int, layout: str) -> list[str]:
        """The claimed masks that the matrix has at this place, so that no further test compiles another program.

        Never none, as a loop over nothing would pass: where the matrix has no usable one here it is the first that is
        usable, and where none is at all ``causal``, with which :meth:`_backend` skips the case by name.
        """

        def usable(mask: str) -> bool:
            refused = self.refuses(world, layout, MASKS[mask], HEADS, self._kv_heads())
            return not self._mask_unclaimed(MASKS[mask]) and not refused

        here = [m for w, at, m in cases.matrix(self.thorough) if (w, at) == (world, layout) and usable(m)]
        return here or [m for m in MASKS if usable(m)][:1] or ["causal"]

    def _inputs(self, segment_ids: NDArray[np.int32] | None) -> Arrays:
        return cases.inputs(segment_ids, self._kv_heads())

    # -- 1. the oracle -----------------------------------------------------------------------------------------------

    @_over("world layout mask", cases.matrix)
    def test_packed_rows_equal_the_oracle(self, world: int, layout: str, mask: str) -> None:
        """out, lse, dq, dk, dv of packed, grouped-query rows within 1e-5 of float64."""
        backend = self._backend(world, layout, mask)
        _check(backend, self._inputs(cases.packed()), MASKS[mask])

    @_over("world layout mask kv_heads", cases.pairwise)
    def test_rows_without_documents_equal_the_oracle(self, world: int, layout: str, mask: str, kv_heads: int) -> None:
        """The same without segment ids, with as many key-value heads as query heads and with a single one."""
        backend = self._backend(world, layout, mask, kv_heads)
        _check(backend, cases.inputs(None, kv_heads), MASKS[mask])

    # -- 2. causality by perturbation --------------------------------------------------------------------------------

    @_over("world layout mask", cases.matrix)
    def test_a_token_reaches_all_who_may_see_it_and_no_other(self, world: int, layout: str, mask: str) -> None:
        """Change a token at every shard edge: out and lse stay bitwise equal where it is unseen, differ where seen."""
        backend = self._backend(world, layout, mask)
        base = self._inputs(cases.single_document())
        before = _forward(backend, base, MASKS[mask])
        seen = cases.sees(MASKS[mask], cases.single_document())
        for t in cases.edges(SequenceLayout(layout, world)):  # type: ignore[arg-type]
            after = _forward(backend, base.perturb(0, t), MASKS[mask])
            assert np.array_equal(before["out"][1], after["out"][1]), f"token {t} of row 0 changed row 1"
            for name in ("out", "lse"):
                differs = np.any(before[name] != after[name], axis=tuple(range(2, before[name].ndim)))[0]
                reached = seen[0, :, t]
                assert not np.any(differs & ~reached), f"{name}: token {t} changed {_some(differs & ~reached)}"
                assert np.all(differs | ~reached), f"{name}: token {t} did not change {_some(reached & ~differs)}"

    @_over("world layout mask", cases.matrix)
    def test_a_gradient_reaches_only_what_was_seen(self, world: int, layout: str, mask: str) -> None:
        """The gradient of one token's output is zero for every query but its own and every key it does not see."""
        backend = self._backend(world, layout, mask)
        base = self._inputs(cases.single_document())
        seen = cases.sees(MASKS[mask], cases.single_document())
        for t in cases.edges(SequenceLayout(layout, world), most=6):  # type: ignore[arg-type]
            one = base.copy()
            one.dout[:] = 0.0
            one.dout[0, t] = base.dout[0, t]
            gradients = _backward(backend, one, MASKS[mask])
            for name, reached in (("dq", np.arange(SEQ_LEN) == t), ("dk", seen[0, t]), ("dv", seen[0, t])):
                nonzero = np.any(gradients[name] != 0.0, axis=(2, 3))
                assert not nonzero[1].any(), f"{name}: output {t} of row 0 gave row 1 a gradient"
                assert not np.any(nonzero[0] & ~reached), f"{name}: output {t} reached {_some(nonzero[0] & ~reached)}"
                if name == "dv":  # the others may vanish where a token sees itself alone
                    assert np.all(nonzero[0] | ~reached), f"dv: output {t} missed {_some(reached & ~nonzero[0])}"

    # -- 3. rows that see nothing ------------------------------------------------------------------------------------

    @pytest.mark.parametrize("pattern", cases.UNSEEN)
    @_over("world layout", cases.by_world())
    def test_rows_that_see_nothing(self, world: int, layout: str, pattern: str) -> None:
        """Padding has out 0, lse −inf and gradients 0, whatever stands in it, and leaves the other rows right."""
        backend = self._backend(world, layout, self._masks_at(world, layout)[0])
        ids = cases.unseen(SequenceLayout(layout, world), pattern)  # type: ignore[arg-type]
        arrays = self._inputs(ids)
        nothing = ids == 0
        for array in (arrays.q, arrays.k, arrays.v):
            array[nothing] *= 100.0
        for mask in self._masks_at(world, layout):
            results = _check(backend, arrays, MASKS[mask])
            assert np.all(np.isneginf(results["lse"][nothing])), f"{mask}: lse of padding is not -inf"
            for name in ("out", "dq", "dk", "dv"):
                assert np.all(results[name][nothing] == 0.0), f"{mask}: {name} of padding is not 0"

    # -- 5. documents ------------------------------------------------------------------------------------------------

    @_over("world layout", cases.by_world())
    def test_documents_do_not_leak(self, world: int, layout: str) -> None:
        """Change one document wholly: out, lse and gradients of every other token stay bitwise equal."""
        backend = self._backend(world, layout, self._masks_at(world, layout)[0])
        base = self._inputs(cases.packed())
        found = list(cases.documents(cases.packed()))
        for mask in self._masks_at(world, layout):
            before = _both(backend, base, MASKS[mask])
            for row, place in (found[0], found[1], found[2], found[4]):
                after = _both(backend, base.perturb(row, np.arange(place.start, place.stop)), MASKS[mask])
                others = np.ones((cases.ROWS, SEQ_LEN), bool)
                others[row, place] = False
                for name in _NAMES:
                    same = np.array_equal(before[name][others], after[name][others])
                    assert same, f"{mask}: {name} of other tokens changed with the document at {place} of row {row}"

    @_over("world layout", cases.by_world())
    def test_packed_equals_unpacked(self, world: int, layout: str) -> None:
        """Each document alone in a padded row gives what it gives among others."""
        backend = self._backend(world, layout, self._masks_at(world, layout)[0])
        base = self._inputs(cases.packed())
        places = [place for row, place in cases.documents(cases.packed()) if row == 1]
        for mask in self._masks_at(world, layout):
            together = _both(backend, base, MASKS[mask])
            alone = {name: np.zeros_like(array[1]) for name, array in together.items()}
            for i in range(0, len(places), cases.ROWS):
                here = places[i : i + cases.ROWS]
                results = _both(backend, cases.unpacked(base, here), MASKS[mask])
                for name in _NAMES:
                    for b, place in enumerate(here):
                        alone[name][place] = results[name][b, : place.stop - place.start]
            end = places[-1].stop
            for name in _NAMES:
                assert_close(together[name][1, :end], alone[name][:end], FLOAT32, f"{mask}: packed {name}")

    # -- 6. lengths --------------------------------------------------------------------------------------------------

    @_over("world layout", cases.by_world())
    def test_a_length_that_does_not_divide(self, world: int, layout: str) -> None:
        """Refused with ShapeError, forward and backward; one device has nothing to divide and is right."""
        backend = self._backend(world, layout)
        multiple = self.multiple(world, layout)
        if multiple == 1:
            seq_len = SEQ_LEN + 1
            _check(backend, cases.inputs(cases.single_document(seq_len), self._kv_heads(), seq_len), MASKS["causal"])
            return
        for seq_len in {SEQ_LEN + 1, SEQ_LEN + multiple // 2}:
            arrays = cases.inputs(cases.single_document(seq_len), self._kv_heads(), seq_len)
            with pytest.raises(ShapeError):
                _forward(backend, arrays, MASKS["causal"])
            with pytest.raises(ShapeError):
                _backward(backend, arrays, MASKS["causal"])

    # -- 7. grouped and multi-query heads ----------------------------------------------------------------------------

    @_over("world kv_heads", [(4, KV_HEADS), (4, 1), (8, 1)])
    def test_grouped_heads_equal_repeated_heads(self, world: int, kv_heads: int) -> None:
        """Group g's query heads share key-value head g, and its gradient is the sum of its copies'; K below world."""
        layout = next((layout for layout in LAYOUTS if not self._unclaimed("layouts", layout)), LAYOUTS[0])
        backend = self._backend(world, layout, kv_heads=kv_heads)
        self._backend(world, layout, kv_heads=HEADS)
        grouped = cases.inputs(cases.packed(), kv_heads)
        repeated = grouped.copy()
        repeated.k, repeated.v = (np.repeat(x, HEADS // kv_heads, axis=2) for x in (grouped.k, grouped.v))
        actual, copies = (_both(backend, a, MASKS["causal"]) for a in (grouped, repeated))
        for name in ("dk", "dv"):
            b, s, _, d = copies[name].shape
            copies[name] = copies[name].reshape(b, s, kv_heads, -1, d).sum(axis=3)
        for name in _NAMES:
            assert_close(actual[name], copies[name], FLOAT32, f"{name} with {kv_heads} key-value heads")

    # -- 8. large logits and bfloat16 --------------------------------------------------------------------------------

    @_over("world layout mask dtype", cases.large)
    def test_large_logits(self, world: int, layout: str, mask: str, dtype: str) -> None:
        """Logits of ±1e4 with a dominant key, which comes on the last hop for some rank: right, without overflow."""
        backend = self._backend(world, layout, mask, dtype=dtype)
        arrays, sure = cases.dominated(self._inputs(cases.single_document()), MASKS[mask])
        results = _both(backend, cases.as_dtype(arrays, dtype), MASKS[mask])
        expected = _oracle(arrays, MASKS[mask])
        # bfloat16 rounds the values it carries; an lse of 1e4 in float32 is good to 5e-4 where it is a sum.
        fine, coarse = (FLOAT32, 2e-3) if dtype == "float32" else (4e-3, 1e-2)
        assert sure.any(), "no query sees the dominant key"
        assert_close(results["out"][sure], expected["out"][sure], fine, "out of dominated queries")
        for name in ("out", "lse", "dv"):
            assert_close(results[name], expected[name], coarse, name)
        # Next to nothing is left of dq's terms |k||dout·v| and dk's |q||dout·v|: each is held to the size of its terms.
        values = np.repeat(arrays.v, HEADS // arrays.v.shape[2], axis=2)
        gains = _norm(np.sum(arrays.dout * values, axis=-1))
        for name, factor in (("dq", arrays.k), ("dk", arrays.q)):
            error, terms = _norm(results[name] - expected[name]), float(np.abs(factor).max()) * gains
            assert error <= coarse * terms, f"{name}: error {error:.3g} is over {coarse:.3g} of its terms' {terms:.3g}"

    @_over("world layout", cases.narrow)
    def test_bfloat16_loses_no_more_than_one_device(self, world: int, layout: str) -> None:
        """Error at most 1.5 times that of world 1 at every world (accumulators are float32); dtypes as contracted."""
        kind = "causal" if self._unclaimed("masks", "full") else "full"
        backend = self._backend(world, layout, kind, dtype="bfloat16")
        one_layout = next((at for at in LAYOUTS if not self._unclaimed("layouts", at)), layout)  # alike at world 1
        single = self._backend(1, one_layout, kind, dtype="bfloat16")
        mask = MASKS[kind]
        arrays = self._inputs(cases.single_document())
        narrow = cases.as_dtype(arrays, "bfloat16")
        expected = _oracle(narrow, mask)
        actual, one = _both(backend, narrow, mask), _both(single, narrow, mask)
        assert actual["lse"].dtype == np.float32, f"lse is {actual['lse'].dtype}, expected float32"
        for name in ("out", "dq", "dk", "dv"):
            assert actual[name].dtype == cases.BFLOAT16, f"{name} is {actual[name].dtype}, expected bfloat16"
            assert_no_worse(actual[name], expected[name], one[name], f"{name} at world {world}")
        assert_close(actual["lse"], expected["lse"], 1e-4, "lse of bfloat16 inputs, accumulated in float32")

    # -- 9. determinism ----------------------------------------------------------------------------------------------

    @_over("world layout", cases.by_world())
    def test_two_runs_are_bitwise_equal(self, world: int, layout: str) -> None:
        """The same inputs give the same bits, forward and backward."""
        backend = self._backend(world, layout, self._masks_at(world, layout)[0])
        for mask in self._masks_at(world, layout):
            first, second = (_both(backend, self._inputs(cases.packed()), MASKS[mask]) for _ in range(2))
            for name in _NAMES:
                assert np.array_equal(first[name], second[name]), f"{mask}: {name} differs between two runs"

    # -- 10. refusals ------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        "options",
        [{"layout": "no-such-layout"}, {"strategy": "no-such-strategy"}, {"no_such_option": 1}],
        ids=["layout", "strategy", "option"],
    )
    def test_unknown_options_are_refused(self, options: dict[str, Any]) -> None:
        """NotImplementedError with a reason, on making the harness or at the first call; never a fallback."""
        a = self._inputs(cases.single_document())
        with pytest.raises(NotImplementedError, match=r"\S"):
            self.make(self.worlds[0], **options).forward(a.q, a.k, a.v, MASKS["causal"], a.segment_ids)

    def test_what_is_not_claimed_is_refused(self) -> None:
        """Masks, layouts and dtypes that the spec does not state raise NotImplementedError."""
        world = min(self.worlds)
        layouts, masks, dtypes = (self._claims(what) for what in ("layouts", "masks", "dtypes"))
        assert layouts and masks and dtypes, f"{self.name} claims layouts {layouts}, masks {masks}, dtypes {dtypes}"
        claimed = self.make(world, layout=layouts[0])
        a = self._inputs(cases.single_document())
        for name, mask in MASKS.items():
            if self._mask_unclaimed(mask):
                with pytest.raises(NotImplementedError):
                    pytest.fail(f"{name} ran, unclaimed: {_forward(claimed, a, mask)['out'].shape}")
        for layout in (layout for layout in LAYOUTS if layout not in layouts):
            with pytest.raises(NotImplementedError):
                _forward(self.make(world, layout=layout), a, AttentionMask(masks[0]))  # type: ignore[arg-type]
        for dtype in (d for d in ("float32", "bfloat16", "float16", "float64") if d not in dtypes):
            with pytest.raises(NotImplementedError):
                _forward(claimed, cases.as_dtype(a, dtype), AttentionMask(masks[0]))  # type: ignore[arg-type]

    def test_heads_that_do_not_divide_are_refused(self) -> None:
        """Query heads that are no multiple of key-value heads have no groups: ShapeError or NotImplementedError."""
        layout = self._claims("layouts")[0]
        a = cases.inputs(cases.single_document(), kv_heads=3)
        with pytest.raises((ShapeError, NotImplementedError)):
            _forward(self._harness(min(self.worlds), layout), a, MASKS["causal"])


def _forward(backend: AttentionHarness, a: Arrays, mask: AttentionMask) -> Results:
    out, lse = backend.forward(a.q, a.k, a.v, mask, a.segment_ids)
    return {"out": out, "lse": lse}


def _backward(backend: AttentionHarness, a: Arrays, mask: AttentionMask) -> Results:
    dq, dk, dv = backend.backward(a.q, a.k, a.v, mask, a.dout, a.segment_ids)
    return {"dq": dq, "dk": dk, "dv": dv}


def _both(backend: AttentionHarness, a: Arrays, mask: AttentionMask) -> Results:
    return {**_forward(backend, a, mask), **_backward(backend, a, mask)}


def _oracle(a: Arrays, mask: AttentionMask) -> Results:
    out, lse = attention_forward(a.q, a.k, a.v, mask, a.segment_ids)
    dq, dk, dv = attention_backward(a.q, a.k, a.v, mask, a.dout, a.segment_ids)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def _check(backend: AttentionHarness, a: Arrays, mask: AttentionMask) -> Results:
    """Hold float32 results to the oracle and return them."""
    actual, expected = _both(backend, a, mask), _oracle(a, mask)
    for name in _NAMES:
        assert actual[name].dtype == np.float32, f"{name} is {actual[name].dtype}, expected float32"
        if name in ("dq", "dk") and _norm(expected[name]) < 1e-9 * _norm(expected["dv"]):
            # Where every token sees itself alone dq and dk are 0: rounding has nothing to be relative to but dv.
            assert _norm(actual[name]) <= FLOAT32 * _norm(expected["dv"]), f"{name} should vanish"
        else:
            assert_close(actual[name], expected[name], FLOAT32, name)
    return actual


def _norm(array: NDArray[Any]) -> float:
    return float(np.linalg.norm(array.astype(np.float64)))


def _some(places: NDArray[np.bool_]) -> str:
    found = np.flatnonzero(places)
    return f"{len(found)} tokens, the first at {found[0]}"
