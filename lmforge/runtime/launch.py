"""Where a job runs: in this process on one device, on ranks of its own on several; one rank's failure ends them all.

`launch` starts the ranks itself, or with `company` (the processes of torchrun or Slurm) one in each of them. Rank 0's report is followed,
the others are silent. Whatever happens, no rank is left when `launch` returns or raises.
"""

from __future__ import annotations

import contextlib
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from lmforge.codec import encode
from lmforge.compiler.emit import Job
from lmforge.errors import LmforgeError
from lmforge.parallel.nodes import Several
from lmforge.plan import Step
from lmforge.runtime.events import EVENTS, Lines
from lmforge.runtime.ranks import FOLDER, INTERRUPTED, Crash, Outcome, Rank, cause, environment, first_line
from lmforge.stage.base import TrainingStage
from lmforge.step import Report

MEET_S = 60.0  # for ranks to find the store at which they meet
AFTER_FAILURE_S = 5.0  # for the others to end by themselves once one has failed: longer than a lost connection takes to show, and their cause
TOGETHER_S = 2.0  # between the first and the last process that a scheduler's SIGTERM, which it sends to all, comes to
POLL_S = 0.2


class Away(Protocol):
    """The ranks of one start that other processes hold."""

    def look(self) -> Sequence[Outcome]:
        """Those that have ended since the last call."""

    def terminate(self) -> None:
        """Ask them all to stop."""

    def kill(self) -> None:
        """End them all."""


class Company(Protocol):
    """Processes that torchrun or Slurm started beside this one, which is the first of them."""

    address: str  # of this machine, as the others reach it

    def numbers(self) -> tuple[int, int, int]:
        """How many there are, how many on this machine, and which machine this is."""

    def start(self, job: dict[str, Any], folder: Path, port: int, attempt: int) -> Away:
        """Have each of them start its rank; they meet at this machine's `port`."""


def launch(job: Job, report: Report, company: Company | None = None, attempt: int = 0) -> dict[str, Any]:
    """Run the job; returns its metrics. Raises the failing rank's own error, or Crash for a rank that was killed or failed by a foreign one.

    What is tried again runs in a process of its own on one device too: an error may leave a GPU unusable to the process that met it.
    """
    if job.step.placement.devices == 1 and attempt == 0:
        return _here(job, report)
    plain = {"step": encode(job.step), "inputs": {kind: str(path) for kind, path in job.inputs.items()}}
    file = job.folder / EVENTS
    file.write_text("")
    with file.open() as events, _started(job, plain, company, attempt) as crew:
        lines = Lines(events, report)
        try:
            crew.follow(lines)
        finally:
            crew.kill()
            lines.pass_on()
            file.unlink()
    return _metrics(job, crew)


def _here(job: Job, report: Report) -> dict[str, Any]:
    """In this process. A foreign error of a step that may be tried again goes whole into the log that a rank would have, and is a Crash."""
    try:
        return job.run(report)
    except (LmforgeError, OSError):
        raise
    except Exception as error:
        if not allowed(job.step):
            raise
        log = job.folder / FOLDER / "0.log"
        log.parent.mkdir(exist_ok=True)
        log.write_text(traceback.format_exc(), encoding="utf-8")
        crash = Crash(job.step.name, f"{type(error).__name__}: {first_line(error)}", f"the whole of it is in {log}")
    raise crash  # out here it holds no frame of the step, whose memory the next attempt needs


def allowed(step: Step) -> int:
    """How often a step may be tried again after a crash."""
    return _restarts(step.spec) if isinstance(step.spec, TrainingStage) else 0


def _restarts(stage: TrainingStage) -> int:
    return stage.parallel.max_restarts


def grace(step: Step) -> float:
    """Seconds that its ranks have once they are asked to stop, and the last of them once rank 0 is through; a step that trains nothing has no ranks."""
    return _grace(step.spec) if isinstance(step.spec, TrainingStage) else 0.0


def _grace(stage: TrainingStage) -> float:
    return stage.parallel.grace_s


