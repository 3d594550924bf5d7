"""One rank's shards in one safetensors file, each with where it lies in its tensor: what torch's HuggingFaceStorageReader reshards.

torch's own HuggingFaceStorageWriter builds the file in memory, after a copy of every tensor to the host, and hashes nothing. This writes one tensor
after the other and hashes on the way, so a state as large as the host's memory can be written.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lmforge.training.state.index import File

DTYPES = {  # torch's names to those of safetensors
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
OFFSETS = "DCP_SHARDING_INFO"  # torch.distributed.checkpoint's key in the header: {name: {"saved_offsets": [...]}}


@dataclass(frozen=True)
class Shard:
    """A part of a tensor, and where it begins in it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    read: Callable[[], Tensor]  # the values, on any device

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Hashing:
    """A file to write to that hashes what passes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.sha256.update(data)
        self.bytes += len(data)


def write_shards(path: Path, shards: Sequence[Shard]) -> File:
    """Write and flush to the disk; returns the size and SHA-256 of what was written. OSError where it cannot be."""
    ordered = sorted(shards, key=lambda one: (-one.dtype.itemsize, one.name))  # the widest first: each then begins at a multiple of its width
    with path.open("xb") as file:
        hashing = _Hashing(file)
        hashing.write(_header(ordered))
        for one in ordered:
            value = one.read().detach().to("cpu").contiguous()
            hashing.write(value.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": hashing.bytes, "sha256": hashing.sha256.hexdigest()}


def _header(shards: Sequence[Shard]) -> bytes:
    """Eight bytes of length and the JSON header (huggingface.co/docs/safetensors), padded so that the tensors begin at a multiple of 8."""
    offsets = {one.name: {"saved_offsets": one.offsets} for one in shards}
    header: dict[str, object] = {"__metadata__": {OFFSETS: json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}}
    end = 0
    for one in shards:
        begin, end = end, end + one.bytes
        header[one.name] = {"dtype": DTYPES[one.dtype], "shape": one.shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
