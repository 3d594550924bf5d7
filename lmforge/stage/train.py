"""A training stage as it runs: weights in, preflight, `fit`, a Hugging Face folder out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lmforge.model import build
from lmforge.stage.nodes import Pretrain, RewardModel, TrainingStage, Tuning
from lmforge.step import Context
from lmforge.training.fit import fit
from lmforge.training.objectives.reward import BradleyTerry, pair_scores
from lmforge.training.preflight import preflight
from lmforge.training.recipe import Recipe
from lmforge.training.scoring import score

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAIRS_PER_BATCH = 16


def train(stage: TrainingStage, context: Context) -> dict[str, Any]:
    """Train from the checkpoint among the inputs, or from scratch; returns the last interval's metrics."""
    tokens, told, objective = context.inputs[f"tokens:{stage.view}"], recipe(stage), stage.objective(context)
    model: Any = starting_weights(stage, context)
    if torch.cuda.is_available() and stage.parallel.whole:
        model.to("cuda")  # where preflight's few rows cost nothing, and where the strategy puts it anyway
    preflight(objective, model, tokens=tokens, checkpoint=context.inputs.get("checkpoint"), recipe=told, context=context)
    # The tokens' own tokenizer: it holds the chat template, and the markers added where the model's had none.
    return fit(told, objective, model, context, lambda trained: save(stage, trained, tokens / "tokenizer", context), tokens / "tokenizer")


def train_reward(stage: RewardModel, context: Context) -> dict[str, Any]:
    """`train`, and what the saved reward model makes of held-out pairs: accuracy and margin with their standard errors."""
    metrics = train(stage, context)
    model: Any = build.scorer_from_folder(context.out)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    objective = BradleyTerry(context.inputs["tokens:preference"], stage.margin, stage.centering)
    scores = torch.from_numpy(score(model, objective.dataset("heldout"), PAIRS_PER_BATCH, pair_scores)).double().view(-1, 2)
    leads = scores[:, 0] - scores[:, 1]
    right = (leads > 0).double() + 0.5 * (leads == 0).double()
    root = math.sqrt(max(1, len(leads)))
    found = {
        "heldout_accuracy": right.mean(),
        "heldout_accuracy_standard_error": right.std() / root,
        "heldout_margin": leads.mean(),
        "heldout_margin_standard_error": leads.std() / root,
    }
    return {**{name: float(value) for name, value in found.items()}, "heldout_pairs": len(leads), **metrics}


def starting_weights(stage: TrainingStage, context: Context) -> PreTrainedModel:
    """The checkpoint handed in, as a scorer for a reward model and with the stage's adapter; else fresh weights of the stage's own model."""
    if "checkpoint" not in context.inputs:
        assert isinstance(stage, Pretrain)
        return build.from_scratch(stage.model.config(), stage.seed)
    opened = build.scorer_from_folder if isinstance(stage, RewardModel) else build.from_folder
    model = opened(context.inputs["checkpoint"])
    return stage.adapter.attach(model, stage.seed) if isinstance(stage, Tuning) else model


def save(stage: TrainingStage, model: Any, tokenizer: Path, context: Context) -> None:
    """What the stage makes: the weights, the adapter alone, or (a reward model) the weights with the adapter in them."""
    if not isinstance(stage, Tuning) or stage.adapter.trains_all:
        build.save(model, tokenizer, context.out)
    elif stage.makes() == "adapter":
        stage.adapter.save(model, tokenizer, context.out, context.inputs["checkpoint"])
    else:
        build.save(stage.adapter.merged(model), tokenizer, context.out)


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
