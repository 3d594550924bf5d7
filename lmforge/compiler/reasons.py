"""What a search says: the choice as one would type it, why the others lost, and what is too large where nothing fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from lmforge.compiler.candidates import Candidate
from lmforge.compiler.search import Ranking
from lmforge.compiler.verdict import Verdict
from lmforge.errors import Problem
from lmforge.explain.words import gib
from lmforge.parallel.nodes import Mesh, Parallel, Several
from lmforge.plan import Step
from lmforge.predict.time import StepTime
from lmforge.stage.base import TrainingStage

OTHERS = 4


class Asked(Protocol):
    """Whoever knows the figures of candidates."""

    step: Step
    prefix: str
    idle: str  # why some devices have nothing to do, if they have not
    unknown: tuple[str, ...]  # keys of hardware without which there are no times

    def typed(self, one: Candidate) -> Step: ...
    def time(self, one: Candidate) -> StepTime | None: ...
    def verdict(self, one: Candidate) -> Verdict: ...
    def lacks(self, one: Candidate) -> tuple[str, ...]: ...


def words(asked: Asked, one: Candidate) -> str:
    """A candidate's own keys, as they would be typed; what was typed beside parallel=auto stays."""
    spec = asked.typed(one).spec
    assert isinstance(spec, TrainingStage)
    return " ".join(_words(spec.parallel, asked.prefix))


def _words(parallel: Parallel, at: str) -> Iterator[str]:
    yield f"{at}={'fsdp' if isinstance(parallel, Mesh) else parallel.option}"
    if isinstance(parallel, Several) and parallel.devices is not None:
        yield f"{at}.devices={parallel.devices}"
    if isinstance(parallel, Mesh):
        sizes = {axis: size for axis, size in parallel.axes().items() if size != 1 or axis == "dp_shard"}
        yield from (f"{at}.{axis}={size}" for axis, size in sizes.items())
        yield from [f"{at}.reshard_after_forward=false"] * (not parallel.reshard_after_forward)
        yield from [f"{at}.cpu_offload=true"] * parallel.cpu_offload
    yield f"{at}.micro_batch_size={parallel.micro_batch_size}"
    yield f"{at}.activation_checkpointing={parallel.activation_checkpointing}"


def lines(asked: Asked, ranking: Ranking) -> list[str]:
    """The choice, then up to four others with why each lost: the nearest to fitting of those that are faster, and the next that fit."""
    best = ranking.best[0]
    first, found = asked.time(best), asked.verdict(best)
    figures = (
        [f"{_seconds(first)} a step"] if first else [f"without times, for {', '.join(asked.unknown or asked.lacks(best))} is not known: the simplest that fits"]
    )
    chosen = f"auto: {words(asked, best)}: {', '.join([*figures, f'{gib(found.need)} of {gib(found.room)}'])}"
    others = [*ranking.larger, *ranking.best[1 : 1 + OTHERS - len(ranking.larger)]]
    return [*([f"auto: {asked.idle}"] if asked.idle else []), chosen, *(f"auto: {words(asked, one)}: {_lost(asked, best, one)}" for one in others)]


def _lost(asked: Asked, best: Candidate, one: Candidate) -> str:
    first, other, found = asked.time(best), asked.time(one), asked.verdict(one)
    need = f"{gib(found.need)} of {gib(found.room)}"
    if not found.fits:
        part, size = _largest(found)
        faster = f"{1 - other.total / first.total:.1%} faster, but " if first and other else ""
        return f"{faster}needs {need}, {part} {gib(size)} of them"
    if not first or not other:
        return f"fits ({need}), and is less simple or computes more again"
    return f"{other.total / first.total - 1:.1%} slower ({grown(first.parts, other.parts)}), {need}"


def _largest(found: Verdict) -> tuple[str, int]:
    return max(found.parts.items(), key=lambda one: one[1])


def grown(first: Mapping[str, float], other: Mapping[str, float]) -> str:
    """The part that grew most."""
    part = max(sorted(other), key=lambda name: other[name] - first.get(name, 0.0))
    return f"{part} {first.get(part, 0.0):.3g} -> {other[part]:.3g} s"


def _seconds(time: StepTime) -> str:
    return f"{time.total:.3g} s"


def refusal(asked: Asked, ranking: Ranking, instead: str) -> Problem:
    """The smallest need, its largest part, its keys, and the smallest hardware that would do."""
    found = asked.verdict(ranking.smallest)
    part, size = _largest(found)
    what = f"nothing fits: the least is {gib(found.need)} of {gib(found.room)} a device, {part} {gib(size)} of them, with {words(asked, ranking.smallest)}"
    return Problem(f"stage.{asked.step.name}.parallel", what, instead or f"a device of at least {gib(found.need)} would do")
