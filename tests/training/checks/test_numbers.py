"""Models, losses and references that are really broken: each failure is one line, and names the example."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_run
import torch

from lmforge.errors import RunError
from lmforge.training.objective import Batch, LossParts
from lmforge.training.objectives.causal_lm import CausalLM
from lmforge.training.objectives.preference import Preference
from tests.training.checks.broken import SEQ_LEN, check, first_rows, loss_of_orpo, named, sound


class Leaking(torch.nn.Module):
    """A causal LM whose attention ignores the borders between documents, as most did: it takes no notice of what it is told of a row."""

    def __init__(self, *ignored: str) -> None:
        super().__init__()
        self.inner, self.ignored = tiny_run.tiny_llama(), ignored
        self.config = self.inner.config

    def forward(self, **inputs: Any) -> Any:
        return self.inner(**{name: value for name, value in inputs.items() if name not in self.ignored})


def test_a_model_that_sees_across_documents_is_refused(chats: Path, tmp_path: Path) -> None:
    objective = CausalLM(chats, SEQ_LEN)
    with pytest.raises(RunError, match=r"the loss of a token is [0-9.]+ nats off when the example shares a row with others \(allowed: 0.0001\)") as error:
        check(objective, Leaking("position_ids"), tmp_path, chats)
    rows = objective.dataset("train")
    packed = next(index for index in first_rows(rows) if len(rows.rows[index]) > 1)
    second = int(np.searchsorted(rows.tokens.offsets, rows.rows[packed][1][0], side="right")) - 1
    assert named(error) == second  # the first document of a row sees nothing before it


def test_a_model_that_ignores_the_mask_of_shared_prompts_is_refused(pairs: Path, tmp_path: Path) -> None:
    objective = Preference(pairs, None, loss_of_orpo)
    with pytest.raises(RunError, match=r"train: pair \d+, rejected \(ids .*: the log-prob of its answer, when the prompt is computed once for the pair, is"):
        check(objective, Leaking("attention_mask"), tmp_path, pairs)


@pytest.mark.parametrize("view", ["preference", "feedback"])
def test_a_reference_of_other_weights_is_refused(view: str, tmp_path: Path) -> None:
    tokens = tiny_run.write_tokens(tmp_path / "tokens", view)
    model = tiny_run.tiny_llama()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight += 0.01
        other.lm_head.weight *= 1.5
    objective = sound(view, tokens, tmp_path / "reference", other)
    where = r"pair \d+, chosen" if view == "preference" else r"example \d+"
    with pytest.raises(RunError, match=where + r" \(ids .*: the policy's log-prob of its answer is [0-9.]+ nats a token off the reference's before the first"):
        check(objective, model, tmp_path, tokens)


def test_a_reference_of_another_split_or_order_is_refused(tmp_path: Path) -> None:
    tokens = tiny_run.write_tokens(tmp_path / "tokens", "feedback")
    model = tiny_run.tiny_llama()
    objective = sound("feedback", tokens, tmp_path / "reference", model)
    values = np.load(tmp_path / "reference" / "train_kl.npy")
    np.save(tmp_path / "reference" / "train_kl.npy", values[::-1].copy())
    with pytest.raises(RunError, match=r"with another prompt's answer, the policy's log-prob of its answer is .*: run the reference step again"):
        check(objective, model, tmp_path, tokens)


@dataclass(frozen=True)
class MeanOfMeans(CausalLM):
    """Each batch's own mean, as so many training loops had it."""

    def loss(self, model: Any, batch: Batch) -> LossParts:
        parts = super().loss(model, batch)
        return LossParts(parts.sum / parts.weight, parts.weight, parts.metrics)


def test_a_gradient_that_depends_on_accumulation_is_refused(chats: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"gradient of this example and the rest of the first 4 rows changes by \d.* when they are taken one by one") as error:
        check(MeanOfMeans(chats, SEQ_LEN), tiny_run.tiny_llama(), tmp_path, chats)
    rows = MeanOfMeans(chats, SEQ_LEN).dataset("train")
    assert named(error) == int(np.searchsorted(rows.tokens.offsets, rows.rows[first_rows(rows)[0]][0][0], side="right")) - 1


class Mixing(Leaking):
    """A model whose rows see each other, as under batch normalization."""

    def forward(self, **inputs: Any) -> Any:
        logits = super().forward(**inputs).logits
        return SimpleNamespace(logits=logits - logits.mean(0))


def test_rows_that_see_each_other_are_refused(chats: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"changes by \d.* when they are taken one by one .*, and rows must not see each other"):
        check(CausalLM(chats, SEQ_LEN, packed=False), Mixing(), tmp_path, chats)


def test_a_model_that_is_not_a_number_fails_every_check(chats: Path, tmp_path: Path) -> None:
    model = tiny_run.tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(RunError, match="is nan nats off"):
        check(CausalLM(chats, SEQ_LEN), model, tmp_path, chats)


def test_half_precision_is_held_to_a_looser_bound(chats: Path, tmp_path: Path) -> None:
    found = check(CausalLM(chats, SEQ_LEN), tiny_run.tiny_llama().bfloat16(), tmp_path, chats)
    assert 1e-4 < max(found.values()) < 5e-2
    with pytest.raises(RunError, match=r"allowed: 0\.05"):
        check(MeanOfMeans(chats, SEQ_LEN), tiny_run.tiny_llama().bfloat16(), tmp_path, chats)


def test_a_short_answer_is_allowed_the_rounding_that_a_long_one_averages_out(chats: Path) -> None:
    from lmforge.training.checks import numbers

    rows: Any = SimpleNamespace(examples=(0, 1), name=lambda example: f"example {example}")
    off, tokens = torch.tensor([0.2, 0.04 * 100]), torch.tensor([1, 100])
    assert numbers._compare(rows, off, torch.zeros(2), tokens, 5e-2, "{}", "mend") == pytest.approx(0.2)
    with pytest.raises(RunError, match=r"example 1: 0\.06 .*allowed: 0\.05"):
        numbers._compare(rows, torch.tensor([0.2, 6.0]), torch.zeros(2), tokens, 5e-2, "{:.2g}", "mend")
    with pytest.raises(RunError, match=r"example 0: 0\.4 .*allowed: 0\.3"):
        numbers._compare(rows, torch.tensor([0.4, 0.0]), torch.zeros(2), tokens, 5e-2, "{:.2g}", "mend")


def test_a_large_model_is_compared_by_its_smallest_parameters(chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmforge.training.checks import numbers

    monkeypatch.setattr(numbers, "MOST_GRADIENTS", 2000)
    chosen = numbers._some(tiny_run.tiny_llama())
    assert 0 < sum(one.numel() for one in chosen) <= 2000
    with pytest.raises(RunError, match="taken one by one"):
        check(MeanOfMeans(chats, SEQ_LEN), tiny_run.tiny_llama(), tmp_path, chats)
    monkeypatch.setattr(numbers, "MOST_GRADIENTS", 1)
    assert len(numbers._some(tiny_run.tiny_llama())) == 1
