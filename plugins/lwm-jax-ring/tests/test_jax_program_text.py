"""The reader of compiled programs, against programs whose transfers are counted by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lwm_jax_ring.aot.axes import groups, served
from lwm_jax_ring.aot.compile import collectives, kernels
from lwm_jax_ring.aot.program_text import Instruction, ProgramText, ProgramTextError, array_bytes

TPU_LOOP = """\
HloModule jit_f, is_scheduled=true

%body (p: (s32[], bf16[1,8,128], s32[])) -> (s32[], bf16[1,8,128], s32[]) {
  %p = (s32[]{:T(128)}, bf16[1,8,128]{2,1,0:T(8,128)(2,1)}, s32[]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[1,8,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %n = s32[] get-tuple-element(%p), index=2
  %start = (bf16[1,8,128]{2,1,0}, bf16[1,8,128]{2,1,0}) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %block.3 = bf16[1,8,128]{2,1,0} custom-call(%x), custom_call_target="tpu_custom_call"
  %done = bf16[1,8,128]{2,1,0} collective-permute-done(%start)
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %t = (s32[], bf16[1,8,128]{2,1,0}, s32[]) tuple(%next, %done, %n)
}

%cond (p.1: (s32[], bf16[1,8,128], s32[])) -> pred[] {
  %p.1 = (s32[], bf16[1,8,128]{2,1,0}, s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %n.1 = s32[] get-tuple-element(%p.1), index=2
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %n.1), direction=LT, metadata={op_name="jit(f)/while/cond/lt"}
}

ENTRY %main (a: bf16[1,8,128]) -> bf16[1,8,128] {
  %a = bf16[1,8,128]{2,1,0} parameter(0)
  %from = s32[] constant(2)
  %to = s32[] constant(7)
  %copied = s32[] copy(%from)
  %init = (s32[], bf16[1,8,128]{2,1,0}, s32[]) tuple(%copied, %a, %to)
  %w = (s32[], bf16[1,8,128]{2,1,0}, s32[]) while(%init), condition=%cond, body=%body
  ROOT %r = bf16[1,8,128]{2,1,0} get-tuple-element(%w), index=1
}
"""


def test_a_tpus_loop_is_counted_from_its_condition_and_first_value() -> None:
    text = ProgramText(TPU_LOOP)
    (row,) = collectives(text, {"sp": 2})
    assert (row.kind, row.type, row.bytes, row.count) == ("collective-permute", "bf16[1,8,128]", 2 * 8 * 128, 5)
    assert (row.axes, row.sent) == (("sp",), 2 * 8 * 128)
    assert kernels(text) == {"block": 5}


@pytest.mark.parametrize(("step", "rounds"), [(2, 3), (3, 2), (5, 1), (9, 1)])
def test_a_loop_that_the_compiler_has_unrolled_runs_less_often(step: int, rounds: int) -> None:
    """From 2 to 7 by more than one at a time, as collective matmuls count; and with the operands the other way."""
    unrolled = TPU_LOOP.replace("s32[] constant(1)", f"s32[] constant({step})")
    assert kernels(ProgramText(unrolled)) == {"block": rounds}
    assert kernels(ProgramText(unrolled.replace("add(%i, %one)", "add(%one, %i)"))) == {"block": rounds}


def test_what_another_core_is_given_is_counted() -> None:
    """A collective that a TPU hands to its SparseCores is in a computation that a ``call-start`` names."""
    handed = """\
%called (q: s32[1,8]) -> s32[1,64] {
  %q = s32[1,8]{1,0} parameter(0)
  ROOT %gathered = s32[1,64]{1,0} all-gather(%q), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={1}
}

ENTRY"""
    start = (
        "  %ids = s32[1,8]{1,0} constant({0})\n"
        "  %cs = ((s32[1,8]), s32[1,64]{1,0}, u32[]) call-start(%ids), to_apply=%called\n"
        "  %copied ="
    )
    text = ProgramText(TPU_LOOP.replace("ENTRY", handed).replace("  %copied =", start))
    assert {row.kind: (row.type, row.count) for row in collectives(text, {"sp": 8})} == {
        "all-gather": ("s32[1,64]", 1), "collective-permute": ("bf16[1,8,128]", 5),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("direction=LT", "direction=NE"),
        ("constant(7)", "parameter(1)"),
        ("ENTRY %main", "%main"),
        ("add(%i, %one)", "multiply(%i, %one)"),
        ("add(%i, %one)", "add(%n, %one)"),
        ("s32[] constant(1)", "s32[] constant(0)"),
        (
            "ROOT %t = (s32[], bf16[1,8,128]{2,1,0}, s32[]) tuple",
            "ROOT %t = (s32[], bf16[1,8,128]{2,1,0}, s32[]) fusion",
        ),
    ],
)
def test_what_cannot_be_counted_is_refused(old: str, new: str) -> None:
    with pytest.raises(ProgramTextError):
        ProgramText(TPU_LOOP.replace(old, new))


@pytest.mark.parametrize(
    ("kind", "size"),
    [("bf16[2,3]{1,0:T(8,128)(2,1)}", 12), ("(f32[4]{0}, u32[]{:S(2)})", 20), ("pred[5]", 5), ("s4[8]", 4),
     ("f8e4m3fn[6]", 6)],
)  # fmt: skip
def test_bytes_of_a_type(kind: str, size: int) -> None:
    assert array_bytes(kind) == size


def test_nested_loops_of_a_real_program() -> None:
    """Six rounds of three permutes of 128 bytes and one gather, which the CPU's compiler prints in its own way."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("sp",))
    pairs = [(rank, (rank + 1) % 4) for rank in range(4)]

    def local(x: jax.Array) -> jax.Array:
        def inner(_: Any, y: jax.Array) -> jax.Array:
            return lax.ppermute(y, "sp", pairs) * 2

        def outer(_: Any, y: jax.Array) -> jax.Array:
            return lax.fori_loop(0, 3, inner, y) + lax.all_gather(y, "sp").sum(axis=0)

        return lax.fori_loop(2, 8, outer, x)

    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("sp"), out_specs=P("sp"), check_vma=False))
    text = ProgramText(run.lower(jnp.zeros((32, 4), jnp.float32)).compile().as_text())
    found = {row.kind: (row.bytes, row.count, row.sent) for row in collectives(text, {"sp": 4})}
    assert found == {"collective-permute": (128, 18, 128), "all-gather": (512, 6, 384)}


