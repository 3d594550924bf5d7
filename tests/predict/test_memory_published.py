"""Tables of published formulae, exactly; the tables lie beside the project and are never copied into it."""

from __future__ import annotations

import csv
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import torchtune_rows
from published import deepspeed_zero2, deepspeed_zero3, korthikanti, zero_bytes

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
GIB = 2**30

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the tables in ../shared/data are not here")


def read(name: str) -> Any:
    return json.loads((DATA / name).read_text())


def test_zero() -> None:
    rows = read("zero_table1.json")["rows"]
    for row in rows:
        for stage, key in enumerate(("baseline_GB", "os_GB", "os_g_GB", "os_g_p_GB")):
            assert zero_bytes(row["params"], row["dp"], stage) / 1e9 == pytest.approx(row[key], rel=1e-12)
    assert len(rows) == 18


def test_deepspeeds_estimators() -> None:
    with (DATA / "memory_measurements.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["id"].startswith("ds.")]
    for row in rows:
        name, host = row["id"], float(row["extra"].split("per-CPU ")[1].split()[0])
        if "ZeRO-2" in name:
            found = deepspeed_zero2(2851e6, 8, offload_optimizer="optimizer=cpu" in name)
        else:
            offloads = {"offload_optimizer": "opt=cpu" in name, "offload_params": "param=cpu" in name, "zero_init": "zero_init=1" in name}
            found = deepspeed_zero3(2851e6, 32e6, 8, **offloads)
        assert (round(found[0] / GIB, 2), round(found[1] / GIB, 2)) == (float(row["mem_value"]), host), name
    assert len(rows) == 8


def test_korthikantis_activations() -> None:
    table = read("korthikanti2022.json")
    found = 0
    for row in table["rows"]:
        for mode, value in row["act_GiB_per_layer"].items():
            here = korthikanti(table["seq_len"], row["micro_batch"], row["hidden"], row["heads"], row["tp"], mode) / GIB
            assert round(here, 4) == value, (row, mode)
            found += 1
    assert found == 24


def test_torchtunes_measured_peaks() -> None:
    """Of the rows that state lengths; the 405B one states a batch that cannot have been (benchmarks/torchtune_rows.py)."""
    with (DATA / "memory_measurements.csv").open() as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    errors = {}
    for name, settings in torchtune_rows.ROWS.items():
        if name in rows:
            measured = float(rows[name]["mem_value"]) * (GIB if "GiB" in rows[name]["mem_unit"] else 1e9)
            errors[name] = abs(max(torchtune_rows.moments(settings).values()) / measured - 1)
    assert len(errors) == 17
    assert statistics.median(errors.values()) <= 0.05
    assert max(error for name, error in errors.items() if name != "tune1.7") <= 0.12
