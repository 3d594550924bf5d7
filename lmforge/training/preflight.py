"""Checks on the first real batches, before training: what goes wrong in silence elsewhere is one line here, and names the example."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from lmforge.formats.store import STATE_INDEX
from lmforge.formats.tokens import read_meta
from lmforge.inference.forward import virtual_tokens
from lmforge.step import Context
from lmforge.training.checks import data, numbers, tokenizers
from lmforge.training.checks.sample import Sample, undisturbed
from lmforge.training.objective import Objective
from lmforge.training.objectives.causal_lm import PackedRows
from lmforge.training.objectives.kto import FeedbackRows
from lmforge.training.objectives.preference import PairRows, Preference
from lmforge.training.recipe import Recipe

DATA_ROWS = 64  # of the first step, looked at without the model
MODEL_ROWS, MODEL_TOKENS = 4, 8192  # that the model is run on: at most so many rows, and at least two

# What may differ by rounding, by the format of the weights at this point: nats a token, and the relative norm of a gradient's difference.
TOLERANCE = {"float32": 1e-4, "16-bit": 5e-2, "quantized": 5e-1}


def preflight(
    objective: Objective, model: Any, *, tokens: Path, checkpoint: Path | None, recipe: Recipe, context: Context, stands_in: bool = False
) -> dict[str, float]:
    """Look at the first step's rows, the tokenizers, and what model and loss make of a few rows; returns the differences that were measured.

    `model` is what will be trained; or a small one that `stands_in` for it, its weights others, for which `begins` is left to be asked later; or, on
    other ranks than the one that has that, None.

    DataError or RunError on the first check that fails. Nothing is left changed: weights, gradients, modes and random states are what they were. A run
    that goes on from a state passed all of it when it began, so there it does nothing. All ranks come here and look at the same.
    """
    if (context.folder / STATE_INDEX).is_file():
        return {}
    meta = read_meta(tokens)
    if checkpoint is not None:
        tokenizers.one_template(tokens, checkpoint, meta["view"])
        tokenizers.one_tokenizer(tokens, checkpoint, "the checkpoint")
    if "reward_model" in context.inputs:
        tokenizers.one_tokenizer(tokens, context.inputs["reward_model"], "the reward model")
    if meta["view"] == "prompt":
        return {}  # there is nothing to learn in the prompts; the rest comes with the rollouts
    sample = _sample(objective, tokens, recipe)
    _examples(sample)
    if model is None:
        return {}
    # A copy, since some objectives count what they see.
    return _model(sample.head(_rows(recipe)), copy.copy(objective), model, stands_in=stands_in)


def begins(objective: Objective, tokens: Path, recipe: Recipe, model: Any, device: torch.device) -> float:
    """The check that needs the model's own weights, on one that is laid out over ranks, all of which call this: the policy begins as its reference.

    0 where there is no reference. A matrix product in 16 bits rounds as weights of 16 bits do.
    """
    sample = _sample(objective, tokens, recipe).head(_rows(recipe))
    if getattr(sample.rows, "reference", None) is None or virtual_tokens(model):  # a fresh soft prompt moves the policy by itself
        return 0.0
    with undisturbed(model):
        return numbers.log_ratio(sample, model, device, TOLERANCE["float32" if recipe.compute_dtype == "float32" else "16-bit"])


def _sample(objective: Objective, tokens: Path, recipe: Recipe) -> Sample:
    return Sample.first(objective.dataset("train"), tokens, recipe.seed, min(recipe.rows_per_step, DATA_ROWS))


def _rows(recipe: Recipe) -> int:
    """How many rows the model is run on."""
    return max(2, min(MODEL_ROWS, MODEL_TOKENS // recipe.seq_len))


def _examples(sample: Sample) -> None:
    """The data's own checks, cheapest first."""
    if isinstance(sample.rows, FeedbackRows):
        data.both_kinds(sample)
    data.supervised(sample)
    data.end_token(sample)
    if isinstance(sample.rows, PairRows):
        data.pairs_differ(sample)
    if sample.examples and sample.tokens.meta["view"] != "text":  # a row of text may hold parts of examples
        data.labels(sample)


def _model(sample: Sample, objective: Objective, model: Any, *, stands_in: bool) -> dict[str, float]:
    """What model and loss make of the rows."""
    begun = not stands_in and not virtual_tokens(model)  # a fresh soft prompt moves the policy by itself
    tolerance, found = TOLERANCE[_format(model)], {}
    with undisturbed(model) as device:
        if isinstance(sample.rows, PackedRows):
            found["packing"] = numbers.packing(sample, model, device, tolerance)
        if isinstance(objective, Preference):
            found["shared_prompts"] = numbers.shared_prompts(sample, model, device, tolerance)
        if begun and getattr(sample.rows, "reference", None) is not None:
            found["log_ratio"] = numbers.log_ratio(sample, model, device, tolerance)
        found["accumulation"] = numbers.accumulation(sample, objective, model, device, tolerance)
    return found


def _format(model: Any) -> str:
    """The coarsest format among the weights."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if any(not dtype.is_floating_point for dtype in dtypes):
        return "quantized"
    return "float32" if dtypes <= {torch.float32, torch.float64} else "16-bit"
