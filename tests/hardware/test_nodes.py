"""The stated machines, against the vendors' published figures and through the strict decoder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lmforge.codec import decode, encode
from lmforge.errors import ConfigError
from lmforge.hardware.nodes import Hardware, Machine

CONF = Path(__file__).parents[2] / "conf" / "hardware"
STATED = tuple(sorted(file.stem for file in CONF.glob("*.yaml") if file.stem != "here"))
NAMED = {"cpu": 8, "laptop": 1}  # devices of those whose name does not say them


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
    assert found.devices == NAMED.get(name, int(name.rpartition("x")[2]) if name not in NAMED else 0)
    assert found.devices <= found.devices_per_node or found.links.between is not None
    assert (found.units is None) == (name == "cpu")
    assert found.memory_bandwidth is not None
    assert found.power_watts is not None


# Dense bf16 TFLOP/s, GB and GB/s: A100 whitepaper table 1; H100 whitepaper table 2 (SXM5, 989.4); the other cards' datasheets.
DATASHEETS = [
    ("a100x8", 312, 80, 2039), ("a100_40x8", 312, 40, 1555), ("h100x8", 989.4, 80, 3350), ("h200x8", 989.4, 141, 4800), ("b200x8", 2250, 186, 8000),
    ("a10gx1", 70, 24, 600), ("rtx4090x1", 165.2, 24, 1008), ("rtx_a6000x1", 154.8, 48, 768),
]  # fmt: skip


@pytest.mark.parametrize(("name", "tflops", "gb", "bandwidth"), DATASHEETS)
def test_figures_are_the_datasheets(name: str, tflops: float, gb: float, bandwidth: float) -> None:
    found = machine(name)
    peak = found.peak_flops.of("bfloat16")
    assert peak is not None
    assert peak == pytest.approx(tflops * 1e12, rel=1e-3)
    assert 0.98 * gb * 1e9 < found.memory_bytes < 1.08 * gb * 1e9
    assert found.memory_bandwidth == bandwidth * 1e9


def test_both_16_bit_formats_have_one_peak() -> None:
    """Tensor cores multiply them alike."""
    for name in STATED:
        peaks = machine(name).peak_flops
        assert peaks.of("float16") == peaks.of("bfloat16") or name == "cpu"


def test_every_key_reaches_the_machine() -> None:
    values = option("h100x1")
    plain = {"name": "x", "accelerator": "cpu", "devices": 3, "devices_per_node": 2, "memory_bytes": 5, "memory_bandwidth": 6.0, "units": 7}
    for key, other in {**plain, "power_watts": 8.0, "price_per_device_hour": 9.0}.items():
        assert getattr(decode(Hardware, values | {key: other}).machine(), key) == other
    for dtype in values["peak_flops"]:
        changed = values | {"peak_flops": values["peak_flops"] | {dtype: 7}}
        assert decode(Hardware, changed).machine().peak_flops.of(dtype) == 7
    for link in values["links"]:
        changed = values | {"links": values["links"] | {link: {"bandwidth": 7, "latency": 3}}}
        assert getattr(decode(Hardware, changed).machine().links, link).bandwidth == 7
    for factor in values["factors"]:
        assert getattr(decode(Hardware, values | {"factors": values["factors"] | {factor: 0.5}}).machine().factors, factor) == 0.5
    here = option("here")
    assert decode(Hardware, here | {"peak_flops": dict.fromkeys(here["peak_flops"], 9)}).machine().peak_flops.float32 == 9


@pytest.mark.parametrize("key", ["devices_per_node", "memory_bandwidth", "units", "links", "factors", "power_watts"])
def test_a_missing_key_is_one_line(key: str) -> None:
    values = option("h100x8")
    del values[key]
    with pytest.raises(ConfigError, match=rf"hardware.{key}: missing key; give it a value") as found:
        decode(Hardware, values, "hardware")
    assert len(str(found.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "inner"),
    [("memory_bandwidth", None), ("devices_per_node", None), ("units", None), ("peak_flops", {"bfloat16": 0}), ("factors", {"matmul": 0})],
)
def test_zero_is_refused(key: str, inner: dict[str, Any] | None) -> None:
    values = option("h100x8")
    where = key if inner is None else f"{key}.{next(iter(inner))}"
    with pytest.raises(ConfigError, match=rf"hardware.{where}: 0(.0)? must be > 0") as found:
        decode(Hardware, values | {key: 0 if inner is None else values[key] | inner}, "hardware")
    assert len(str(found.value).splitlines()) == 1


def test_a_link_of_no_bandwidth_is_refused() -> None:
    values = option("h100x8")
    with pytest.raises(ConfigError, match=r"hardware.links.within.bandwidth: 0.0 must be > 0"):
        decode(Hardware, values | {"links": values["links"] | {"within": {"bandwidth": 0, "latency": 0}}}, "hardware")


def test_ranks_share_a_hosts_memory_and_own_a_gpus() -> None:
    assert machine("cpu").memory_per_device(4) == 4 * 2**30
    assert machine("a100x8").memory_per_device(8) == machine("a100x1").memory_bytes


def test_a_machine_survives_json() -> None:
    found = machine("h200x8")
    assert decode(Machine, json.loads(json.dumps(encode(found)))) == found
    assert dataclasses.is_dataclass(found)
