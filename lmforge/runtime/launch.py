"""Where a job runs: in this process on one device, by torchrun on several. Ranks read the job as JSON, so nothing is pickled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from lmforge.codec import encode
from lmforge.compiler.emit import Job
from lmforge.errors import LmforgeError, RunError
from lmforge.plan import read_step
from lmforge.runtime.workspace import write_json
from lmforge.step import Report

JOB, RESULT, EVENTS = "job.json", "result.json", "events.jsonl"


def launch(job: Job, report: Report) -> dict[str, Any]:
    """Run the job; returns its metrics."""
    return job.run(report) if job.step.placement.devices == 1 else _ranks(job, report)


def _ranks(job: Job, report: Report) -> dict[str, Any]:
    """One process per device through torch.distributed.run; rank 0's report comes back as lines of JSON."""
    folder, devices = job.folder, job.step.placement.devices
    write_json(folder / JOB, {"step": encode(job.step), "folder": str(folder), "inputs": {kind: str(path) for kind, path in job.inputs.items()}})
    for name in (RESULT, EVENTS):
        (folder / name).unlink(missing_ok=True)
    (folder / EVENTS).touch()
    threads = str(max(1, (os.cpu_count() or 1) // devices))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}", "-m", "lmforge.runtime.worker", str(folder)]
    with (folder / "ranks.log").open("w") as log:
        ranks = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)})
        try:
            _follow(ranks, folder / EVENTS, report)
        except BaseException:
            ranks.terminate()
            ranks.wait()
            raise
    result = json.loads((folder / RESULT).read_text()) if (folder / RESULT).is_file() else {}
    if ranks.returncode != 0 or "metrics" not in result:
        raise RunError(job.step.name, result.get("error") or f"a rank ended with code {ranks.returncode}", f"its output is in {folder / 'ranks.log'}")
    for name in (JOB, RESULT, EVENTS):
        (folder / name).unlink(missing_ok=True)
    metrics: dict[str, Any] = result["metrics"]
    return metrics


def _follow(ranks: subprocess.Popen[bytes], events: Path, report: Report) -> None:
    """Pass on what rank 0 says until the ranks end."""
    pending = ""
    with events.open() as handle:
        while True:
            ended = ranks.poll() is not None
            for line in handle:
                pending += line  # a line may arrive in two pieces
                if pending.endswith("\n"):
                    verb, arguments = json.loads(pending)
                    getattr(report, verb)(*arguments)
                    pending = ""
            if ended:
                return
            try:
                ranks.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                continue


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


def worker(folder: Path) -> int:
    """What each rank runs. The first rank to fail leaves its own message; the others only end."""
    plain = json.loads((folder / JOB).read_text())
    job = Job(step=read_step(plain["step"]), folder=folder, inputs={kind: Path(path) for kind, path in plain["inputs"].items()})
    first = os.environ["RANK"] == "0"
    try:
        metrics = job.run(FileReport(folder / EVENTS) if first else Report())
    except LmforgeError as error:
        if not (folder / RESULT).is_file():
            write_json(folder / RESULT, {"error": "; ".join(str(problem) for problem in error.problems)})
        return 2
    if first:
        write_json(folder / RESULT, {"metrics": metrics})
    return 0
