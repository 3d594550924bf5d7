"""What `lmforge calibrate` measured on a machine: a small JSON beside the store, `<output>/calibration/<fingerprint>.json`.

Rates are what kernels got, not what a datasheet promises. A calibration belongs to the machine of its fingerprint; another machine's is named and ignored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lmforge.codec import decode, encode
from lmforge.errors import ConfigError, LmforgeError, RunError

if TYPE_CHECKING:
    from lmforge.hardware.nodes import Machine

FOLDER = "calibration"
FORMAT = 1
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Attention:
    """The fused kernel at one dtype, by FLOPs it has to do: half of the square where it is causal."""

    causal: float  # FLOP/s forward
    causal_backward: float  # rate of backward, over that of forward
    masked: float  # FLOP/s forward, with documents kept apart by a mask: whole squares
    masked_backward: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Measured rates of one process that has the whole machine (on cpu) or one GPU."""

    format: int
    fingerprint: str
    name: str
    accelerator: str
    threads: int  # of the process, on cpu
    devices: int  # GPUs, or cores
    units: int | None  # streaming multiprocessors of a GPU
    torch: str
    measured_at: str  # UTC
    matmul: Mapping[str, float]  # dtype -> FLOP/s
    attention: Mapping[str, Attention]  # dtype -> rates
    memory: float  # bytes/s of a kernel that only moves data
    update: float  # bytes/s of the fused AdamW, 28 a float32 element
    launch: float  # seconds that the host takes to start a kernel
    step: float  # seconds of a step on cpu that are no kernel's: the loop, its batch, clipping, logging; a GPU's host does them beside it
    loader: float  # tokens/s that one process reads and packs
    bandwidth: float | None  # bytes/s between two ranks in an all-reduce; None where there is one GPU
    latency: float | None  # seconds of a step of it
    residual: float  # a real step's time besides products and update, over what these kernels take alone
    noise: float  # (most - least) / median of that step's inner half
    learned: float  # measured over predicted seconds of finished steps on this machine, by all of the above
    learned_from: int  # of how many steps that is the median; 0 leaves it at 1

    def file(self, output: str | Path) -> Path:
        """Where it is kept."""
        return Path(output) / FOLDER / f"{self.fingerprint}.json"

    def save(self, output: str | Path) -> Path:
        """Write it; what was there is replaced whole."""
        file = self.file(output)
        make_folder(output)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(encode(self), indent=1) + "\n", encoding="utf-8")
        partial.replace(file)
        return file


def make_folder(output: str | Path) -> None:
    """Where calibrations are kept; RunError in one line where it cannot be made or written."""
    folder = Path(output) / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError("output", f"cannot write to {folder}: {error.strerror}", "type output=<a folder that you may write>") from error


def fingerprint(name: str, accelerator: str, memory_bytes: int, devices: int) -> str:
    """Of a GPU: its name and memory, however many there are. Of a CPU: its name, cores and memory. Memory to a GiB, for a kernel keeps some for itself."""
    parts = (accelerator, name, str(round(memory_bytes / GIB)), *([] if accelerator == "cuda" else [str(devices)]))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def read(file: Path) -> Calibration:
    """ConfigError in one line for what `calibrate` did not write."""
    instead = "delete it and type: python -m lmforge calibrate"
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(str(file), f"cannot be read as a calibration: {error}", instead) from error
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise ConfigError(str(file), "is no calibration of this version", instead)
    try:
        found: Calibration = decode(Calibration, plain, "")
    except LmforgeError as error:
        raise ConfigError(str(file), f"is no calibration: {error.problems[0]}", instead) from error
    numbers = [*found.matmul.values(), found.memory, found.update, found.launch, found.loader, found.residual, found.learned, *_rates(found)]
    if not found.matmul or min(numbers) <= 0 or found.threads < 1 or (found.bandwidth is not None and found.bandwidth <= 0):
        raise ConfigError(str(file), "is no calibration: a rate is not above 0", instead)
    if min(found.step, found.noise, found.latency or 0.0) < 0:
        raise ConfigError(str(file), "is no calibration: a time is below 0", instead)
    if missing := sorted(set(found.matmul) - set(found.attention)):
        raise ConfigError(str(file), f"is no calibration: it has no attention in {missing[0]}", instead)
    return found


def _rates(found: Calibration) -> list[float]:
    return [rate for one in found.attention.values() for rate in (one.causal, one.causal_backward, one.masked, one.masked_backward)]


def calibrated(machine: Machine, output: str | Path) -> tuple[Machine, str]:
    """The machine with what was measured on it, and a line of warning or ''.

    The file is looked for by the machine's fingerprint. One that says it is of another machine is named and ignored; where the machine is the one
    at hand (hardware=here) and only others were measured, they are named too. A described machine without one is nothing to warn of.
    """
    folder, own = Path(output) / FOLDER, machine.fingerprint
    file = folder / f"{own}.json"
    if file.is_file():
        found = read(file)
        if found.fingerprint == own:
            return dataclasses.replace(machine, calibration=found), ""
        return machine, _another(file, found, machine)
    return machine, ""


def strangers(machine: Machine, output: str | Path) -> str:
    """A line that names a calibration of another machine, where there is none of this one; '' where there is nothing to say."""
    folder = Path(output) / FOLDER
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    if not files or (folder / f"{machine.fingerprint}.json").is_file():
        return ""
    try:
        return _another(files[0], read(files[0]), machine)
    except ConfigError as error:  # of another machine, so that nothing hangs on it
        return f"{error.problems[0].where} is not used, and {error.problems[0].what}"


def _another(file: Path, found: Calibration, machine: Machine) -> str:
    theirs, ours = f"{found.name} ({found.devices} devices, {found.fingerprint})", f"{machine.name} ({machine.fingerprint})"
    return f"{file} was measured on {theirs} and not on {ours}: ignored; type python -m lmforge calibrate"
