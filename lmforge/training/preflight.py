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


def preflight(objective: Objective, model: Any, *, tokens: Path, checkpoint: Path | None, recipe: Recipe, context: Context) -> dict[str, float]:
    """Look at the first step's rows, the tokenizers, and what model and loss make of a few rows; returns the differences that were measured.

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
    sample = Sample.first(objective.dataset("train"), tokens, recipe.seed, min(recipe.rows_per_step, DATA_ROWS))
    _examples(sample)
    # A copy, since some objectives count what they see.
    return _model(sample.head(_rows(recipe)), copy.copy(objective), model)


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


def _model(sample: Sample, objective: Objective, model: Any) -> dict[str, float]:
    """What model and loss make of the rows."""
    tolerance, found = TOLERANCE[_format(model)], {}
    with undisturbed(model) as device:
        if isinstance(sample.rows, PackedRows):
            found["packing"] = numbers.packing(sample, model, device, tolerance)
        if isinstance(objective, Preference):
            found["shared_prompts"] = numbers.shared_prompts(sample, model, device, tolerance)
        if getattr(sample.rows, "reference", None) is not None and not virtual_tokens(model):  # a fresh soft prompt moves the policy by itself
            found["log_ratio"] = numbers.log_ratio(sample, model, device, tolerance)
        found["accumulation"] = numbers.accumulation(sample, objective, model, device, tolerance)
    return found


def _format(model: Any) -> str:
    """The coarsest format among the weights."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if any(not dtype.is_floating_point for dtype in dtypes):
        return "quantized"
    return "float32" if dtypes <= {torch.float32, torch.float64} else "16-bit"
