"""Errors of the disk as one line that a user can act on."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from lmforge.errors import RunError

OF_A_DISK = (errno.ENOSPC, errno.EROFS, errno.EDQUOT)


@contextlib.contextmanager
def readable(step: str, output: Path) -> Iterator[None]:
    """RunError for an OSError that names a file, or that only a disk gives; any other, such as a socket's, passes."""
    try:
        yield
    except OSError as error:
        if error.errno is None or (error.filename is None and error.errno not in OF_A_DISK):
            raise
        raise RunError(step, f"{error.strerror}: {error.filename or output}", "make room or mend the folder and type the same again") from error
