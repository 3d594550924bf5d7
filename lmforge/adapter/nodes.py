"""What a config may name in `adapter`: which weights a stage trains, all of them or a few beside a frozen base."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from lmforge.adapter.base import Adapter
from lmforge.adapter.low_rank import Dora, Lora, Qlora
from lmforge.adapter.targets import Trained, WeightLike
from lmforge.errors import Problem
from lmforge.registry import Key, register
from lmforge.step import Context, StepNode

__all__ = ["Adapter", "Dora", "Lora", "Merge", "NoAdapter", "PromptTuning", "Qlora"]


@register("adapter", "none")
class NoAdapter(Adapter):
    """No adapter: every weight of the model is trained."""

    trains_all: ClassVar[bool] = True

    def trainable(self, weights: Iterable[WeightLike]) -> list[Any]:
        return list(weights)

    def frozen_bytes(self, weights: Iterable[WeightLike], width: int) -> int:
        return 0

    def attach(self, model: Any, seed: int | None = None) -> Any:
        return model

    def off(self, model: Any) -> AbstractContextManager[None]:
        raise RuntimeError("adapter=none cannot be switched off: the base is not kept")

    def save(self, model: Any, tokenizer_folder: Path, out: Path, base: Path) -> None:
        raise RuntimeError("adapter=none is saved as a checkpoint")

    def open(self, base_model: Any, folder: Path) -> Any:
        raise RuntimeError("adapter=none opens no adapter")

    def merged(self, model: Any) -> Any:
        return model


@register("adapter", "prompt_tuning")
class PromptTuning(Adapter):
    """Prompt tuning (Lester et al. 2021): trained embeddings before every sequence, the model itself frozen. It cannot be merged."""

    packs: ClassVar[bool] = False

    virtual_tokens: Annotated[int, Key("trained embeddings; they take as many positions of the context", "tokens", ge=1)]
    init: Annotated[Literal["random", "vocabulary"], Key("where init_text is null: begun as normal noise, or as embeddings drawn from the vocabulary")]
    init_text: Annotated[str | None, Key("begun as the embeddings of this text's tokens, repeated or cut to virtual_tokens; null = as init says")]

    def check(self, where: str) -> Iterator[Problem]:
        if self.init_text is not None and not self.init_text.strip():
            yield Problem(f"{where}.init_text", "is empty", f"type some words, or {where}.init_text=null")

    @property
    def reads_base(self) -> bool:
        return self.init_text is not None or self.init == "vocabulary"

    @property
    def positions(self) -> int:
        return self.virtual_tokens

    def trainable(self, weights: Iterable[WeightLike]) -> list[Trained]:
        table = next(one for one in weights if one.role == "embedding")
        return [Trained("prompt_encoder.default.embedding.weight", (self.virtual_tokens, table.shape[1]), 1)]

    def attach(self, model: Any, seed: int | None = None) -> Any:
        from lmforge.adapter.attach import soft_prompt

        return soft_prompt(model, self, seed)

    def merged(self, model: Any) -> Any:
        """The model as it is: a soft prompt has no place among the weights."""
        return model


@register("step", "merge")
class Merge(StepNode):
    """An adapter and its base become one checkpoint. LoRA and DoRA are added to the weights; a soft prompt goes along in the folder `adapter` inside."""

    consumes: ClassVar[tuple[str, ...]] = ("checkpoint", "adapter")
    produces: ClassVar[str] = "checkpoint"

    def run(self, context: Context) -> dict[str, Any]:
        from lmforge.inference.merge import merge_folders

        return merge_folders(context.inputs["checkpoint"], context.inputs["adapter"], context.out)
