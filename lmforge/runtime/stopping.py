"""Signals that ask a run to stop: from a person (Ctrl-C), or from a scheduler that takes the machine back and starts the job again later.

A scheduler's signal is taken as Ctrl-C: the running step ends, a state is written, the command ends. Under Slurm the job then goes back
into the queue (`scontrol requeue`), as often as `parallel.max_restarts` allows.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from rich.console import Console

from lmforge.plan import Plan
from lmforge.runtime.launch import allowed

REQUEUE_S = 60.0  # for the controller to answer


class Asked:
    """Which signals came since this was made, whoever took them: a training step has handlers of its own."""

    def __init__(self) -> None:
        self._read, self._write = socket.socketpair()
        for end in (self._read, self._write):
            end.setblocking(False)
        self._came: set[int] = set()
        self.others: dict[int, Any] = {}  # handlers of whoever runs us (submitit), by signal

    def numbers(self) -> set[int]:
        """Their numbers."""
        with contextlib.suppress(BlockingIOError):
            while data := self._read.recv(4096):
                self._came |= set(data)
        return self._came

    @property
    def to_stop(self) -> bool:
        """Whether one of them asks to stop: what ends well all the same is kept, and nothing new begins."""
        return bool({signal.SIGINT, signal.SIGTERM} & self.numbers())

    def __enter__(self) -> Asked:
        self._before = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._before)


@contextlib.contextmanager
def signals() -> Iterator[Asked | None]:
    """SIGTERM as Ctrl-C, once; under Slurm SIGUSR1, and submitit's signal, as SIGTERM. In the main thread only, as Python has it."""
    if threading.current_thread() is not threading.main_thread():
        yield None
        return
    taken = {signal.SIGTERM: _interrupt_once(), **dict.fromkeys(_scheduler_signals(), _as_sigterm)}
    before = {number: signal.getsignal(number) for number in taken}
    with Asked() as asked:
        asked.others = {int(number): handler for number, handler in before.items() if callable(handler) and number != signal.SIGTERM}
        for number, handler in taken.items():
            signal.signal(number, handler)
        try:
            yield asked
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def noted() -> Iterator[list[int]]:
    """The signals that ask to stop, Ctrl-C too, are only written down: where another process tells this one when to end, or in what is not to be cut short."""
    came: list[int] = []
    numbers = [signal.SIGINT, signal.SIGTERM, *_scheduler_signals()]
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {number: signal.signal(number, lambda which, frame: came.append(which)) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _scheduler_signals() -> list[signal.Signals]:
    if "SLURM_JOB_ID" not in os.environ:
        return []
    submitit = f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"  # its own default
    return [signal.SIGUSR1, *([signal.Signals[submitit]] if "SUBMITIT_EXECUTOR" in os.environ else [])]


def _interrupt_once() -> Any:
    """A scheduler sends SIGTERM more than once, and the later ones must not cut short what the first began."""
    came = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if not came:
            came = True
            raise KeyboardInterrupt

    return interrupt


def _as_sigterm(number: int, frame: FrameType | None) -> None:
    os.kill(os.getpid(), signal.SIGTERM)  # for whoever takes that one now


def requeue(plan: Plan, asked: Asked | None, console: Console) -> None:
    """After a scheduler's signal: back into the queue, by whoever runs us (submitit) or by ourselves; never after a person's Ctrl-C."""
    came = asked.numbers() if asked else set()
    if asked is None or signal.SIGINT in came or not came or "SLURM_JOB_ID" not in os.environ:
        return
    for number in came & asked.others.keys():
        asked.others[number](number, None)  # does not return where it requeues
    done, most = int(os.environ.get("SLURM_RESTART_COUNT", "0")), restarts(plan)
    if done >= most:
        console.print(f"this job was started again {done} times already: not requeued (parallel.max_restarts={most})", highlight=False)
        return
    said = _scontrol(_job())
    line = f"job {_job()}: {said}" if said else f"job {_job()} is requeued (restart {done + 1} of {most}) and goes on from the last state"
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def restarts(plan: Plan) -> int:
    """How often this plan may be started again: the most that a step of it allows."""
    return max((allowed(step) for step in plan.steps), default=0)


def _job() -> str:
    """A task of an array by its own name: the first one's number is the whole array's too."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]


def _scontrol(job: str) -> str:
    """What went wrong, in a line; '' where the job is in the queue again."""
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=REQUEUE_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not requeued: {error}"
    return "" if done.returncode == 0 else f"not requeued: {' '.join(done.stderr.split()) or f'scontrol ended with code {done.returncode}'}"
