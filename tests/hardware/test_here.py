"""Detection, against what the operating system and the driver say by another road."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmforge.errors import PlanError
from lmforge.hardware import here

# What nvidia-smi prints on a node of two H100s and an A100.
ANSWER = "0, GPU-11aa-22, NVIDIA H100 80GB HBM3, 81559\n1, GPU-33bb-44, NVIDIA H100 80GB HBM3, 81559\n2, GPU-33cc-55, NVIDIA A100-SXM4-80GB, 81920\n"


def test_the_cpu_here_is_what_linux_says() -> None:
    found = here.detect()
    if found.accelerator != "cpu":
        pytest.skip("this machine has GPUs")
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert 0 < found.memory_bytes <= int(total.split()[1]) * 1024
    assert 1 <= found.devices <= (os.cpu_count() or 1)


def test_detection_is_quick_and_leaves_torch_alone() -> None:
    code = "import sys, time; from lmforge.hardware import here; t = time.perf_counter(); here.detect(); print(time.perf_counter() - t, 'torch' in sys.modules)"
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    seconds, torch = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout.split()
    assert float(seconds) < 0.1
    assert torch == "False"


def test_gpus_are_read_from_nvidia_smi() -> None:
    gpus = here.parse(ANSWER)
    assert [gpu.name for gpu in gpus] == ["NVIDIA H100 80GB HBM3"] * 2 + ["NVIDIA A100-SXM4-80GB"]
    assert gpus[0].memory_bytes == 81559 * 2**20


@pytest.mark.parametrize(
    ("chosen", "indices"),
    [(None, "012"), ("0,1", "01"), ("2,0", "20"), ("GPU-33cc", "2"), ("GPU-33", ""), ("0,7,1", "0"), ("", ""), ("-1", "")],
)
def test_cuda_visible_devices_chooses_by_cudas_own_rule(chosen: str | None, indices: str) -> None:
    assert "".join(gpu.number for gpu in here.visible(here.parse(ANSWER), chosen)) == indices


def test_what_cannot_be_told_is_refused() -> None:
    with pytest.raises(PlanError, match=r"MIG slice; type hardware=h100x1 hardware\.memory_bytes="):
        here.visible(here.parse(ANSWER), "MIG-11aa")
    with pytest.raises(PlanError, match="name the machine"):
        here.parse("0, GPU-1, NVIDIA GB10, [N/A]\n")


def script(folder: Path, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{body}\n")
    (folder / "nvidia-smi").chmod(0o755)


def test_a_driver_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    script(tmp_path, "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    with pytest.raises(PlanError, match="nvidia-smi failed: Failed to initialize NVML"):
        here.nvidia_smi()
    script(tmp_path, f"printf '{ANSWER}'".replace("\n", "\\n"))
    start = time.perf_counter()
    assert len(here.nvidia_smi()) == 3
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(("text", "cores"), [("max 100000", None), ("150000 100000", 1.5), ("-1 100000", None), ("", None)])
def test_a_cpu_quota_is_read(text: str, cores: float | None) -> None:
    assert here.quota(text) == cores


def test_every_enclosing_cgroup_is_looked_at(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("0::/user.slice/job_7\n")
    assert here.cgroups("memory", own, tmp_path)[:1] == [tmp_path / "user.slice/job_7"]
    assert {tmp_path / "user.slice", tmp_path} <= set(here.cgroups("memory", own, tmp_path))
    own.write_text("4:memory:/job\n2:cpu,cpuacct:/other\n")
    assert tmp_path / "memory/job" in here.cgroups("memory", own, tmp_path)
    assert tmp_path / "cpu,cpuacct/other" in here.cgroups("cpu", own, tmp_path)
    assert not any("memory" in folder.parts for folder in here.cgroups("cpu", own, tmp_path))
    assert here.cgroups("cpu", tmp_path / "none", tmp_path) == []
