"""The resumable state of a run: one file of tensors and an index that names it with its SHA-256.

    state/index.json    {"check", "file", "bytes", "sha256", "step"}; `check` is the SHA-256 of the rest
    state/step-120.pt   weights, optimizer, loss scale, interval sums; read with weights_only=True

Both are written beside their final place and renamed, the index last, and the old file goes after that. So a run killed at any moment, or
a full disk, leaves the last good state. Randomness and data order are functions of the step and need no state.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor, nn

from lmforge.codec import canonical
from lmforge.errors import CheckpointError, RunError

INDEX = "index.json"
READ_BYTES = 2**22


class _Hashing:
    """A file to write to that hashes what passes, and keeps the first error: torch's zip writer hides it behind one of its own."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256, self.bytes = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def save(folder: Path, step: int, payload: dict[str, Any]) -> None:
    """Replace the state in `folder`. RunError where the disk is full or the folder cannot be written; the previous state is then intact."""
    name = f"step-{step}.pt"
    temporary = folder / (name + ".tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder, keep=_named(folder))
        index = {"file": name, "step": step, **_write_tensors(temporary, payload)}
        os.replace(temporary, folder / name)
        _write_index(folder, index)
        _sweep(folder, keep=name)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        what = f"cannot write the training state: {error.strerror or error}"
        raise RunError(str(folder), what, "the last good state is kept; make room there, then run again") from error


def _write_tensors(path: Path, payload: dict[str, Any]) -> dict[str, Any]:
    """Write and flush to the disk; returns the size and SHA-256 of what was written."""
    with path.open("wb") as file:
        hashing = _Hashing(file)
        try:
            torch.save(payload, cast(BinaryIO, hashing))
        except RuntimeError as error:
            raise hashing.error or error from error
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": hashing.bytes, "sha256": hashing.sha256.hexdigest()}


def _write_index(folder: Path, index: dict[str, Any]) -> None:
    temporary = folder / (INDEX + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps({**index, "check": _check(index)}))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / INDEX)
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)  # the renames themselves
    finally:
        os.close(directory)


def _check(index: dict[str, Any]) -> str:
    return hashlib.sha256(canonical({key: value for key, value in index.items() if key != "check"}).encode()).hexdigest()


def _named(folder: Path) -> str:
    """The file that a good index names, or an empty string."""
    return str(_read_index(folder)["file"]) if (folder / INDEX).exists() else ""


def _sweep(folder: Path, keep: str) -> None:
    for path in folder.glob("step-*.pt*"):
        if path.name != keep:
            path.unlink()


def load(folder: Path) -> dict[str, Any] | None:
    """The payload last saved, tensors on the CPU; None where nothing was. CheckpointError naming the file that is cut, changed or unreadable."""
    if not (folder / INDEX).exists():
        return None
    index = _read_index(folder)
    path = folder / index["file"]
    try:
        size, sha256 = path.stat().st_size, _sha256(path)
    except OSError as error:
        raise _broken(path, f"cannot be read ({error.strerror})") from error
    if size != index["bytes"]:
        raise _broken(path, f"has {size:,} bytes of {index['bytes']:,}")
    if sha256 != index["sha256"]:
        raise _broken(path, "is damaged: its SHA-256 is not the one in index.json")
    try:
        payload: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise _broken(path, f"cannot be read ({str(error).splitlines()[0]})") from error
    return payload


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        good = index["check"] == _check(index) and Path(index["file"]).name == index["file"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(path, "is not readable") from error
    if not good:
        raise _broken(path, "is damaged: its checksum does not fit")
    return index  # type: ignore[no-any-return]  # its checksum says it is what `_write_index` wrote


def _sha256(path: Path) -> str:
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(READ_BYTES):
            sha256.update(data)
    return sha256.hexdigest()


def _broken(path: Path, what: str) -> CheckpointError:
    return CheckpointError(str(path), what, f"remove the folder {path.parent} to start this step again")


def weights(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: trainable parameters and persistent buffers. Frozen weights come from where they came from before."""
    changing = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    changing |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    return {name: value for name, value in model.state_dict().items() if name in changing}


def put_weights(model: nn.Module, saved: dict[str, Tensor], where: Path) -> None:
    """Copy saved weights into a model. CheckpointError where they are not this model's."""
    current = weights(model)
    shapes = [{name: tuple(value.shape) for name, value in one.items()} for one in (current, saved)]
    if shapes[0] != shapes[1]:
        name = min(name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name))
        what = f"was made by another model: {name} is {shapes[1].get(name)}, not {shapes[0].get(name)}"
        raise CheckpointError(str(where), what, f"remove the folder {where}")
    with torch.no_grad():
        for name, value in current.items():
            value.copy_(saved[name])
