"""Which weights an adapter was trained on: a fingerprint of a checkpoint's tensors, without torch. It is kept in the adapter folder's base.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lmforge.errors import CheckpointError

BASE_FILE = "base.json"
WHOLE_BYTES = 2**32  # weights up to this size are hashed whole: some seconds
BLOCK_BYTES = 2**16  # of larger ones three blocks of every tensor, which any training changes


@dataclass(frozen=True)
class Base:
    """What a base is. `four_bit` holds how the adapter's training rounded it (QLoRA), or None."""

    fingerprint: str
    architecture: str
    four_bit: dict[str, Any] | None


@dataclass(frozen=True)
class _Tensor:
    name: str
    kind: str  # dtype and shape
    file: Path
    start: int  # in the file
    size: int  # bytes


def identify(folder: Path, whole_bytes: int = WHOLE_BYTES) -> tuple[str, str]:
    """(fingerprint, architecture) of a checkpoint folder.

    The fingerprint is a SHA-256 over name, dtype, shape and bytes of every tensor in the order of their names, so neither shards nor the writer of the
    files matter. Of weights over `whole_bytes` it covers the first, middle and last block of each tensor, and begins with `sampled-`. The architecture
    is a SHA-256 over names and shapes. CheckpointError for files that are no whole safetensors.
    """
    tensors = sorted(_tensors(folder), key=lambda one: one.name)
    sampled = sum(one.size for one in tensors) > whole_bytes
    content, shapes = hashlib.sha256(), hashlib.sha256()
    for one in tensors:
        line = f"{one.name} {one.kind}\n".encode()
        shapes.update(line)
        content.update(line)
        with one.file.open("rb") as file:
            for start, size in _blocks(one.size) if sampled else [(0, one.size)]:
                _feed(content, file, one.start + start, size)
    return ("sampled-" if sampled else "") + content.hexdigest(), shapes.hexdigest()


def write_base(folder: Path, base: Path, four_bit: dict[str, Any] | None) -> None:
    """Write base.json into an adapter folder."""
    fingerprint, architecture = identify(base)
    said = {"fingerprint": fingerprint, "architecture": architecture, "four_bit": four_bit}
    (folder / BASE_FILE).write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


def read_base(folder: Path) -> Base | None:
    """What base.json says; None for an adapter folder from elsewhere, which has none. CheckpointError where it cannot be read."""
    path = folder / BASE_FILE
    if not path.is_file():
        return None
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        found = Base(str(said["fingerprint"]), str(said["architecture"]), said["four_bit"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(str(path), f"cannot be read ({type(error).__name__})", "copy the adapter again from where it was made") from error
    if found.four_bit is not None and not _is_four_bit(found.four_bit):
        what = "four_bit is not null or quant_type nf4 or fp4 with double_quant true or false, and nothing else"
        raise CheckpointError(str(path), what, "copy the adapter again from where it was made")
    return found


def _is_four_bit(said: Any) -> bool:
    if not isinstance(said, dict) or said.keys() != {"quant_type", "double_quant"}:
        return False
    return said["quant_type"] in ("nf4", "fp4") and isinstance(said["double_quant"], bool)


def check_base(folder: Path, base: Path) -> None:
    """CheckpointError where the adapter in `folder` was trained on another base than `base`. An adapter without base.json is taken at its word."""
    said = read_base(folder)
    if said is None:
        return
    fingerprint, architecture = identify(base)
    if architecture != said.architecture:
        what = f"was trained on another base: its tensors have other names, shapes or dtypes than those of {base}"
        raise CheckpointError(str(folder), what, "give the checkpoint it was trained on")
    if fingerprint != said.fingerprint:
        what = f"was trained on another base: {said.fingerprint[:12]}, and {base} is {fingerprint[:12]}"
        raise CheckpointError(str(folder), what, "give the checkpoint it was trained on")


def _tensors(folder: Path) -> Iterator[_Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(str(folder), "has no safetensors file", "give a checkpoint folder with config.json and model.safetensors")
    for path in files:
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header: Any = json.loads(file.read(length)) if 0 < length <= path.stat().st_size else None
            for name, one in header.items():
                if name != "__metadata__":
                    start, end = one["data_offsets"]
                    yield _Tensor(name, f"{one['dtype']} {one['shape']}", path, 8 + length + start, end - start)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(str(path), "is truncated or no safetensors file", "restore it, or make the checkpoint again") from error


def _blocks(size: int) -> list[tuple[int, int]]:
    """The first, middle and last block of a tensor, as (start, size)."""
    if size <= 3 * BLOCK_BYTES:
        return [(0, size)]
    return [(start, BLOCK_BYTES) for start in (0, (size - BLOCK_BYTES) // 2, size - BLOCK_BYTES)]


def _feed(content: Any, file: BinaryIO, start: int, size: int) -> None:
    file.seek(start)
    while size > 0:
        data = file.read(min(size, 2**22))
        if not data:
            raise CheckpointError(file.name, "is truncated", "restore it, or make the checkpoint again")
        content.update(data)
        size -= len(data)