def test_axes_and_bytes_sent_of_a_real_program() -> None:
    """Two rows of two devices and 32 bytes each: what is sent follows from what each collective is."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("dp", "tp"))

    def local(x: jax.Array) -> jax.Array:
        both = lax.psum(x * 3, ("dp", "tp"))
        rows, columns = lax.psum_scatter(x, "dp", tiled=True), lax.all_gather(x * 2, "tp", tiled=True)
        return both + lax.ppermute(x, "tp", [(0, 1)]) + rows.sum() + columns.sum()

    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P(("dp", "tp")), out_specs=P(("dp", "tp"))))
    text = ProgramText(run.lower(jnp.zeros((32,), jnp.float32)).compile().as_text())
    found = {row.kind: (row.axes, row.sent) for row in collectives(text, mesh.shape)}
    assert found["all-reduce"] == (("dp", "tp"), 2 * 32 * 3 // 4)
    assert found["reduce-scatter"] == (("dp",), 16)
    assert found["all-gather"] == (("tp",), 32)
    assert found["collective-permute"] == (("tp",), 16)  # every other device sends


@pytest.mark.parametrize(
    "written",
    ["{{0,4},{1,5},{2,6},{3,7}}", "[4,2]<=[2,4]T(1,0)", "mesh['a'=2,'b'=2,'c'=2] {'a'}",
     "mesh['a'=2,'b'=1,'c'=4], device_ids=([8]) {'a'}", "mesh['c'=4,'a'=2], device_ids=([2,4]T(1,0)) {'a'}"],
)  # fmt: skip
def test_groups_are_read_in_every_way_of_writing_them(written: str) -> None:
    one = Instruction("g", "f32[8]", "all-gather", (), f", channel_id=1, replica_groups={written}, dimensions={{0}}")
    assert sorted(groups(one, 8).tolist()) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert served(groups(one, 8), {"dp": 1, "fsdp": 2, "tp": 2, "sp": 2}) == ("fsdp",)


def test_groups_of_all_devices_and_of_none_that_can_be_read() -> None:
    whole, unknown = (
        Instruction("g", "f32[8]", "all-reduce", (), f", replica_groups={text}, to_apply=%sum") for text in ("{}", "V3")
    )
    assert groups(whole, 4).tolist() == [[0, 1, 2, 3]] and served(groups(whole, 4), {"dp": 2, "tp": 2}) == ("dp", "tp")
    with pytest.raises(ProgramTextError, match="the devices of 'g' cannot be read"):
        groups(unknown, 4)
