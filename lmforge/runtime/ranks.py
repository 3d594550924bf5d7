"""The processes of one step's ranks: each reads its job from its standard input, as JSON, and leaves a word on how it ended.

A rank is a process of its own whoever gave it (this command, torchrun or Slurm), because one that is killed, or hangs in a collective,
can neither speak for itself nor end itself. None outlives the process that started it, however that one ends:
- it inherits the reading end of a pipe as its standard input; the kernel closes the other end with the starter, and a rank that reads
  the end of it ends at once;
- it inherits its log as its output, which the starter has locked; the kernel keeps the lock until the rank has ended, and the next rank
  of that number waits for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmforge import errors
from lmforge.errors import LmforgeError, Problem, RunError

FOLDER = "ranks"  # inside the step's folder: a log and a word for each rank
FAILED, REFUSED, INTERRUPTED = 1, 2, 130
TEXT = 300  # characters of a foreign error's message


class Crash(RunError):
    """A rank was killed, or failed by an exception that is not ours: what a restart may cure. `reason` says which rank and how."""

    def __init__(self, where: str, what: str, instead: str = "") -> None:
        super().__init__(where, what, instead)
        self.reason = what


@dataclass(frozen=True)
class Outcome:
    """How a rank ended: its code (negative = killed by that signal), when, its log, and its word.

    The word is {"metrics"}, or {"kind", "problems"} for an error of ours, or {"exception", "text", "lost"} for any other, where `lost`
    means that what failed was a connection to other ranks; empty where the rank was killed.
    """

    rank: int
    code: int
    at: float  # seconds since 1970
    log: str
    word: Mapping[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether it ended by other means than its work's end or a signal to stop."""
        return self.code not in (0, INTERRUPTED)

    @property
    def follows(self) -> bool:
        """Whether this looks like what another rank's end does to a rank: a lost connection, or the abort of NCCL's watchdog."""
        return bool(self.word.get("lost")) or self.code == -signal.SIGABRT

    def error(self, step: str) -> LmforgeError:
        """What the user is told: the rank's own message."""
        if "problems" not in self.word:
            return Crash(step, self._reason(), f"its output is in {self.log}")
        suffix = f" (on rank {self.rank})" if self.rank else ""
        return unpacked(self.word, suffix)

    def _reason(self) -> str:
        if "exception" in self.word:
            return f"rank {self.rank}: {self.word['exception']}: {self.word['text']}"
        if self.code == -signal.SIGKILL:
            return f"rank {self.rank} was killed (signal 9): usually out of memory"
        if self.code < 0:
            return f"rank {self.rank} was killed (signal {-self.code}, {signal.Signals(-self.code).name})"
        return f"rank {self.rank} ended with code {self.code}"


def cause(outcomes: Iterable[Outcome]) -> Outcome | None:
    """The failure that the others follow from: the earliest that does not look like a consequence, else the earliest."""
    failed = [one for one in outcomes if one.failed]
    return min(failed, key=lambda one: (one.follows, one.at)) if failed else None


def first_line(error: BaseException) -> str:
    """What an error says, short enough for one line."""
    return (str(error).strip().splitlines() or [""])[0][:TEXT]


def packed(error: LmforgeError) -> dict[str, Any]:
    """An error of ours as plain data."""
    return {"kind": type(error).__name__, "problems": [[one.where, one.what, one.instead] for one in error.problems]}


def unpacked(plain: Mapping[str, Any], suffix: str = "") -> LmforgeError:
    """The error again, `suffix` said after what is wrong."""
    kind = getattr(errors, str(plain["kind"]), RunError)
    return kind.of([Problem(where, what + suffix, instead) for where, what, instead in plain["problems"]])


class Rank:
    """One rank at work on a job."""

    def __init__(self, number: int, folder: Path, job: Mapping[str, Any], environment: Mapping[str, str], attempt: int = 0) -> None:
        self.number = number
        self.log, self.word = folder / FOLDER / f"{number}.log", folder / FOLDER / f"{number}.json"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as log:
            fcntl.flock(log, fcntl.LOCK_EX)  # waits for a rank whose starter was killed a moment ago
            if attempt == 0:
                log.truncate(0)
            self.word.unlink(missing_ok=True)
            command = [sys.executable, "-m", "lmforge.runtime.worker", str(folder), str(number)]
            # In a session of its own: a Ctrl-C of the terminal comes to the starter alone, which passes on one signal.
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env={**os.environ, **environment}, start_new_session=True)
        with contextlib.suppress(BrokenPipeError):  # it ended already, and its code says how
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()

    def poll(self) -> Outcome | None:
        """How it ended; None while it runs."""
        code = self.process.poll()
        if code is None:
            return None
        word = json.loads(self.word.read_text(encoding="utf-8")) if self.word.is_file() else {}
        self.word.unlink(missing_ok=True)
        return Outcome(self.number, code, word.get("at", time.time()), str(self.log), word)

    def terminate(self) -> None:
        """Ask it to write its state and end."""
        self.process.terminate()

    def kill(self) -> None:
        """End it and the processes that it started, now."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()


def environment(rank: int, world: int, local: int, local_world: int, node: int, address: str, port: int) -> dict[str, str]:
    """What torch and Lightning read, as torchrun sets it: whoever gave the ranks, they look the same from inside.

    The store at `address:port` is the starter's (TORCHELASTIC_USE_AGENT_STORE), a new one for each start: no key of an earlier one is met.
    """
    threads = str(max(1, (os.cpu_count() or 1) // local_world))
    numbers = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": local_world, "GROUP_RANK": node, "MASTER_PORT": port}
    fixed = {"MASTER_ADDR": address, "TORCHELASTIC_RUN_ID": "lmforge", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads), **{name: str(value) for name, value in numbers.items()}, **fixed}
