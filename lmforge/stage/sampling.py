"""Answers drawn from a checkpoint, for people or a reward model to rank."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from lmforge.data.nodes import Data
from lmforge.registry import Key, register
from lmforge.stage.base import Stage
from lmforge.step import Context, Reading


@register("stage", "sample")
class Sample(Stage):
    """Several answers to each prompt, to be ranked into preference pairs (`rank RUN`), as in Ouyang et al. 2022, section 3.4."""

    consumes = ("checkpoint", "tokens:prompt")
    produces = "samples"

    seed: Annotated[int, Key("seed of the draws", ge=0)]
    init_from: Annotated[str | None, Key("weights to draw from: a folder, a hub id or a run; null = the stage before it", identity=False)]
    data: Annotated[Data, Key("where the prompts come from; the content counts, not the path", identity=False)]
    prompts: Annotated[int, Key("how many prompts, spread evenly over the split", "prompts", ge=1)]
    split: Annotated[Literal["train", "heldout"], Key("which split they come from")]
    answers: Annotated[int, Key("answers to each prompt", "answers", ge=2)]
    max_new_tokens: Annotated[int, Key("longest answer", "tokens", ge=1)]
    temperature: Annotated[float, Key("temperature they are drawn at", gt=0)]
    top_p: Annotated[float, Key("share of the probability they are drawn from (Holtzman et al. 2020)", gt=0, le=1)]
    batch_size: Annotated[int, Key("answers drawn at once", "answers", ge=1, identity=False)]

    def example_tokens(self, context_tokens: int) -> int:
        """The longest prompt: what an answer leaves of the context."""
        return context_tokens - self.max_new_tokens

    def reads(self, length: int) -> Reading:
        """Prompts that leave an answer's room in the context, which few are as long as."""
        return Reading(rows=self.batch_size, length=length, shorter=True, new=self.max_new_tokens)

    def run(self, context: Context) -> dict[str, Any]:
        """Draw, and write samples.jsonl."""
        from lmforge.stage.sample import sample

        return sample(self, context)
