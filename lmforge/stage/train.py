"""A training stage as it runs: weights in, `fit`, a Hugging Face folder out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmforge.model import build
from lmforge.stage.nodes import Pretrain, TrainingStage
from lmforge.step import Context
from lmforge.training.fit import fit
from lmforge.training.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def train(stage: TrainingStage, context: Context) -> dict[str, Any]:
    """Train from the checkpoint among the inputs, or from scratch; returns the last interval's metrics."""
    model = starting_weights(stage, context)
    # The tokens' own tokenizer: it holds the chat template, and the markers added where the model's had none.
    tokenizer = context.inputs[f"tokens:{stage.view}"] / "tokenizer"
    return fit(recipe(stage), stage.objective(context), model, context, lambda trained: build.save(trained, tokenizer, context.out))


def starting_weights(stage: TrainingStage, context: Context) -> PreTrainedModel:
    """The checkpoint handed in, else fresh weights of the stage's own model."""
    if "checkpoint" in context.inputs:
        return build.from_folder(context.inputs["checkpoint"])
    assert isinstance(stage, Pretrain)
    return build.from_scratch(stage.model.config(), stage.seed)


def recipe(stage: TrainingStage) -> Recipe:
    """What `fit` is told of a resolved stage."""
    batch = stage.optimizer.global_batch_tokens
    assert stage.budget.steps is not None
    assert stage.seq_len is not None
    assert batch is not None
    return Recipe(
        steps=stage.budget.steps,
        rows_per_step=batch // stage.row_tokens,
        seq_len=stage.seq_len,
        seed=stage.seed,
        optimizer=stage.optimizer,
        param_dtype=stage.precision.param_dtype,
        compute_dtype=stage.precision.compute_dtype,
        reduce_dtype=stage.precision.reduce_dtype,
        loss_scale=stage.precision.loss_scale,
        parallel=stage.parallel,
        log_every=stage.log_every,
        save_every_s=stage.save_every_s,
    )
