"""A training stage as it runs: weights in, `fit`, a Hugging Face folder out; and the reference pass of preference stages."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lmforge.formats.tokens import Tokens
from lmforge.model import build
from lmforge.stage.nodes import Pretrain, TrainingStage
from lmforge.step import Context
from lmforge.training.fit import fit
from lmforge.training.objectives.dpo import PairRows
from lmforge.training.recipe import Recipe
from lmforge.training.scoring import preference_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAIRS_PER_BATCH = 16
SPLITS = ("train", "heldout")


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


def reference(context: Context) -> dict[str, Any]:
    """Log-probs of every preference example under the incoming policy, dropout off, one file a split.

    In float32 on the accelerator, where there is one. They are computed once and kept, so they are as exact as they can be, whatever dtype
    the policy then computes in: its log-ratios start at 0 up to the rounding of that dtype.
    """
    model: Any = build.from_folder(context.inputs["checkpoint"], torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    counted = {}
    for done, split in enumerate(SPLITS):
        context.report.progress(done, len(SPLITS), split)
        scores = preference_logprobs(model, PairRows(Tokens(context.inputs["tokens:preference"], split)), PAIRS_PER_BATCH)
        write_array(context.out / f"{split}.npy", scores)
        counted[f"examples_{split}"] = len(scores)
    return counted


def write_array(file: Path, array: np.ndarray[Any, Any]) -> None:
    """Atomic: the file is whole or not there."""
    temporary = file.with_name(f".{file.name}")
    with temporary.open("wb") as handle:
        np.save(handle, array)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, file)
