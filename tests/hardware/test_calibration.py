"""A calibration's file: whose it is, what of it is used, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lmforge.errors import ConfigError
from lmforge.hardware.calibration import FOLDER, FORMAT, Attention, Calibration, calibrated, fingerprint, read, strangers
from lmforge.predict.rates import rates
from lmforge.predict.time import missing, seconds
from tests.predict.machines import machine, planned

FLAT = Attention(causal=2e10, causal_backward=0.8, masked=4e10, masked_backward=0.9)


def measured(of: str = "cpu", **change: Any) -> Calibration:
    at = machine(of)
    found = Calibration(
        format=FORMAT, fingerprint=at.fingerprint, name=at.name, accelerator=at.accelerator, threads=2, devices=at.devices, units=at.units, torch="2",
        measured_at="2026-11-23T00:00:00+00:00", matmul={"float32": 5e10}, attention={"float32": FLAT}, memory=2e10, update=1e10, launch=2e-6, step=5e-3,
        loader=1e7, bandwidth=1e9, latency=1e-4, residual=1.2, noise=0.05, learned=1.0, learned_from=0,
    )  # fmt: skip
    return dataclasses.replace(found, **change)


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    file = measured().save(tmp_path)
    assert file == tmp_path / FOLDER / f"{machine('cpu').fingerprint}.json"
    assert read(file) == measured()


def test_a_gpu_is_known_by_name_and_memory_and_a_cpu_by_its_cores_too() -> None:
    assert machine("h100x8").fingerprint == machine("h100x1").fingerprint != machine("h200x8").fingerprint
    assert fingerprint("x", "cpu", 2**34, 2) != fingerprint("x", "cpu", 2**34, 4)
    assert fingerprint("x", "cuda", 2**34, 2) == fingerprint("x", "cuda", 2**34 + 2**20, 4)


def test_a_plan_is_timed_with_what_was_measured(tmp_path: Path) -> None:
    job, at = planned("stage=pretrain", "hardware=cpu", "parallel=single")
    measured().save(tmp_path)
    known, warning = calibrated(at, tmp_path)
    assert warning == ""
    assert rates(known, "float32", 1).matmul == 5e10
    prior, found = seconds(job, at), seconds(job, known)
    assert prior is not None
    assert found is not None
    assert found.measured
    assert found.total != prior.total
    assert found.high / found.low < prior.high / prior.low


def test_a_calibration_is_enough_where_nothing_is_stated(tmp_path: Path) -> None:
    """hardware=here states no peaks."""
    job, at = planned("stage=pretrain", "hardware=cpu", "parallel=single")
    bare = dataclasses.replace(at, memory_bandwidth=None, peak_flops=dataclasses.replace(at.peak_flops, float32=None))
    assert missing(job, bare) == ("hardware.peak_flops.float32 (known: none)", "hardware.memory_bandwidth")
    measured().save(tmp_path)
    found = seconds(job, calibrated(bare, tmp_path)[0])
    assert found is not None
    assert found.mfu is None


def test_ranks_on_a_host_share_what_one_process_got() -> None:
    at = dataclasses.replace(machine("cpu"), devices=2, devices_per_node=2, calibration=measured())
    assert rates(at, "float32", 2).matmul == rates(at, "float32", 1).matmul / 2
    alone = dataclasses.replace(at, calibration=measured(threads=1))
    assert rates(alone, "float32", 2).matmul == rates(alone, "float32", 1).matmul


def test_what_runs_taught_is_in_the_rates() -> None:
    at = machine("cpu")
    slow, plain = (rates(dataclasses.replace(at, calibration=measured(learned=one)), "float32", 1) for one in (1.25, 1.0))
    assert slow.matmul == pytest.approx(plain.matmul / 1.25)
    assert slow.memory == pytest.approx(plain.memory / 1.25)
    assert slow.launch == pytest.approx(plain.launch * 1.25)


def test_another_machines_is_named_and_ignored(tmp_path: Path) -> None:
    """Copied under this machine's name, or lying beside: one line each, and the prior is used."""
    at, other = machine("cpu"), measured("h100x8")
    assert strangers(at, tmp_path) == ""
    file = other.save(tmp_path)
    assert calibrated(at, tmp_path) == (at, "")
    line = strangers(at, tmp_path)
    theirs, ours = f"NVIDIA H100 80GB HBM3 (8 devices, {other.fingerprint})", f"laptop, 8 cores, 16 GiB ({at.fingerprint})"
    assert f"was measured on {theirs} and not on {ours}: ignored" in line
    file.rename(file.with_name(f"{at.fingerprint}.json"))
    found, warning = calibrated(at, tmp_path)
    assert found == at
    assert "NVIDIA H100 80GB HBM3" in warning
    assert "\n" not in warning + line


@pytest.mark.parametrize(
    ("name", "value"),
    [("threads", 0), ("attention", {}), ("step", -1.0), ("bandwidth", 0.0), ("latency", -1e-6), ("memory", 0.0), ("matmul", {})],
)
def test_a_damaged_calibration_is_refused_in_one_line(name: str, value: object, tmp_path: Path) -> None:
    file = measured("h100x8").save(tmp_path)
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(ConfigError, match="is no calibration: ") as found:
        read(file)
    assert len(str(found.value).splitlines()) == 1


def test_a_damaged_one_of_another_machine_is_named_only(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "zzz.json").write_text("{")
    assert "zzz.json is not used, and cannot be read as a calibration" in strangers(machine("cpu"), tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"format": 99}', json.dumps({"format": FORMAT, "fingerprint": "x"}), "\x00\x01"],
)
def test_what_is_no_calibration_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    at = machine("cpu")
    file = tmp_path / FOLDER / f"{at.fingerprint}.json"
    file.parent.mkdir()
    file.write_text(content)
    with pytest.raises(ConfigError, match="calibration") as found:
        calibrated(at, tmp_path)
    assert len(str(found.value).splitlines()) == 1
    assert "lmforge calibrate" in str(found.value)


@pytest.mark.parametrize("change", [{"memory": 0.0}, {"matmul": {}}, {"launch": -1.0}, {"attention": {"float32": dataclasses.replace(FLAT, masked=0.0)}}])
def test_rates_that_no_machine_has_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    file = measured(**change).save(tmp_path)
    with pytest.raises(ConfigError, match="a rate is not above 0"):
        read(file)
