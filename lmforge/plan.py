"""The intermediate representation: what will run, in which order, where, and at what cost. Immutable; exact as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lmforge.codec import decode, encode
from lmforge.errors import PlanError, did_you_mean
from lmforge.experiment import Experiment
from lmforge.registry import lookup
from lmforge.step import Placement, StepNode


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """What a step makes: a folder of a known kind (corpus, tokenizer, tokens:text, checkpoint, metrics, ...)."""

    step: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class PeakBytes:
    """Bytes on the fullest device: what it holds between steps, and all of it at the fullest moment of a step. Null is not estimated."""

    params: int | None = None  # trained ones, and frozen ones with and beside them
    grads: int | None = None
    optimizer: int | None = None
    parts: Mapping[str, int] | None = None  # at the fullest moment: those of lmforge.predict.memory
    moment: str | None = None
    total: int | None = None  # of `parts`

    @property
    def static(self) -> int:
        """Parameters, gradients and optimizer states."""
        return (self.params or 0) + (self.grads or 0) + (self.optimizer or 0)


@dataclass(frozen=True, kw_only=True)
class Band:
    """A prediction and the range that most measurements fall in."""

    low: float
    expected: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a step takes; null is not estimated, never a guess. FLOPs by 6N + 6LdT per token, N active parameters, causal attention."""

    params_total: int | None = None
    params_active: int | None = None
    params_trainable: int | None = None
    tokens: int | None = None
    train_flops: float | None = None
    peak_bytes_per_device: PeakBytes = field(default_factory=PeakBytes)
    communication: Mapping[str, int] | None = None  # bytes a device sends in an optimizer step, by collective; empty is none
    step_seconds: Band | None = None
    step_parts: Mapping[str, float] | None = None  # seconds of an optimizer step, by what they go to
    tokens_per_second: float | None = None
    mfu: float | None = None  # of `train_flops` a token
    hfu: float | None = None  # with what is computed again
    seconds: float | None = None  # of all steps
    device_hours: float | None = None
    money: float | None = None  # in the currency of hardware.price_per_device_hour
    energy_kwh: float | None = None


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step: `spec` is the node that runs, `content` what decides the result beyond its keys, `digest` what it *is*."""

    name: str
    stage: str  # the type of the node that runs
    group: str  # the group that type belongs to
    spec: StepNode
    inputs: tuple[Artifact, ...] = ()
    content: str = ""
    digest: str = ""
    arithmetic: tuple[str, ...] = ()  # how derived numbers came about, for people
    placement: Placement = field(default_factory=Placement)
    cost: Cost = field(default_factory=Cost)

    @property
    def produces(self) -> str:
        """The kind of artifact it makes, and the folder's name inside the step's."""
        return self.spec.makes()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Steps in the order they run; each consumes only what earlier ones make."""

    experiment: Experiment
    steps: tuple[Step, ...] = ()

    def step(self, name: str) -> Step:
        """The step of that name; PlanError with the nearest one where there is none."""
        for step in self.steps:
            if step.name == name:
                return step
        raise PlanError(name, "no such step in this plan", did_you_mean(name, [step.name for step in self.steps]))

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` gives an equal plan back."""
        plain: dict[str, Any] = encode(self)
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Plan:
        """The plan that `to_json` wrote."""
        return cls(experiment=decode(Experiment, plain["experiment"], "experiment"), steps=tuple(read_step(one) for one in plain["steps"]))


def read_step(plain: Mapping[str, Any]) -> Step:
    """One step from plain data; `status` and `why`, which only a store knows, are passed over."""
    where = f"steps.{plain['name']}"
    spec = decode(lookup(plain["group"], plain["stage"], where), plain["spec"], f"{where}.spec")
    rest = {name: value for name, value in plain.items() if name not in ("spec", "status", "why")}
    return Step(
        **{name: rest[name] for name in ("name", "stage", "group", "content", "digest")},
        spec=spec,
        inputs=decode(tuple[Artifact, ...], rest["inputs"], f"{where}.inputs"),
        arithmetic=tuple(rest["arithmetic"]),
        placement=decode(Placement, rest["placement"], f"{where}.placement"),
        cost=decode(Cost, rest["cost"], f"{where}.cost"),
    )
