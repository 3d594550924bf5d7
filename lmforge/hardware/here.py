"""What this machine has, asked of the operating system and of nvidia-smi: milliseconds, and no torch.

A container's limits (cgroup v1 and v2, CPU affinity) count, since a rank that passes them is killed or starved.
"""

from __future__ import annotations

import csv
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from lmforge.errors import PlanError
from lmforge.hardware.nodes import Accelerator

MIB = 2**20
CGROUP = Path("/sys/fs/cgroup")
DRIVER = (Path("/dev/nvidiactl"), Path("/proc/driver/nvidia/version"))
INSTEAD = "name the machine, such as hardware=h100x1 or hardware=cpu"


class Detected(NamedTuple):
    name: str
    accelerator: Accelerator
    devices: int
    memory_bytes: int  # of the smallest GPU, or of the host


class Gpu(NamedTuple):
    number: str
    uuid: str
    name: str
    memory_bytes: int


def detect() -> Detected:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, or the CPU; PlanError where a driver is there but does not answer."""
    gpus = visible(nvidia_smi(), os.environ.get("CUDA_VISIBLE_DEVICES")) if _may_use_gpus() else []
    if not gpus:
        return Detected(cpu_name(), "cpu", cpu_count(), host_memory_bytes())
    names = " + ".join(dict.fromkeys(gpu.name for gpu in gpus))
    return Detected(names, "cuda", len(gpus), min(gpu.memory_bytes for gpu in gpus))


def _may_use_gpus() -> bool:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")
    return not hidden and any(path.exists() for path in DRIVER) and not _torch_is_cpu_only()


def _torch_is_cpu_only() -> bool:
    """A CPU build of torch says so in its version (`2.13.0+cpu`), which pip's metadata tells without importing it."""
    try:
        return importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False


def nvidia_smi() -> list[Gpu]:
    """Every GPU the driver knows; a first call may wait for the driver to start."""
    command = shutil.which("nvidia-smi")
    if command is None:
        raise PlanError("hardware=here", "there is an NVIDIA driver but no nvidia-smi to ask", INSTEAD)
    query = [command, "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        asked = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (subprocess.SubprocessError, OSError) as error:
        said = (getattr(error, "stdout", None) or str(error)).strip().splitlines()[0]
        raise PlanError("hardware=here", f"nvidia-smi failed: {said}", INSTEAD) from error
    return parse(asked.stdout)


def parse(answer: str) -> list[Gpu]:
    """GPUs out of nvidia-smi's CSV; memory is in MiB there."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(answer.splitlines()) if row]
    try:
        return [Gpu(number, uuid, name, int(mib) * MIB) for number, uuid, name, mib in rows]
    except ValueError as error:  # such as [N/A] memory on an integrated GPU
        raise PlanError("hardware=here", f"nvidia-smi answered {answer.strip()!r}", INSTEAD) from error


def visible(gpus: list[Gpu], chosen: str | None) -> list[Gpu]:
    """The GPUs a CUDA program sees: indices or UUID prefixes, in order, up to the first that names none (CUDA's rule)."""
    if chosen is None:
        return gpus
    seen: list[Gpu] = []
    for word in (part.strip() for part in chosen.split(",")):
        if word.startswith("MIG-"):
            raise PlanError("hardware=here", "CUDA_VISIBLE_DEVICES names a MIG slice", "type hardware=h100x1 hardware.memory_bytes=<the slice's>")
        match = [gpu for gpu in gpus if gpu.number == word or (word.startswith("GPU-") and gpu.uuid.startswith(word))]
        if len(match) != 1:
            break
        seen += match
    return seen


def cpu_name() -> str:
    """The processor's name as Linux tells it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor() or platform.machine())


def cpu_count() -> int:
    """Cores this process may use: affinity and every enclosing cgroup's quota, rounded down, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    allowed = [text for folder in cgroups("cpu") for text in (_text(folder, "cpu.max"), _text(folder, "cpu.cfs_quota_us", "cpu.cfs_period_us"))]
    return max(1, min([cores, *(int(share) for share in map(quota, allowed) if share is not None)]))


def quota(text: str) -> float | None:
    """Cores out of 'microseconds-allowed microseconds-per-period'; `max`, -1 and silence mean no limit."""
    match text.split():
        case [allowed, period] if allowed.isdigit() and period.isdigit() and int(period) > 0:
            return int(allowed) / int(period)
    return None


def host_memory_bytes() -> int:
    """Physical memory, or the least limit of an enclosing cgroup where that is less."""
    try:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError) as error:
        raise PlanError("hardware=here", "this operating system does not tell its memory", "name the machine, such as hardware=cpu") from error
    limits = [text for folder in cgroups("memory") for text in (_text(folder, "memory.max"), _text(folder, "memory.limit_in_bytes"))]
    return min([physical, *(int(limit) for limit in limits if limit.isdigit() and int(limit) > 0)])


def cgroups(controller: str, own: Path = Path("/proc/self/cgroup"), root: Path = CGROUP) -> list[Path]:
    """This process's cgroup folder for `memory` or `cpu` and all folders above it: each may hold a limit (cgroup v1 and v2)."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return []
    folders: dict[Path, None] = {}
    for _, names, path in lines:
        if names and controller not in names.split(","):
            continue
        top = root / names if names else root  # v1 mounts a tree per controller set, v2 has one
        for base in (top, root / controller):
            leaf = base / path.lstrip("/")
            folders.update(dict.fromkeys([leaf, *(folder for folder in leaf.parents if folder.is_relative_to(base))]))
    return list(folders)


def _text(folder: Path, *names: str) -> str:
    """A cgroup's files joined by a space, or '' where this system has none of that name: having no limit is not a failure."""
    try:
        return " ".join((folder / name).read_text().strip() for name in names)
    except OSError:
        return ""
