"""The stated machines, against the vendors' published figures and through the strict decoder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lmforge.codec import decode, encode
from lmforge.hardware.nodes import Hardware, Machine

CONF = Path(__file__).parents[2] / "conf" / "hardware"
STATED = ("cpu", "a100x1", "a100x8", "h100x1", "h100x8", "h200x1", "h200x8")


def option(name: str) -> dict[str, Any]:
    """An option's keys, what it inherits in the same folder merged underneath."""
    own = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    merged: dict[str, Any] = {}
    for base in own.pop("defaults", []):
        merged |= own if base == "_self_" else option(base)
    return merged | own


def machine(name: str) -> Machine:
    hardware: Hardware = decode(Hardware, option(name), "hardware")
    assert decode(Hardware, json.loads(json.dumps(encode(hardware)))) == hardware
    return hardware.machine()


@pytest.mark.parametrize("name", STATED)
def test_an_option_decodes_and_has_the_devices_of_its_name(name: str) -> None:
    found = machine(name)
    assert found.accelerator == ("cpu" if name == "cpu" else "cuda")
    if name != "cpu":
        assert found.devices == int(name.split("x")[1])


# Dense bf16 TFLOP/s: A100 whitepaper table 1; H100 whitepaper table 2 (SXM5, 989.4).
@pytest.mark.parametrize(("name", "tflops", "gb"), [("a100x8", 312, 80), ("h100x8", 989.4, 80), ("h200x8", 989.4, 141)])
def test_figures_are_the_datasheets(name: str, tflops: float, gb: float) -> None:
    found = machine(name)
    peak = found.peak_flops.of("bfloat16")
    assert peak is not None
    assert peak == pytest.approx(tflops * 1e12, rel=1e-3)
    assert 0.98 * gb * 1e9 < found.memory_bytes < 1.08 * gb * 1e9


def test_every_key_reaches_the_machine() -> None:
    values = option("h100x1")
    for key, other in {"name": "x", "accelerator": "cpu", "devices": 3, "memory_bytes": 5}.items():
        assert getattr(decode(Hardware, values | {key: other}).machine(), key) == other
    for dtype in values["peak_flops"]:
        changed = values | {"peak_flops": values["peak_flops"] | {dtype: 7}}
        assert decode(Hardware, changed).machine().peak_flops.of(dtype) == 7
    here = option("here")
    assert decode(Hardware, here | {"peak_flops": dict.fromkeys(here["peak_flops"], 9)}).machine().peak_flops.float32 == 9


def test_ranks_share_a_hosts_memory_and_own_a_gpus() -> None:
    assert machine("cpu").memory_per_device(4) == 4 * 2**30
    assert machine("a100x8").memory_per_device(8) == machine("a100x1").memory_bytes


def test_a_machine_survives_json() -> None:
    found = machine("h200x8")
    assert decode(Machine, json.loads(json.dumps(encode(found)))) == found
    assert dataclasses.is_dataclass(found)
