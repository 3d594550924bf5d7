"""How processes that somebody else started agree on a plan, and hold a rank each of its steps on many devices.

They meet at a c10d store (torchrun's own, or under Slurm one that the first process keeps), so that nothing of an earlier start is ever
taken for news, and the end of the first is noticed by all. The keys, for each plan in turn:

    hello/<rank>    what it compiled: the digests of all steps, or why it could not; compared before anything runs
    verdict         whether the first goes on
    start/<n>       the n-th start of a step on all ranks: the job itself; or the end of the plan, with its exit code
    stop/<n>/terminate, stop/<n>/kill
    ended/<n>       how many ranks of that start have ended, and ended/<n>/<k> how
    left            how many processes know of the end

and for the whole life of the processes

    silent          the first has printed its last line: from here on torchrun, which ends all ranks when one has failed, may do so
"""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from lmforge.errors import LmforgeError, RunError
from lmforge.runtime.given import Given
from lmforge.runtime.ranks import INTERRUPTED, REFUSED, Outcome, Rank, environment, packed, unpacked
from lmforge.runtime.stopping import noted

MEET_S = 300.0  # for all processes to come, torch's own bound; a cold network disk makes imports differ by minutes
TOGETHER_S = 2.0  # between a rank's end by SIGTERM and the same signal to this process, where a scheduler sends it to all
LEAVE_S = 15.0  # for the others to hear of the end, before the store goes
POLL_S = 0.3
SHORT = 16  # characters of a digest

T = TypeVar("T")


