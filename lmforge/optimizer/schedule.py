"""Learning-rate schedules: a factor on the peak learning rate, as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, ClassVar

from lmforge.errors import Problem
from lmforge.registry import Key, Node, node, register

Warmup = Annotated[float, Key("share of all steps in which the learning rate rises linearly to its peak", ge=0, le=1)]
Final = Annotated[float, Key("learning rate after the last step, as a share of the peak", ge=0, le=1)]


@node
class Schedule(Node):
    """Linear warm-up over the first `warmup * steps` steps, then the shape of the subclass."""

    group: ClassVar[str] = "optimizer/schedule"

    warmup: Warmup

    def factor(self, step: int, steps: int) -> float:
        """Factor on the peak learning rate at `step` in [0, steps).

        The warm-up never uses 0 (a step with learning rate 0 is wasted) and a decay reaches `final` at `steps`, one after the last step,
        for the same reason.
        """
        if not 0 <= step < steps:
            raise ValueError(f"step {step} is not in [0, {steps})")
        warm = round(self.warmup * steps)
        if step < warm:
            return (step + 1) / (warm + 1)
        return self.shape((step - warm) / (steps - warm), steps / (steps - warm))

    def shape(self, t: float, stretch: float) -> float:
        """Factor at the share `t` in [0, 1) of the steps after warm-up; `stretch` = all steps / steps after warm-up."""
        raise NotImplementedError


@register("optimizer/schedule", "constant")
class Constant(Schedule):
    """The peak learning rate to the end."""

    def shape(self, t: float, stretch: float) -> float:
        return 1.0


@register("optimizer/schedule", "linear")
class Linear(Schedule):
    """A straight line from the peak to `final` (Bergsma et al. 2025: to zero is hard to beat)."""

    final: Final

    def shape(self, t: float, stretch: float) -> float:
        return 1.0 - (1.0 - self.final) * t


@register("optimizer/schedule", "cosine")
class Cosine(Schedule):
    """Half a cosine from the peak to `final` (Loshchilov & Hutter 2017, without restarts)."""

    final: Final

    def shape(self, t: float, stretch: float) -> float:
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * t))


@register("optimizer/schedule", "wsd")
class Wsd(Schedule):
    """Warm-up, stable, decay (Hu et al. 2024, Haegele et al. 2024): the peak, then a line to `final` over the last `decay` of all steps."""

    final: Final
    decay: Annotated[float, Key("share of all steps, at the end, in which the learning rate falls", ge=0, le=1)]

    def shape(self, t: float, stretch: float) -> float:
        start = 1.0 - self.decay * stretch
        return 1.0 if t <= start else self.final + (1.0 - self.final) * (1.0 - t) / (1.0 - start)

    def check(self, where: str) -> Iterator[Problem]:
        if self.warmup + self.decay > 1:
            yield Problem(f"{where}.decay", f"warmup {self.warmup:g} + decay {self.decay:g} is more than all steps", "make them add up to at most 1")
