"""Preflight on what is sound: it passes, it measures small differences, and it leaves nothing changed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import torch

from lmforge.errors import DataError, RunError
from lmforge.training.objectives.causal_lm import CausalLM
from lmforge.training.objectives.preference import Preference
from lmforge.training.objectives.reward import BradleyTerry
from lmforge.training.preflight import begins, preflight
from tests.training.checks.broken import SEED, SEQ_LEN, check, edited, loss_of_orpo, scorer, sound

MEASURED = {
    "text": {"packing", "accumulation"},
    "chat": {"packing", "accumulation"},
    "preference": {"shared_prompts", "log_ratio", "accumulation"},
    "feedback": {"log_ratio", "accumulation"},
}


@pytest.mark.parametrize("view", MEASURED)
@pytest.mark.parametrize("make", [tiny_run.tiny_llama, lambda: tiny_run.tiny_model(dropout=0.5)], ids=["llama", "gpt2 with dropout"])
def test_what_is_sound_passes_with_small_differences(view: str, make: Callable[[], Any], tmp_path: Path) -> None:
    tokens = tiny_run.write_tokens(tmp_path / "tokens", view, seq_len=20)
    model = make().train()
    found = check(sound(view, tokens, tmp_path / "reference", model), model, tmp_path, tokens)
    assert found.keys() == MEASURED[view]
    assert all(0 <= value < 1e-5 for value in found.values())
    assert any(found.values()), "nothing was compared"


def test_a_reward_model_passes(tmp_path: Path) -> None:
    pairs = tiny_run.write_tokens(tmp_path / "tokens", "preference")
    found = check(BradleyTerry(pairs, 0.0, 0.01), scorer(tiny_run.tiny_llama()), tmp_path, pairs)
    assert found.keys() == {"accumulation"}
    assert 0 < found["accumulation"] < 1e-5


def test_a_loss_without_a_reference_has_no_log_ratio(tmp_path: Path) -> None:
    pairs = tiny_run.write_tokens(tmp_path / "tokens", "preference")
    found = check(Preference(pairs, None, loss_of_orpo), tiny_run.tiny_llama(), tmp_path, pairs)
    assert found.keys() == {"shared_prompts", "accumulation"}


@pytest.mark.parametrize("view", MEASURED)
def test_nothing_is_left_changed(view: str, tmp_path: Path) -> None:
    tokens = tiny_run.write_tokens(tmp_path / "tokens", view)
    model = tiny_run.tiny_model(dropout=0.5).train()
    model.transformer.h[0].eval()  # one part in another mode than the rest
    objective = sound(view, tokens, tmp_path / "reference", model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    held = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    mark = model.transformer.wte.weight.grad = torch.ones_like(model.transformer.wte.weight)
    check(objective, model, tmp_path, tokens)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert (random.getstate(), np.random.get_state()[1].tolist()) == held[:2]
    assert torch.equal(torch.get_rng_state(), held[2])
    assert model.transformer.wte.weight.grad is mark
    assert torch.equal(mark, torch.ones_like(mark))
    assert all(one.grad is None for name, one in model.named_parameters() if name != "transformer.wte.weight")
    if view == "feedback":
        assert objective.figures() == {}, "the checks were counted as training"


@pytest.mark.parametrize("view", ["chat", "feedback"])
def test_a_run_ends_in_the_same_weights_whether_preflight_ran_or_not(view: str, tmp_path: Path) -> None:
    from lmforge.training.fit import fit

    tokens, ends, said = tiny_run.write_tokens(tmp_path / "tokens", view), [], []
    for name, looks in (("with", True), ("without", False)):
        model, report = tiny_run.tiny_model(dropout=0.3), tiny_run.Lines()
        objective = sound(view, tokens, tmp_path / "reference", model)
        (tmp_path / name).mkdir()
        context = tiny_run.context(tmp_path / name, report)
        told = tiny_run.recipe(seq_len=SEQ_LEN)
        torch.manual_seed(5)
        if looks:
            assert preflight(objective, model, tokens=tokens, checkpoint=None, recipe=told, context=context)
        fit(told, objective, model, context, lambda trained: ends.append({key: value.clone() for key, value in trained.state_dict().items()}))
        said.append([{key: value for key, value in line.items() if key != "tokens_per_s"} for line in report.logged])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert said[0] == said[1]


@pytest.mark.parametrize("view", MEASURED)
def test_a_model_that_stands_in_is_tried_and_its_weights_are_not_compared(view: str, tmp_path: Path) -> None:
    """For a model that no rank holds whole: a small one goes through what any weights show, and the laid-out one through what only its own do."""
    tokens = tiny_run.write_tokens(tmp_path / "tokens", view, seq_len=20)
    model, other, told = tiny_run.tiny_llama(), tiny_run.tiny_model(), tiny_run.recipe(seq_len=SEQ_LEN, seed=SEED)
    objective = sound(view, tokens, tmp_path / "reference", model)
    found = preflight(objective, other, tokens=tokens, checkpoint=None, recipe=told, context=tiny_run.context(tmp_path), stands_in=True)
    assert found.keys() == MEASURED[view] - {"log_ratio"}
    assert max(found.values()) < 1e-5
    assert preflight(objective, None, tokens=tokens, checkpoint=None, recipe=told, context=tiny_run.context(tmp_path), stands_in=True) == {}
    model.train()
    assert begins(objective, tokens, told, model, torch.device("cpu")) < 1e-5
    assert model.training
    if "log_ratio" in MEASURED[view]:
        with pytest.raises(RunError, match="off the reference's before the first step"):
            begins(objective, tokens, told, other, torch.device("cpu"))


def test_a_rank_without_a_model_looks_at_the_rows(tmp_path: Path) -> None:
    tokens = tiny_run.write_tokens(tmp_path / "tokens", "chat", seq_len=20)

    def unsupervised(index: int, ids: list[int], mask: list[int]) -> None:
        mask[:] = [0] * len(mask)

    with pytest.raises(DataError, match="none of its"):
        check(CausalLM(edited(tokens, tmp_path / "edited", unsupervised), SEQ_LEN), None, tmp_path, tmp_path / "edited")


def test_a_run_that_goes_on_is_not_looked_at_again(chat: Path, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "index.json").write_text('{"step": 2}')
    assert check(CausalLM(chat, SEQ_LEN), None, tmp_path, chat) == {}
