"""Objectives: against transformers, over micro-batches, and in training. Against TRL: test_objectives_trl.py."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import torch

from lmforge.errors import DataError
from lmforge.formats.tokens import Tokens
from lmforge.stage.reference import answer_scores, pair_scores
from lmforge.training.fit import fit
from lmforge.training.losses.preference import dpo, hinge, ipo, orpo, simpo
from lmforge.training.objective import Objective, Preparing
from lmforge.training.objectives.causal_lm import CausalLM
from lmforge.training.objectives.kto import FeedbackRows, Kto
from lmforge.training.objectives.preference import Preference, logprobs
from lmforge.training.objectives.reward import BradleyTerry
from lmforge.training.objectives.whole_nll import WholeNll
from lmforge.training.order import StepData
from lmforge.training.scoring import evaluate

DPO = partial(dpo, beta=0.3, label_smoothing=0.0, length_normalized=False)


@pytest.mark.parametrize("view", ["text", "chat"])
def test_packed_rows_are_what_transformers_says_of_each_document_alone(view: str, tmp_path: Path) -> None:
    tokens = Tokens(tiny_run.write_tokens(tmp_path, view, examples=9, seq_len=64), "train")
    objective, model = CausalLM(tmp_path, 64 if view == "chat" else len(tokens.ids)), tiny_run.tiny_llama()
    rows = objective.dataset("train")
    parts = objective.loss(model, rows.batch(range(len(rows))))
    alone, count = 0.0, 0
    for index in range(len(tokens)):
        ids, mask = (torch.from_numpy(part.astype(np.int64))[None] for part in tokens.example(index))
        supervised = int(mask[:, 1:].sum())
        alone += float(model(input_ids=ids, labels=ids.masked_fill(mask == 0, -100)).loss) * supervised
        count += supervised
    assert int(parts.weight) == count
    assert float(parts.sum) == pytest.approx(alone, rel=1e-5)


def test_evaluate_does_not_depend_on_the_batch(chat: Path) -> None:
    model = tiny_run.tiny_model(dropout=0.5).train()
    one, many = (evaluate(CausalLM(chat, 16), model, "heldout", rows) for rows in (1, 16))
    assert one == pytest.approx(many, rel=1e-5)
    assert model.training
    assert one["loss"] == pytest.approx(np.log(tiny_run.VOCABULARY), rel=0.05)


def test_wrong_view_and_reference_are_refused(preference: Path, feedback: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="preference view cannot be packed"):
        CausalLM(preference, 16).dataset("train")
    with pytest.raises(DataError, match="are tokens of the preference view"):
        FeedbackRows(Tokens(preference, "train"))
    paired, single = Preference(preference, tmp_path, DPO), Kto(feedback, tmp_path, 0.1, 1.0, 1.0)
    for objective in (paired, single):
        with pytest.raises(DataError, match=r"train.npy: cannot be read"):
            objective.dataset("train")
    np.save(tmp_path / "train.npy", np.zeros(3, np.float32))
    np.save(tmp_path / "train_kl.npy", np.zeros(60, np.float32))
    with pytest.raises(DataError, match="for 30 pairs"):
        paired.dataset("train")
    with pytest.raises(DataError, match="for 60 examples"):
        single.dataset("train")


def objectives(preference: Path, feedback: Path, folder: Path) -> dict[str, Objective]:
    """One of each kind, with a reference that is another model."""
    other = tiny_run.tiny_llama(layers=1)
    (folder / "pairs").mkdir()
    for split in ("train", "heldout"):
        for name, values in answer_scores(other, Tokens(feedback, split)):
            np.save(folder / f"{split}{name}.npy", values)
        for name, values in pair_scores(other, Tokens(preference, split)):
            np.save(folder / "pairs" / f"{split}{name}.npy", values)
    losses = {
        "dpo": DPO,
        "ipo": partial(ipo, beta=0.3, average_log_ratio=False),
        "hinge": partial(hinge, beta=0.3),
        "orpo": partial(orpo, beta=0.3),
        "simpo": partial(simpo, beta=2.0, gamma=0.5),
    }
    paired = {name: Preference(preference, None if name in ("orpo", "simpo") else folder / "pairs", loss) for name, loss in losses.items()}
    paired["orpo-whole"] = WholeNll(preference, None, losses["orpo"])
    return {**paired, "kto": Kto(feedback, folder, 0.3, 1.5, 0.7), "reward": BradleyTerry(preference, 0.5, 0.1)}


def gradients(objective: Objective, model: Any, micro: int, rows: int = 8) -> dict[str, torch.Tensor]:
    """Of one global batch, accumulated over its micro-batches as the training module does it."""
    batch = StepData(objective, objective.dataset("train"), rows_per_step=rows, micro_batch_size=micro, seed=0, rank=0, world=1)[1]
    assert len(batch.micro_batches) == rows // micro
    if isinstance(objective, Preparing):
        with torch.no_grad():
            batch = objective.prepare(model, batch)
    model.zero_grad()
    for micro_batch in batch.micro_batches:
        (objective.loss(model, micro_batch).sum / batch.weight).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert any(float(one.abs().max()) > 1e-3 for one in ours.values())
    for name, one in ours.items():
        torch.testing.assert_close(one, theirs[name], rtol=1e-6, atol=1e-6 * max(1.0, float(one.abs().max())))


@pytest.mark.parametrize("name", ["dpo", "ipo", "hinge", "orpo", "orpo-whole", "simpo", "kto", "reward"])
def test_gradients_do_not_depend_on_the_accumulation(name: str, preference: Path, feedback: Path, tmp_path: Path) -> None:
    objective = objectives(preference, feedback, tmp_path)[name]
    model = tiny_run.tiny_reward_model() if name == "reward" else tiny_run.tiny_llama()
    whole = gradients(objective, model, micro=8)
    for micro in (1, 2):
        same(gradients(objective, model, micro=micro), whole)


def test_gradients_of_sft_do_not_depend_on_accumulation_or_packing(tmp_path: Path) -> None:
    tokens = Tokens(tiny_run.write_tokens(tmp_path / "tokens", "chat", examples=8, seq_len=16), "train")
    model = tiny_run.tiny_llama()
    labels = int((tokens.mask == 1).sum())
    for index in range(8):  # 8 x 1, unpacked: each conversation by itself, as transformers has it
        ids, mask = (torch.from_numpy(part.astype(np.int64))[None] for part in tokens.example(index))
        (model(input_ids=ids, labels=ids.masked_fill(mask == 0, -100)).loss * int(mask[:, 1:].sum()) / labels).backward()
    alone = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for seq_len in (16, 64):
        packed = CausalLM(tmp_path / "tokens", seq_len)
        rows = len(packed.dataset("train"))
        assert rows < 8
        for micro in {1, rows}:
            same(gradients(packed, model, micro=micro, rows=rows), alone)


def test_ktos_baseline_is_that_of_the_global_batch(preference: Path, feedback: Path, tmp_path: Path) -> None:
    """Of each micro-batch alone it would be another one, and so would the gradient."""
    objective = objectives(preference, feedback, tmp_path)["kto"]
    assert isinstance(objective, Kto)
    model = tiny_run.tiny_llama()
    data = StepData(objective, objective.dataset("train"), rows_per_step=8, micro_batch_size=2, seed=0, rank=0, world=1)
    batch = data[0]
    with torch.no_grad():
        whole = [float(one["kl"]) for one in objective.prepare(model, batch).micro_batches]
        parts = [float(objective.prepare(model, replace(batch, micro_batches=[one])).micro_batches[0]["kl"]) for one in batch.micro_batches]
    assert len(set(whole)) == 1
    assert len(set(parts)) > 1


def test_ktos_figures_are_means_over_the_answers_of_each_kind(preference: Path, feedback: Path, tmp_path: Path) -> None:
    objective = objectives(preference, feedback, tmp_path)["kto"]
    assert isinstance(objective, Kto)
    model, rows = tiny_run.tiny_llama(), objective.dataset("train")
    batch = rows.batch(range(60))
    with torch.no_grad():
        logps = logprobs(model, batch)[0]
        for part in (rows.batch(range(7)), rows.batch(range(7, 60))):
            objective.loss(model, {**part, "kl": torch.zeros(())})
    rewards, wanted = 0.3 * (logps - batch["reference"]), batch["desirable"]
    figures = objective.figures()
    assert figures["rewards/chosen"] == pytest.approx(float(rewards[wanted].mean()), rel=1e-4)
    assert figures["logps/rejected"] == pytest.approx(float(logps[~wanted].mean()), rel=1e-4)
    assert figures["rewards/margins"] == pytest.approx(float(rewards[wanted].mean() - rewards[~wanted].mean()), rel=1e-3)
    assert objective.figures() == {}


def test_ktos_figures_go_on_after_a_resume(preference: Path, feedback: Path, tmp_path: Path) -> None:
    objective = objectives(preference, feedback, tmp_path)["kto"]
    assert isinstance(objective, Kto)
    model, rows = tiny_run.tiny_llama(), objective.dataset("train")
    objective.loss(model, {**rows.batch(range(7)), "kl": torch.zeros(())})
    resumed = replace(objective)
    resumed.load_state_dict(objective.state_dict())
    for one in (objective, resumed):
        one.loss(model, {**rows.batch(range(7, 20)), "kl": torch.zeros(())})
    assert resumed.figures() == objective.figures() != {}


def test_evaluate_prepares_the_split_as_one_batch(preference: Path, feedback: Path, tmp_path: Path) -> None:
    objective, model = objectives(preference, feedback, tmp_path)["kto"], tiny_run.tiny_llama()
    one, many = (evaluate(objective, model, "heldout", rows) for rows in (1, 16))
    assert one == pytest.approx(many, rel=1e-4)
    assert {"loss", "kl", "rewards/chosen", "rewards/rejected"} <= one.keys()


def test_reward_model_learns_pairs_through_fit(preference: Path, tmp_path: Path) -> None:
    objective, model = BradleyTerry(preference, 0.0, 0.01), tiny_run.tiny_reward_model()
    before = evaluate(objective, model, "train", 16)
    fit(tiny_run.recipe(steps=30, optimizer=tiny_run.adamw(lr=3e-2)), objective, model, tiny_run.context(tmp_path), lambda trained: None)
    after = evaluate(objective, model, "train", 16)
    assert after["accuracy"] > max(0.9, before["accuracy"])
    assert after["margin"] > before["margin"]


@pytest.mark.parametrize("name", ["dpo", "orpo", "orpo-whole", "kto"])
def test_training_moves_the_rewards_apart(name: str, preference: Path, feedback: Path, tmp_path: Path) -> None:
    objective, model = objectives(preference, feedback, tmp_path)[name], tiny_run.tiny_llama()
    before = evaluate(objective, model, "train", 16)
    context = tiny_run.context(tmp_path, micro_batch_size=3)
    logged = fit(tiny_run.recipe(steps=20, optimizer=tiny_run.adamw(lr=3e-3)), objective, model, context, lambda trained: None)
    after = evaluate(objective, model, "train", 16)
    assert after["loss"] < before["loss"]
    assert after["rewards/margins"] > before["rewards/margins"]
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins"} <= logged.keys()
