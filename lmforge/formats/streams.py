"""Files written as a stream under a temporary name: whole and in place once committed, gone when discarded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray


class _Stream:
    """A file in the making: `commit` puts it in place, `discard` leaves nothing; a `with` block ends in one of them."""

    def __init__(self, path: Path) -> None:
        self.path, self.length = path, 0
        self._temporary = path.with_name(path.name + ".tmp")
        self._file: BinaryIO = self._temporary.open("wb")

    def commit(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)

    def discard(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.commit()
        else:
            self.discard()


class ArrayStream(_Stream):
    """A one-dimensional .npy file of a length known only at the end."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        super().__init__(path)
        self.dtype = dtype
        self._header()

    def _header(self) -> None:
        # numpy leaves room in a header for the first axis to grow, so the final one overwrites the first in place.
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, values: NDArray[Any]) -> None:
        self._file.write(np.ascontiguousarray(values, dtype=self.dtype).tobytes())
        self.length += len(values)

    def commit(self) -> None:
        end = self._file.tell()
        self._file.seek(0)
        self._header()
        if end != self._file.tell() + self.length * self.dtype.itemsize:
            raise RuntimeError(f"{self.path}: the header changed its size")
        super().commit()


class LineStream(_Stream):
    """A .jsonl file: one JSON value a line."""

    def append(self, values: list[Any]) -> None:
        self._file.writelines(f"{json.dumps(value, ensure_ascii=False)}\n".encode() for value in values)
        self.length += len(values)
