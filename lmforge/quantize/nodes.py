"""What a config may name in `quantize`: how the last checkpoint of a pipeline is made smaller."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

from lmforge.errors import Problem
from lmforge.registry import Key, node, register
from lmforge.step import Context, StepNode


@node
class Quantize(StepNode):
    """A checkpoint to a smaller one. `produces` is empty where nothing is quantized, and then there is no step."""

    group: ClassVar[str] = "quantize"
    consumes: ClassVar[tuple[str, ...]] = ("checkpoint",)
    produces: ClassVar[str] = "checkpoint"


@register("quantize", "none")
class NoQuantize(Quantize):
    """No quantization: the last stage's checkpoint is the result."""

    consumes: ClassVar[tuple[str, ...]] = ()
    produces: ClassVar[str] = ""


@register("quantize", "int8")
class Int8(Quantize):
    """Weight-only INT8: symmetric absmax round-to-nearest per output channel or group, as compressed-tensors `pack-quantized`.

    Without activations being quantized it is a smaller file and not a faster model: readers restore the weights (see Jacob et al. 2018 for the grid).
    """

    embeddings: Annotated[bool, Key("quantize the token embedding too, a scale per row; a tied output layer shares the tensor and goes with it")]
    skip: Annotated[tuple[str, ...], Key("modules kept as they are: names or globs such as lm_head or *.down_proj")]
    group_size: Annotated[int | None, Key("input features that share a scale; null = one scale per output channel", unit="features", ge=4)]

    def check(self, where: str) -> Iterator[Problem]:
        if any(not pattern.strip() for pattern in self.skip):
            yield Problem(f"{where}.skip", "has an empty pattern", "write module names or globs, such as lm_head")

    def run(self, context: Context) -> dict[str, Any]:
        from lmforge.quantize.int8 import quantize_folder

        return quantize_folder(
            context.inputs["checkpoint"], context.out, embeddings=self.embeddings, skip=self.skip, group_size=self.group_size, progress=context.report.progress
        )
