"""What `adapter=` may name."""  # first sketch by the lead, so that the tree imports: the adapter helper writes the real one over it

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from lmforge.registry import Node, register
from lmforge.step import StepNode


class Adapter(Node):
    """What of a model is trained."""

    group = "adapter"
    trains_all: ClassVar[bool] = False
    packs: ClassVar[bool] = True  # whether packed rows can be trained on; not under a soft prompt

    def trainable(self, weights: Sequence[Any]) -> list[Any]:
        """The weights that train."""
        return list(weights)


@register("adapter", "none")
class Whole(Adapter):
    """All weights train."""

    trains_all = True


@register("step", "merge")
class Merge(StepNode):
    """An adapter and its base as one checkpoint."""

    consumes = ("checkpoint", "adapter")
    produces = "checkpoint"
