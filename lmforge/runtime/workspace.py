"""The store: steps/<name>-<digest>/ shared by every experiment. A folder with step.json is a finished step; one without is not."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lmforge.codec import encode
from lmforge.errors import RunError
from lmforge.explain import Status, changes
from lmforge.formats import store
from lmforge.plan import Plan, Step

MEASURED = "measured"  # of a step's metrics, what is held against its predicted cost


class Workspace:
    """One output folder."""

    def __init__(self, output: str | Path) -> None:
        self.output = Path(output)

    def prepare(self) -> None:
        """Make the folder and prove that it can be written; RunError in one line where it cannot."""
        probe = store.steps(self.output) / f".probe-{os.getpid()}"
        try:
            probe.parent.mkdir(parents=True, exist_ok=True)
            (self.output / ".cache").mkdir(exist_ok=True)
            probe.write_bytes(b"x" * 4096)
            probe.unlink()
        except OSError as error:
            raise RunError("output", f"cannot write to {self.output}: {error.strerror}", "type output=<a folder with room that you may write>") from error

    def folder(self, step: Step) -> Path:
        """The step's folder; a finished one of the same digest counts whatever name it was made under."""
        mine = store.steps(self.output) / f"{step.name}-{step.digest}"
        if not (mine / store.STEP_FILE).is_file():
            for other in store.steps(self.output).glob(f"*-{step.digest}"):
                if (other / store.STEP_FILE).is_file():
                    return other
        return mine

    def is_done(self, step: Step) -> bool:
        """Has this very step finished?"""
        return (self.folder(step) / store.STEP_FILE).is_file()

    def record(self, step: Step) -> dict[str, Any]:
        """What a finished step wrote of itself."""
        return store.read_json(self.folder(step) / store.STEP_FILE)

    def statuses(self, plan: Plan) -> dict[str, Status]:
        """done, partial (a resumable state is there), stale (done for other keys) or new, for each step."""
        return {step.name: self.status(step) for step in plan.steps}

    def status(self, step: Step) -> Status:
        """The status of one step, and why."""
        if self.is_done(step):
            return Status("done")
        if (self.folder(step) / store.STATE_INDEX).is_file():
            return Status("partial", "goes on from its last state")
        older = self.last_of(step)
        return Status("stale", _why(older, step)) if older else Status("new")

    def last_of(self, step: Step) -> dict[str, Any] | None:
        """The latest finished step of the same name."""
        if not store.steps(self.output).is_dir():
            return None
        files = [file for file in store.steps(self.output).glob(f"{step.name}-*/{store.STEP_FILE}") if file.parent.name.rpartition("-")[0] == step.name]
        return store.read_json(max(files, key=lambda file: file.stat().st_mtime)) if files else None

    @contextlib.contextmanager
    def lock(self, step: Step, say: Callable[[str], None]) -> Iterator[None]:
        """One process makes a step; others wait, and say so. The kernel lets go when the holder dies, however it dies."""
        folder = store.steps(self.output) / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / step.digest).open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"{step.name}: another process is making it; waiting")
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def clean(self, step: Step) -> Path:
        """The step's folder, ready to run in: what an interrupted run left stays only where a state says how to go on from it."""
        folder = self.folder(step)
        if not (folder / store.STATE_INDEX).is_file():
            shutil.rmtree(folder / step.produces, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def finish(self, step: Step, metrics: Mapping[str, Any], seconds: float, versions: Mapping[str, str], machine: str | None = None) -> None:
        """Write step.json, last and atomically: from here on the step is done. `machine` is the fingerprint of the one that it ran on."""
        record = {
            "name": step.name,
            "digest": step.digest,
            "step": encode(step),
            "identity": encode(step.spec, identity=True),
            "metrics": {name: value for name, value in metrics.items() if name != MEASURED},
            "predicted": encode(step.cost),
            "measured": {"seconds": round(seconds, 3), **measured(step, metrics), "machine": machine},
            "versions": dict(versions),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        folder = self.folder(step)
        write_json(folder / store.STEP_FILE, record)
        shutil.rmtree(folder / "state", ignore_errors=True)  # only now is there nothing left to go on from

    def open_run(self, plan: Plan) -> Path:
        """A new folder under runs/, with the plan in it."""
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for attempt in range(1000):
            folder = store.runs(self.output) / f"{stamp}{f'-{attempt}' if attempt else ''}-{plan.experiment.name}"
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                continue
            write_json(folder / "plan.json", plan.to_json())
            return folder
        raise RunError("output", f"no free name for a run under {store.runs(self.output)}", "type output=<another folder>")

    def run_of(self, plan: Plan) -> Path | None:
        """The latest finished run of the same experiment made of the very same steps."""
        steps = [self.folder(step).name for step in plan.steps]
        for file in sorted(store.runs(self.output).glob(f"*-{plan.experiment.name}/{store.RUN_FILE}"), reverse=True):
            if store.read_json(file)["steps"] == steps:
                return file.parent
        return None

    def close_run(self, folder: Path, plan: Plan, metrics: Mapping[str, Any]) -> None:
        """The manifest: which steps the run is made of, and the figures of each."""
        steps = [self.folder(step).name for step in plan.steps]
        write_json(folder / store.RUN_FILE, {"experiment": plan.experiment.name, "steps": steps, "metrics": dict(metrics)})


def measured(step: Step, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What a training says of itself, with the FLOPs of the tokens it really saw, by the plan's own convention."""
    if MEASURED not in metrics:
        return {}
    cost, tokens = step.cost, metrics["tokens"]
    flops = cost.train_flops / cost.tokens * tokens if cost.train_flops is not None and cost.tokens else None
    return {**metrics[MEASURED], "tokens": tokens, "train_flops": flops, "train_seconds": round(metrics["train_s"], 3)}


def write_json(file: Path, value: Any) -> None:
    """Atomic: a reader sees the old text or the new one."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as handle:
        json.dump(value, handle, indent=1, ensure_ascii=False)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, file)


def _why(older: Mapping[str, Any], step: Step) -> str:
    if older["step"]["content"] != step.content:
        return f"its {'model' if step.stage == 'pretrain' else 'data'} changed"
    keys = [f"{key} {left} -> {right}" for key, left, right in changes(older.get("identity", {}), encode(step.spec, identity=True))]
    return ", ".join(keys[:3]) or "what it consumes changed"