class Told(Exception):
    """The first process has ended the plan, and says why itself; this one ends with the same code, silently."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Peers:
    """This process's place among the others, and the store they meet at. Raises RunError where the first cannot be reached."""

    def __init__(self, place: Given, address: str) -> None:
        from torch.distributed import DistError, PrefixStore, TCPStore  # type: ignore[attr-defined]

        self.place, self.first, self.plans, self.starts = place, place.rank == 0, 0, 0
        self.address = address
        self._lost: type[Exception] = DistError
        try:
            store = TCPStore(self.address, place.port, is_master=self.first and not place.kept, wait_for_workers=False, timeout=timedelta(seconds=MEET_S))
        except DistError as error:
            where = f"{self.address}:{place.port}"
            raise RunError(f"rank {place.rank}", f"cannot meet the others at {where}", "see that rank 0 runs there; MASTER_PORT=<a free port>") from error
        self._store = PrefixStore(f"lmforge/{place.launch}", store)

    # What company means to `launch`

    def numbers(self) -> tuple[int, int, int]:
        """Ranks in all, ranks on this machine, and which machine it is."""
        return self.place.world, self.place.local_world, self.place.node

    def start(self, job: dict[str, Any], folder: Path, port: int, attempt: int) -> Away:
        """Have every other process start its rank."""
        number = self._next_start({"job": job, "folder": str(folder), "port": port, "attempt": attempt})
        return Away(self, number)

    def _next_start(self, value: Mapping[str, Any]) -> int:
        self.starts += 1
        self.set(f"start/{self.starts}", value)
        return self.starts

    # Keys of the present plan

    def set(self, key: str, value: Any) -> None:
        """Write a key."""
        self._store.set(f"{self.plans}/{key}", json.dumps(value))

    def get(self, key: str) -> Any:
        """Read a key that is there."""
        return json.loads(self._store.get(f"{self.plans}/{key}"))

    def has(self, key: str) -> bool:
        """Whether a key is there."""
        return self._store.check([f"{self.plans}/{key}"])

    def count(self, key: str, more: int = 0) -> int:
        """Add to a counter, and read it."""
        return self._store.add(f"{self.plans}/{key}", more)

    def wait(self, key: str) -> Any:
        """The value of a key once it is there, however long that takes: the steps before may take hours."""
        while not self.has(key):
            time.sleep(POLL_S)
        return self.get(key)

    # The protocol

    def agree(self, make: Callable[[], T], identity: Callable[[T], Mapping[str, str]]) -> T:
        """What this process makes, if all make the same. On the first the error of any of them, or that they differ; Told on the others."""
        self.plans, self.starts = self.plans + 1, 0
        made: T | None = None
        failure: LmforgeError | None = None
        try:
            made = make()
        except LmforgeError as error:
            failure = error
        hello = {"error": packed(failure)} if failure else {"identity": dict(identity(made))}  # type: ignore[arg-type]
        with self.watched():
            self.set(f"hello/{self.place.rank}", {"host": socket.gethostname(), **hello})
            refusal = failure or self._differences() if self.first else None
            if self.first:
                self.set("verdict", refusal is None)
            elif not self.wait("verdict"):
                self.count("left", 1)
                raise Told(REFUSED)
        if refusal:
            self._see_them_off()
            raise refusal
        return made  # type: ignore[return-value]  # who could not make it was refused

    def _differences(self) -> LmforgeError | None:
        """Why ranks may not run together; None where every one came with what the first has."""
        deadline = time.monotonic() + MEET_S
        others = range(1, self.place.world)
        while missing := [rank for rank in others if not self.has(f"hello/{rank}")]:
            if time.monotonic() > deadline:
                few = ", ".join(map(str, missing[:4])) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
                return RunError(f"rank {few}", f"did not come within {MEET_S:.0f} s", "see whether its process was started")
            time.sleep(POLL_S)
        mine = self.get("hello/0")["identity"]
        for rank in others:
            hello = self.get(f"hello/{rank}")
            if "error" in hello:
                return unpacked(hello["error"], f" (on rank {rank}, {hello['host']})")
            if hello["identity"] != mine:
                return _differs(rank, hello["host"], hello["identity"], mine)
        return None

    def end(self, code: int) -> None:
        """On the first: the plan is over."""
        with suppress(self._lost):
            self._next_start({"end": code})
            self._see_them_off()

    def _see_them_off(self) -> None:
        deadline = time.monotonic() + LEAVE_S
        with suppress(self._lost):
            while self.count("left") < self.place.world - 1 and time.monotonic() < deadline:
                time.sleep(POLL_S)

    def be_silent(self) -> None:
        """On the first: nothing more will be printed."""
        with suppress(self._lost):
            self._store.set("silent", "")

    def hear_out(self) -> None:
        """On the others: let the first print its error before this process fails too."""
        deadline = time.monotonic() + LEAVE_S
        with suppress(self._lost):
            while not self._store.check(["silent"]) and time.monotonic() < deadline:
                time.sleep(POLL_S)

    def serve(self) -> None:
        """On the others: hold a rank of every step that the first starts, until the plan is over. Told where it did not end well."""
        with self.watched(), noted() as came:  # between steps a signal is the first's to act upon; where it gets none, the next step is stopped
            while True:
                self.starts += 1
                start = self.wait(f"start/{self.starts}")
                if "end" in start:
                    self.count("left", 1)
                    if start["end"]:
                        raise Told(start["end"])
                    return
                self._hold(start, came)

    def _hold(self, start: Mapping[str, Any], came: list[int]) -> None:
        """This process's rank, from its start to its end."""
        place, number = self.place, self.starts
        numbers = (place.rank, place.world, place.local, place.local_world, place.node)
        rank = Rank(place.rank, Path(start["folder"]), start["job"], environment(*numbers, self.address, start["port"]), start["attempt"])
        asked = False

        def told() -> bool:
            return bool(came) or self.has(f"stop/{number}/terminate")

        try:
            while (outcome := rank.poll()) is None:
                if self.has(f"stop/{number}/kill"):
                    rank.kill()
                elif not asked and told():
                    asked = True
                    rank.terminate()
                else:
                    time.sleep(POLL_S)
        finally:
            rank.kill()
        deadline = time.monotonic() + (TOGETHER_S if outcome.code == -signal.SIGTERM else 0)
        while not (asked := asked or told()) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        # One that was asked to stop before it could take the signal was killed by it, or lost others that were, and that is no failure.
        code = INTERRUPTED if asked and outcome.failed and (outcome.follows or not outcome.word) else outcome.code
        self.set(f"ended/{number}/{self.count(f'ended/{number}', 1)}", {**vars(outcome), "code": code})

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A store that is gone means that the first process is."""
        try:
            yield
        except self._lost as error:
            raise RunError(f"rank {self.place.rank}", "rank 0's process is gone", f"its own output says why; it kept {self.address}") from error


class Away:
    """The other processes' ranks of one start, as the first sees them."""

    def __init__(self, peers: Peers, number: int) -> None:
        self.peers, self.number, self.seen = peers, number, 0

    def look(self) -> Sequence[Outcome]:
        """Those that have ended since the last call."""
        found = []
        with self.peers.watched():
            while self.seen < self.peers.count(f"ended/{self.number}"):
                self.seen += 1
                found.append(Outcome(**self.peers.wait(f"ended/{self.number}/{self.seen}")))
        return found

    def terminate(self) -> None:
        """Ask them all to stop."""
        self.peers.set(f"stop/{self.number}/terminate", True)

    def kill(self) -> None:
        """End them all."""
        self.peers.set(f"stop/{self.number}/kill", True)


def _differs(rank: int, host: str, theirs: Mapping[str, str], mine: Mapping[str, str]) -> LmforgeError:
    name = next(one for one in [*mine, *theirs] if mine.get(one) != theirs.get(one))
    what = f"has {theirs.get(name, 'nothing')[:SHORT]} for {name}, rank 0 has {mine.get(name, 'nothing')[:SHORT]}"
    return RunError(f"rank {rank} ({host})", f"its plan is another one: it {what}", "start every rank with the same words, the same lmforge and the same data")
