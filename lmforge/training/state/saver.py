"""Saving a state on all ranks together, in line or beside the training."""

from __future__ import annotations

import contextlib
import threading
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save

from lmforge.errors import RunError
from lmforge.training.state.storage import Planner, Writer
from lmforge.training.state.together import world
from lmforge.training.state.tree import flatten


class Saver:
    """Writes states into `folder`. Every rank makes one and calls it alike; its collectives go by a gloo group of their own.

    With `background` a save returns when the tensors of this rank's share are copied to the host; the copies stay, for the next save to use again.
    """

    def __init__(self, folder: Path, *, background: bool) -> None:
        self.folder, self.background = folder, background
        self.group: Any = None
        self.copies: dict[str, Tensor] = {}
        self.thread: threading.Thread | None = None
        self.failed: BaseException | None = None

    def save(self, step: int, tree: Any) -> None:
        """Replace the state by `tree`: dicts, lists and tuples of tensors (plain or DTensor), numbers, text, bools and None.

        Ranks may hold different keys; plain tensors under one key must be the same on every rank that has it, and are written once. Waits for the save
        before it, and raises its error. RunError where the disk is full or the folder cannot be written; the previous state is then intact.
        """
        self.wait()
        if world() > 1 and self.group is None:
            self.group = dist.new_group(backend="gloo")  # of its own: a thread's collectives must not meet those of the training
        planner = Planner(*flatten(tree))
        writer = Writer(self.folder, step, self._copied if self.background else lambda name, value: value)
        if not self.background:
            _write(planner, writer, self.group)
            return
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self.thread = threading.Thread(target=self._run, args=(planner, writer, device), name="state", daemon=True)
        self.thread.start()
        writer.staged.wait()
        if not writer.planned:
            self.wait()  # the ranks could not even agree on a plan: all of them raise that here

    def wait(self) -> None:
        """Until no save is in flight; raises the error of the one that was."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        failed, self.failed = self.failed, None
        if failed is not None:
            raise failed

    def close(self) -> None:
        """`wait`, and give the process group back."""
        try:
            self.wait()
        finally:
            self.copies = {}
            if self.group is not None and dist.is_initialized():
                dist.destroy_process_group(self.group)
            self.group = None

    def _run(self, planner: Planner, writer: Writer, device: int | None) -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)  # a thread begins on the first one
            _write(planner, writer, self.group)
        except BaseException as error:  # noqa: BLE001  # raised by `wait`
            self.failed = error
        finally:
            writer.staged.set()

    def _copied(self, name: str, value: Tensor) -> Tensor:
        """A copy on the host, in pinned memory where the tensor is on a GPU, so that the copy runs at the bus's speed."""
        copy = self.copies.get(name)
        if copy is None or copy.shape != value.shape or copy.dtype != value.dtype:
            copy = self.copies[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        return copy.copy_(value, non_blocking=True)


def _write(planner: Planner, writer: Writer, group: Any) -> None:
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is no mistake
    try:
        save({}, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        with contextlib.suppress(OSError):
            writer.discard()
        _explain(writer.folder, error)


def _explain(folder: Path, error: CheckpointException) -> NoReturn:
    """Raise what went wrong on the lowest rank that failed: the same on every rank."""
    cause = error.failures[min(error.failures)][0]
    if not isinstance(cause, OSError):
        raise cause from error
    what = f"cannot write the training state: {cause.strerror or cause}"
    raise RunError(str(folder), what, "the last good state is kept; make room there, then run again") from error
