"""The reference pass of preference stages: what the policy thinks of every answer before it is trained."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lmforge.formats.tokens import SPLITS, Tokens
from lmforge.inference.four_bit import round_weights
from lmforge.model import build
from lmforge.stage.preference import Reference
from lmforge.step import Context
from lmforge.training.objectives.kto import FeedbackRows, other
from lmforge.training.objectives.preference import PairRows, logprobs, pair_logprobs
from lmforge.training.scoring import score


def reference(context: Context, four_bit: dict[str, Any] | None = None) -> dict[str, Any]:
    """Log-probs of every example under the incoming policy, dropout off: {split}.npy, and for single answers {split}_kl.npy of the mismatched ones too.

    In float32 on the accelerator, where there is one. They are computed once and kept, so they are as exact as they can be, whatever dtype
    the policy then computes in: its log-ratios start at 0 up to the rounding of that dtype. `four_bit` rounds the weights as QLoRA's base is.
    """
    model: Any = build.from_folder(context.inputs["checkpoint"], torch.float32)
    if four_bit is not None:
        model = round_weights(model, **four_bit)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    pairs = "tokens:preference" in context.inputs
    tokens = context.inputs["tokens:preference" if pairs else "tokens:feedback"]
    counted = {}
    for done, split in enumerate(SPLITS):
        context.report.progress(done, len(SPLITS), split)
        read = Tokens(tokens, split)
        for name, values in pair_scores(model, read) if pairs else answer_scores(model, read):
            write_array(context.out / f"{split}{name}.npy", values)
        counted[f"examples_{split}"] = len(read)
    return counted


def pair_scores(model: Any, tokens: Tokens) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """("", log-probs of every example [2 * pairs])."""
    yield "", score(model, PairRows(tokens), Reference.rows(2, tokens.meta["seq_len"]), lambda *batch: pair_logprobs(*batch)[0]).reshape(-1)


def answer_scores(model: Any, tokens: Tokens) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """("", log-probs of every example [examples]) and ("_kl", those of the mismatched ones)."""
    rows = FeedbackRows(tokens)
    yield "", score(model, rows, Reference.rows(1, tokens.meta["seq_len"]), lambda model, batch: logprobs(model, batch)[0])
    yield "_kl", score(model, rows, Reference.rows(1, tokens.meta["seq_len"]), lambda model, batch: logprobs(model, other(batch))[0])


def write_array(file: Path, array: NDArray[Any]) -> None:
    """Atomic: the file is whole or not there."""
    temporary = file.with_name(f".{file.name}")
    with temporary.open("wb") as handle:
        np.save(handle, array)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, file)
