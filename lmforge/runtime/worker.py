"""`python -m lmforge.runtime.worker FOLDER RANK`, the job on its standard input: one rank of a step."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmforge.compiler.emit import Job
from lmforge.errors import LmforgeError, RunError
from lmforge.plan import read_step
from lmforge.runtime.disk import readable
from lmforge.runtime.events import EVENTS, FileReport
from lmforge.runtime.ranks import FAILED, FOLDER, INTERRUPTED, REFUSED, first_line, packed
from lmforge.runtime.workspace import write_json
from lmforge.step import Report


def main(folder: Path, rank: int) -> int:
    """Run the job; leave a word on how that ended. An error ends the process at once, for leaving a process group may wait for the others."""
    faulthandler.enable()  # a crash in native code leaves its stack in the log
    job = _job(json.loads(sys.stdin.buffer.readline()), folder)
    threading.Thread(target=_end_with_starter, daemon=True).start()
    word = folder / FOLDER / f"{rank}.json"
    try:
        _own_device()
        with readable(job.step.name, folder):
            metrics = job.run(FileReport(folder / EVENTS) if rank == 0 else Report())
    except LmforgeError as error:
        _leave(word, packed(error))
        _end(REFUSED)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the whole of it into the log, a line of it for the starter
        traceback.print_exception(error)
        _leave(word, {"exception": type(error).__name__, "text": first_line(error), "lost": _lost(error)})
        _end(FAILED)
    _leave(word, {"metrics": metrics} if rank == 0 else {})
    return 0


def _job(plain: Mapping[str, Any], folder: Path) -> Job:
    return Job(step=read_step(plain["step"]), folder=folder, inputs={kind: Path(path) for kind, path in plain["inputs"].items()})


def _leave(word: Path, said: Mapping[str, Any]) -> None:
    write_json(word, {**said, "at": time.time()})


def _lost(error: BaseException) -> bool:
    """Whether a connection to other ranks failed: torch's own errors say so by their type, gloo's by the file they name."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "/gloo/" in str(error)


def _end(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _own_device() -> None:
    """The GPU of this rank becomes "cuda" for all that runs before and after the strategy places its model."""
    import torch

    if not torch.cuda.is_available():
        return
    local, seen = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= seen:
        raise RunError("parallel", f"local rank {local} sees {seen} GPU(s)", "let every rank of a node see all its GPUs (Slurm: --gpus-per-node)")
    torch.cuda.set_device(local)


def _end_with_starter() -> None:
    """Wait for the end of the starter's pipe, at which nobody is left to report to and a lock is no longer held: end this process at once."""
    while os.read(0, 1):
        continue
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
