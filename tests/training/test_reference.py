"""The reference pass of preference stages: float32, dropout off, on the accelerator where there is one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import torch

from lmforge.formats.packing import mismatched
from lmforge.formats.tokens import Tokens
from lmforge.stage.reference import reference


def answer_logprob(model: Any, ids: list[int], mask: list[int]) -> float:
    """By transformers alone: the log-probability of the supervised tokens of one sequence."""
    with torch.no_grad():
        table = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(table[at, ids[at + 1]]) for at in range(len(ids) - 1) if mask[at + 1])


def examples(tokens: Path, split: str) -> list[tuple[list[int], list[int]]]:
    read = Tokens(tokens, split)
    return [(ids.tolist(), mask.tolist()) for ids, mask in map(read.example, range(len(read)))]


def run(tokens: Path, view: str, folder: Path) -> tuple[Any, Path]:
    """The reference step of a model with dropout, saved in bfloat16; the model in float32 and the folder it filled."""
    model = tiny_run.tiny_model(dropout=0.5).bfloat16()
    model.save_pretrained(folder / "policy")
    context = replace(tiny_run.context(folder), inputs={"checkpoint": folder / "policy", f"tokens:{view}": tokens})
    context.out.mkdir()
    counted = reference(context)
    assert counted == {f"examples_{split}": len(examples(tokens, split)) for split in ("train", "heldout")}
    return model.float().eval(), context.out


def check_pairs(tokens: Path, folder: Path) -> None:
    model, out = run(tokens, "preference", folder)
    for split in ("train", "heldout"):
        made = np.load(out / f"{split}.npy")
        assert made.dtype == np.float32
        np.testing.assert_allclose(made, [answer_logprob(model, *one) for one in examples(tokens, split)], rtol=1e-5, atol=1e-4)


def test_it_is_float32_without_dropout_whatever_the_weights_were_saved_in(preference: Path, tmp_path: Path) -> None:
    check_pairs(preference, tmp_path)


def test_single_answers_and_those_of_other_prompts(feedback: Path, tmp_path: Path) -> None:
    model, out = run(feedback, "feedback", tmp_path)
    for split in ("train", "heldout"):
        rows = examples(feedback, split)
        np.testing.assert_allclose(np.load(out / f"{split}.npy"), [answer_logprob(model, *one) for one in rows], rtol=1e-5, atol=1e-4)
        others = []
        for index, (ids, mask) in enumerate(rows):
            other_ids, other_mask = rows[mismatched(index, len(rows))]
            start, begin = mask.index(1), other_mask.index(1)
            both = (ids[:start] + other_ids[begin:])[:16], (mask[:start] + other_mask[begin:])[:16]
            others.append(answer_logprob(model, *both))
        np.testing.assert_allclose(np.load(out / f"{split}_kl.npy"), others, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_it_runs_on_the_accelerator(preference: Path, tmp_path: Path) -> None:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    check_pairs(preference, tmp_path)
    assert torch.cuda.max_memory_allocated() > before
