"""The reference pass of preference stages: float32, dropout off, on the accelerator where there is one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch

from lmforge.formats.tokens import Tokens
from lmforge.stage.train import reference
from lmforge.training.objectives.dpo import PairRows, pair_logprobs


def expected(model: torch.nn.Module, tokens: Path, split: str) -> np.ndarray:
    rows = PairRows(Tokens(tokens, split))
    with torch.no_grad():
        return np.concatenate([pair_logprobs(model.float().eval(), rows.batch([index])).numpy() for index in range(len(rows))])


def run(preference: Path, folder: Path) -> None:
    model = tiny_run.tiny_model(dropout=0.5).bfloat16()
    model.save_pretrained(folder / "policy")
    context = replace(tiny_run.context(folder), inputs={"checkpoint": folder / "policy", "tokens:preference": preference})
    context.out.mkdir()
    counted = reference(context)
    for split in ("train", "heldout"):
        made = np.load(context.out / f"{split}.npy")
        assert made.dtype == np.float32
        assert len(made) == counted[f"examples_{split}"]
        np.testing.assert_allclose(made, expected(model, preference, split), rtol=1e-5, atol=1e-4)


def test_it_is_float32_without_dropout_whatever_the_weights_were_saved_in(preference: Path, tmp_path: Path) -> None:
    run(preference, tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_it_runs_on_the_accelerator(preference: Path, tmp_path: Path) -> None:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    run(preference, tmp_path)
    assert torch.cuda.max_memory_allocated() > before
