"""Where a job runs: in this process on one device, by torchrun on several. Ranks read the job as JSON, so nothing is pickled.

Ranks never outlive their launcher, nor meet those of another one, however any of them ends:
- torchrun and the ranks inherit the reading end of a pipe as their standard input; the kernel closes the other end with the launcher,
  and a rank that reads the end of it ends at once.
- They inherit `ranks.log` as their output, which the launcher has locked; the kernel keeps the lock until the last of them has ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from lmforge.codec import encode
from lmforge.compiler.emit import Job
from lmforge.errors import LmforgeError, RunError
from lmforge.plan import read_step
from lmforge.runtime.workspace import write_json
from lmforge.step import Report
from lmforge.track.jsonl import plain

JOB, RESULT, EVENTS, LOG = "job.json", "result.json", "events.jsonl", "ranks.log"
GRACE_S = 60  # for ranks that were asked to stop: the running step and a state to disk
INTERRUPTED = 130


def launch(job: Job, report: Report) -> dict[str, Any]:
    """Run the job; returns its metrics."""
    return job.run(report) if job.step.placement.devices == 1 else _ranks(job, report)


def _ranks(job: Job, report: Report) -> dict[str, Any]:
    """One process per device through torch.distributed.run; rank 0's report comes back as lines of JSON."""
    folder = job.folder
    with (folder / LOG).open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)  # waits for ranks whose launcher was killed a moment ago
        log.truncate(0)
        write_json(folder / JOB, {"step": encode(job.step), "folder": str(folder), "inputs": {kind: str(path) for kind, path in job.inputs.items()}})
        for name in (RESULT, EVENTS):
            (folder / name).unlink(missing_ok=True)
        (folder / EVENTS).touch()
        with _start(folder, job.step.placement.devices, log) as ranks, (folder / EVENTS).open() as events:
            _follow(ranks, events, report)
    result = json.loads((folder / RESULT).read_text()) if (folder / RESULT).is_file() else {}
    if ranks.returncode != 0 or "metrics" not in result:
        raise RunError(job.step.name, result.get("error") or f"a rank ended with code {ranks.returncode}", f"its output is in {folder / LOG}")
    for name in (JOB, RESULT, EVENTS):
        (folder / name).unlink(missing_ok=True)
    metrics: dict[str, Any] = result["metrics"]
    return metrics


def _start(folder: Path, devices: int, log: TextIO) -> subprocess.Popen[bytes]:
    """torchrun in a session of its own: a Ctrl-C of the terminal comes to the launcher alone, which passes on one signal."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}", "-m", "lmforge.runtime.worker", str(folder)]
    threads = str(max(1, (os.cpu_count() or 1) // devices))
    env = {"OMP_NUM_THREADS": threads, **os.environ, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(GRACE_S)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=env, start_new_session=True)


def _follow(ranks: subprocess.Popen[bytes], events: TextIO, report: Report) -> None:
    """Pass on what rank 0 says until the ranks end. On Ctrl-C or SIGTERM they are asked once to stop, and followed until they have."""
    lines = _Lines(events, report)
    try:
        with _sigterm_interrupts():
            while ranks.poll() is None:
                lines.pass_on()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    ranks.wait(timeout=0.2)
    except BaseException:
        ranks.terminate()  # torchrun hands it to every rank, and waits GRACE_S for them
        with contextlib.suppress(subprocess.TimeoutExpired):
            ranks.wait(timeout=GRACE_S + 10)
        raise
    finally:
        ranks.kill()  # where it has not ended by now, as on a second Ctrl-C; its ranks end with the pipe
        lines.pass_on()


class _Lines:
    """The lines of rank 0's report, of which the last may be there in part."""

    def __init__(self, events: TextIO, report: Report) -> None:
        self.events, self.report, self.pending = events, report, ""

    def pass_on(self) -> None:
        """Say again what has come since the last call."""
        for line in self.events:
            self.pending += line
            if self.pending.endswith("\n"):
                verb, arguments = json.loads(self.pending)
                self.pending = ""
                getattr(self.report, verb)(*arguments)


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM as Ctrl-C, so that ranks write their state under a scheduler that takes the machine back; in the main thread, as Python has it."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class FileReport(Report):
    """Rank 0's report, as lines of JSON that the launcher follows."""

    def __init__(self, file: Path) -> None:
        self.handle = file.open("a", buffering=1)

    def _say(self, verb: str, *arguments: Any) -> None:
        self.handle.write(json.dumps([verb, arguments]) + "\n")

    def log(self, step: int, metrics: Any) -> None:
        """Metrics of one interval."""
        self._say("log", step, dict(metrics))

    def progress(self, done: int, total: int, text: str = "") -> None:
        """How far the step is."""
        self._say("progress", done, total, text)

    def sample(self, title: str, text: str) -> None:
        """A piece of text for people."""
        self._say("sample", title, text)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table for people."""
        self._say("table", title, list(columns), plain(rows))


def worker(folder: Path) -> int:
    """What each rank runs. The first rank to fail leaves its own message; the others only end."""
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    plain = json.loads((folder / JOB).read_text())
    job = Job(step=read_step(plain["step"]), folder=folder, inputs={kind: Path(path) for kind, path in plain["inputs"].items()})
    first = os.environ["RANK"] == "0"
    _own_device()
    try:
        metrics = job.run(FileReport(folder / EVENTS) if first else Report())
    except LmforgeError as error:
        if not (folder / RESULT).is_file():
            write_json(folder / RESULT, {"error": "; ".join(str(problem) for problem in error.problems)})
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    if first:
        write_json(folder / RESULT, {"metrics": metrics})
    return 0


def _own_device() -> None:
    """The GPU of this rank becomes "cuda" for all that runs before and after the strategy places its model."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def _end_with_launcher() -> None:
    """Wait for the end of the launcher's pipe, at which nobody is left to report to and a lock is no longer held: end this process at once."""
    while os.read(0, 1):
        continue
    os._exit(1)
