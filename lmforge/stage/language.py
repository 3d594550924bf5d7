"""Next-token prediction: pretraining and supervised fine-tuning."""

from __future__ import annotations

from typing import Annotated, Any

from lmforge.codec import digest
from lmforge.model.nodes import Model
from lmforge.registry import Key, register
from lmforge.stage.base import TrainingStage, Tuning
from lmforge.step import Context


@register("stage", "pretrain")
class Pretrain(TrainingStage):
    """Next-token prediction on packed documents with a document mask (Radford et al. 2019); from scratch, or on from a pretrained stage."""

    code_revision = 2  # fresh weights are drawn each by its name
    consumes = ("tokenizer", "tokens:text")
    follows = ("pretrain",)
    model: Annotated[Model, Key("the architecture", identity=False)]

    def content(self, _cache: Any) -> str:
        """The architecture by its config.json, however the model node spells it."""
        return digest(self.model.config())

    def objective(self, context: Context) -> Any:
        """Cross entropy over every token of the packed stream."""
        from lmforge.training.objectives.causal_lm import CausalLM

        return CausalLM(context.inputs["tokens:text"], self.row_tokens)


@register("stage", "sft")
class Sft(Tuning):
    """Supervised fine-tuning on conversations, loss on assistant tokens only (Ouyang et al. 2022, section 3.5)."""

    consumes = ("checkpoint", "tokens:chat")

    def objective(self, context: Context) -> Any:
        """Cross entropy over assistant tokens of packed conversations; under a soft prompt a row holds one conversation."""
        from lmforge.training.objectives.causal_lm import CausalLM

        return CausalLM(context.inputs["tokens:chat"], self.row_tokens, packed=self.adapter.packs)
