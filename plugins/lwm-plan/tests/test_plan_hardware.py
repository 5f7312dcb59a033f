"""Machines' names, and that the table says what the trainers' own says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_cases import llama, stage

from lwm_core.errors import UsageError
from lwm_plan.hardware import DEVICES, EXAMPLES, machine_name, read_machine
from lwm_plan.job import Job, place
from lwm_plan.transfers import link


@pytest.mark.parametrize(
    ("name", "devices"),
    [("v4-512", 256), ("v5p-512", 256), ("v6e-256", 256), ("v5e-256", 256), ("tpu7x-128", 256), ("7x-128", 256),
     ("h100x64", 64), ("H200x64", 64), ("v4:8x8x4", 256), ("v5p:4x4x4", 64), ("v6e:16x16", 256), ("tpu7x:4x4x4", 128)],
)  # fmt: skip
def test_names_give_devices(name: str, devices: int) -> None:
    assert read_machine(name).devices == devices


@given(st.sampled_from(sorted(DEVICES)), st.integers(1, 10_000))
def test_a_machines_name_reads_back(kind: str, devices: int) -> None:
    device = DEVICES[kind]
    devices *= device.devices_per_chip  # a name counts whole chips
    machine = read_machine(machine_name(device, devices))
    assert (machine.device, machine.devices) == (device, devices)


@pytest.mark.parametrize(
    ("name", "near"),
    [("h10x64", "h100x64"), ("v5-512", "v5"), ("v5q-512", "v5"), ("h100-64", "h100x64"), ("v4x512", "v4-512"),
     ("b20x8", "b200x8"), ("h100", "h100x64"), ("tpu7-128", "tpu7x-128")],
)  # fmt: skip
def test_a_slip_is_told_what_was_nearly_meant(name: str, near: str) -> None:
    with pytest.raises(UsageError, match=f"did you mean {near}") as caught:
        read_machine(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["", "abacus-12", "v4-511", "v4-0", "h100x0", "v5p:0x4", "h100:8x8", "x", "-", "v4--4"]
)
def test_what_is_no_machine_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_machine(name)
    assert "\n" not in str(caught.value) and repr(name) in str(caught.value)


def test_every_device_has_a_source_and_an_example() -> None:
    for device in DEVICES.values():
        assert "." in device.source.split()[0] and device.peak_flops > 1e14 and device.memory > 10e9
        assert any(example.startswith(device.name) for example in EXAMPLES)
        assert device.link < device.memory_bandwidth and bool(device.network) == bool(device.island)


def test_the_trainers_table_says_the_same() -> None:
    """What MFU is measured against is what it is predicted against."""
    devices = pytest.importorskip("lwm_jax_ring.devices").DEVICES
    kinds = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5p", "v6e": "TPU v6 lite", "tpu7x": "TPU7x",
             "a100": "NVIDIA A100", "h100": "NVIDIA H100", "h200": "NVIDIA H200"}  # fmt: skip
    for ours, theirs in kinds.items():
        assert (DEVICES[ours].peak_flops, DEVICES[ours].link) == (devices[theirs].peak_flops, devices[theirs].bandwidth)


def test_axes_beyond_an_island_of_gpus_go_over_the_network() -> None:
    """``sp`` is innermost: 4 of it and 2 of ``tp`` fill a host of 8, ``fsdp`` leaves it."""
    machine = read_machine("h100x64")
    placed = place(Job(llama()), stage(1 << 16, 8, "1,8,2,4"), 64)
    assert [link(placed, machine, axis) for axis in ("sp", "tp", "fsdp")] == [450e9, 450e9, 50e9]
    tpu = read_machine("v5p-128")
    assert {link(placed, tpu, axis) for axis in ("sp", "tp", "fsdp")} == {90e9}
