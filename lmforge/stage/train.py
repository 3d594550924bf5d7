"""A training stage as it runs: weights in, preflight, `fit`, a Hugging Face folder out."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from lmforge.formats.store import STATE_INDEX
from lmforge.model import build, opening, writing
from lmforge.model.parts import Unread, replace
from lmforge.model.writing import Whole
from lmforge.parallel.nodes import Mesh
from lmforge.stage.nodes import Pretrain, RewardModel, TrainingStage, Tuning
from lmforge.step import Context
from lmforge.training import state
from lmforge.training.fit import fit
from lmforge.training.objectives.reward import BradleyTerry, pair_scores
from lmforge.training.preflight import begins, preflight
from lmforge.training.recipe import Recipe
from lmforge.training.scoring import score
from lmforge.training.shares import InShares

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAIRS_PER_BATCH = 16


def train(stage: TrainingStage, context: Context) -> dict[str, Any]:
    """Train from the checkpoint among the inputs, or from scratch; returns the last interval's metrics."""
    tokens, told, objective = context.inputs[f"tokens:{stage.view}"], recipe(stage), stage.objective(context)
    # The tokens' own tokenizer: it holds the chat template, and the markers added where the model's had none.
    tokenizer, checkpoint = tokens / "tokenizer", context.inputs.get("checkpoint")
    state.check(context.folder / "state", context.placement.devices)
    unread = unread_weights(stage, context)
    if unread is not None:
        # One rank tries the rows, and what goes wrong there ends the others; all do where they are joined already, for an objective may then ask them.
        tries = (os.environ["RANK"] == "0" or dist.is_initialized()) and not (context.folder / STATE_INDEX).is_file()
        small = _probe(stage, context) if tries else None
        preflight(objective, small, tokens=tokens, checkpoint=checkpoint, recipe=told, context=context, stands_in=True)
        del small
        torch.cuda.empty_cache()
        shares = InShares(unread.parts, functools.partial(begins, objective, tokens, told))
        return fit(told, objective, unread.model, context, functools.partial(save_in_turn, stage, tokenizer, context), tokenizer, shares)
    model: Any = starting_weights(stage, context)
    if torch.cuda.is_available() and stage.parallel.whole:
        model.to("cuda")  # where preflight's few rows cost nothing, and where the strategy puts it anyway
    preflight(objective, model, tokens=tokens, checkpoint=checkpoint, recipe=told, context=context)
    return fit(told, objective, model, context, lambda trained: save(stage, trained, tokenizer, context), tokenizer)


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
        return build.from_scratch(_config(stage), stage.seed)
    opened = build.scorer_from_folder if isinstance(stage, RewardModel) else build.from_folder
    model = opened(context.inputs["checkpoint"])
    return stage.adapter.attach(model, stage.seed) if isinstance(stage, Tuning) else model


def unread_weights(stage: TrainingStage, context: Context) -> Unread | None:
    """The same weights, not read yet, for a rank of a mesh, which reads its share of them.

    None where a rank opens them whole: where it will hold all of them anyway, or DeepSpeed splits them, or an adapter begins from the base's values (QLoRA
    rounds them, DoRA takes their norms, PiSSA their singular vectors, a soft prompt some rows), or the folder's cannot be read in parts.
    """
    if not isinstance(stage.parallel, Mesh) or context.placement.devices == 1:
        return None
    if not isinstance(stage, Tuning) or "checkpoint" not in context.inputs:
        return opening.from_folder(context.inputs["checkpoint"]) if "checkpoint" in context.inputs else opening.from_scratch(_config(stage), stage.seed)
    if stage.adapter.reads_base:
        return None
    opened = opening.from_folder(context.inputs["checkpoint"], scores=isinstance(stage, RewardModel))
    return opened and opened.under(lambda model: stage.adapter.attach(model, stage.seed))


def _config(stage: TrainingStage) -> Mapping[str, Any]:
    assert isinstance(stage, Pretrain)
    return stage.model.config()


def _probe(stage: TrainingStage, context: Context) -> Any:
    """A small model of the same kind, with the stage's adapter, where rows cost little."""
    model: Any = opening.probe(context.inputs.get("checkpoint") or _config(stage), stage.seed, scores=isinstance(stage, RewardModel))
    if isinstance(stage, Tuning):
        model = stage.adapter.attach(model, stage.seed)
    return model.to(torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else "cpu")


def save(stage: TrainingStage, model: Any, tokenizer: Path, context: Context) -> None:
    """What the stage makes: the weights, the adapter alone, or (a reward model) the weights with the adapter in them."""
    if not isinstance(stage, Tuning) or stage.adapter.trains_all:
        build.save(model, tokenizer, context.out)
    elif stage.makes() == "adapter":
        stage.adapter.save(model, tokenizer, context.out, context.inputs["checkpoint"])
    else:
        build.save(stage.adapter.merged(model), tokenizer, context.out)


def save_in_turn(stage: TrainingStage, tokenizer: Path, context: Context, bones: Any, read: Whole) -> None:
    """The same of a model that no rank holds whole, `bones` being that without memory: all ranks call it, and rank 0 writes a file's weights at a time."""
    first = os.environ["RANK"] == "0"
    if not isinstance(stage, Tuning) or stage.adapter.trains_all:
        writing.save(bones, read, tokenizer, context.out, first=first)
        return
    trained = {name: parameter for name, parameter in bones.named_parameters() if parameter.requires_grad}
    learned = read(list(trained))
    replace(bones, {trained[name]: torch.nn.Parameter(value) for name, value in learned.items()})
    if stage.makes() != "adapter":
        writing.save(*stage.adapter.merged_in_turn(bones, read), tokenizer, context.out, first=first)
    elif first:
        stage.adapter.save(bones, tokenizer, context.out, context.inputs["checkpoint"])


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
        buffer_dtype=stage.precision.buffer_dtype,
        loss_scale=stage.precision.loss_scale,
        parallel=stage.parallel,
        log_every=stage.log_every,
        save_every_s=stage.save_every_s,
    )