def _metrics(job: Job, crew: Crew) -> dict[str, Any]:
    """Of rank 0, where all of them are through; else the error of the one that the others follow from."""
    ended = list(crew.ended.values())
    failure, stopped = cause(ended), any(one.code == INTERRUPTED for one in ended)
    if failure and failure.code == -signal.SIGTERM:
        time.sleep(TOGETHER_S)  # where a scheduler sent it, this process gets it too, as KeyboardInterrupt
    if failure and failure.follows and (silent := crew.left()) and not stopped:
        log = job.folder / FOLDER / f"{silent[0]}.log"
        raise Crash(job.step.name, f"rank {silent[0]} did not answer rank {failure.rank} ({_waited(job.step)})", f"its output is in {log}")
    if failure and not (failure.follows and stopped):
        raise failure.error(job.step.name)
    if stopped:
        raise KeyboardInterrupt
    metrics: dict[str, Any] = crew.ended[0].word["metrics"]
    return metrics


def _waited(step: Step) -> str:
    """How long ranks wait for each other, as it is typed."""
    assert isinstance(step.spec, TrainingStage)
    parallel = step.spec.parallel
    return f"parallel.timeout_s={parallel.timeout_s:g}" if isinstance(parallel, Several) else ""


@contextlib.contextmanager
def _started(job: Job, plain: dict[str, Any], company: Company | None, attempt: int) -> Iterator[Crew]:
    """The ranks, and the store at which they meet: this process keeps it, as torchrun does, on a port that the system picks."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    devices = job.step.placement.devices
    crew = Crew([], None, devices, grace(job.step))
    if devices == 1:
        crew.here = [Rank(0, job.folder, plain, {}, attempt)]
        yield crew
        return
    address = company.address if company else "127.0.0.1"
    store = TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=MEET_S))
    world, local, node = company.numbers() if company else (devices, devices, 0)
    try:
        if company:
            crew.away = company.start(plain, job.folder, store.port, attempt)
        for rank in range(1 if company else devices):
            crew.here.append(Rank(rank, job.folder, plain, environment(rank, world, rank, local, node, address, store.port), attempt))
        yield crew
    finally:
        crew.kill()
        del store


class Crew:
    """All ranks of one start: those of this process, and those of others."""

    def __init__(self, here: list[Rank], away: Away | None, size: int, grace_s: float) -> None:
        self.here, self.away, self.size, self.grace_s = here, away, size, grace_s
        self.ended: dict[int, Outcome] = {}

    def follow(self, lines: Lines) -> None:
        """Pass on what rank 0 says until all have ended, or one has failed and the others had their time. On Ctrl-C or SIGTERM they are
        asked once to stop, and followed until they have; ranks that ended well all the same, or could not keep what they did, are heard."""
        try:
            while self._running() and not self._over():
                lines.pass_on()
                time.sleep(POLL_S)
        except KeyboardInterrupt:
            self._stop(lines)
            if not self._settled():
                raise

    def _stop(self, lines: Lines) -> None:
        for rank in self.here:
            rank.terminate()
        if self.away:
            self.away.terminate()
        deadline = time.monotonic() + self.grace_s
        while self._running() and not cause(self.ended.values()) and time.monotonic() < deadline:
            lines.pass_on()
            time.sleep(POLL_S)

    def _settled(self) -> bool:
        """Whether all ended well though they were asked to stop, or one says what it could not keep."""
        if failure := cause(self.ended.values()):
            return "problems" in failure.word
        return not self.left() and not any(one.code for one in self.ended.values())

    def _running(self) -> bool:
        found = [rank.poll() for rank in self.here if rank.number not in self.ended]
        for one in [*found, *(self.away.look() if self.away else ())]:
            if one is not None:
                self.ended[one.rank] = one
        return len(self.ended) < self.size

    def _over(self) -> bool:
        """Whether the others have had their time: since the first failure, or since rank 0 was through with all its work."""
        failures = [one.at for one in self.ended.values() if one.failed]
        if failures:
            return time.time() - min(failures) > AFTER_FAILURE_S
        first = self.ended.get(0)
        if first is None or time.time() - first.at < self.grace_s:
            return False
        what = f"did not end within parallel.grace_s={self.grace_s:g} of rank 0"
        raise Crash(f"rank {self.left()[0]}", what, "its output is in the step's folder under ranks/")

    def left(self) -> list[int]:
        """Ranks that were never seen to end."""
        return sorted(set(range(self.size)) - self.ended.keys())

    def kill(self) -> None:
        """End those that are left."""
        if self.away and len(self.ended) < self.size:
            self.away.kill()
        for rank in self.here:
            rank.kill()
            if rank.number not in self.ended and (outcome := rank.poll()) and outcome.word:  # it had said why, and was slow to end
                self.ended[rank.number] = outcome
