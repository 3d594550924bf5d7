"""Objectives against TRL's trainers: the loss and every gradient on TRL's own batch, to 1e-6, and the metrics of the same name."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from lmforge.formats.tokens import Tokens
from lmforge.stage.reference import answer_scores, pair_scores
from lmforge.training import shared_prompt
from lmforge.training.losses.preference import dpo, hinge, ipo, orpo, simpo
from lmforge.training.objective import Objective, Preparing
from lmforge.training.objectives.causal_lm import CausalLM
from lmforge.training.objectives.kto import Kto
from lmforge.training.objectives.preference import Preference
from lmforge.training.objectives.reward import BradleyTerry
from lmforge.training.objectives.whole_nll import WholeNll
from lmforge.training.order import GlobalBatch

PAIRS = [("w1 w2", " w3 w4 w5", " w6"), ("w7 w8 w9", " w10", " w11 w12"), ("w20", " w21 w22", " w23 w24 w25 w26")]
SHORT = [("w1", " w3 w4", " w6"), ("w7", " w10 w8", " w11 w12")]  # one token of prompt, chosen answers of one length
PAD = tiny_run.VOCABULARY - 1
LEAF = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"}


def words() -> PreTrainedTokenizerFast:
    """A word a token; what pads ends nothing."""
    table = Tokenizer(WordLevel({"<eos>": 0, "<pad>": PAD, **{f"w{index}": index for index in range(1, PAD)}}, unk_token="<eos>"))
    table.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=table, eos_token="<eos>", pad_token="<pad>")


def policy() -> Any:
    """A model that is not the reference."""
    model = tiny_run.tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def options(kind: Any, folder: Path, **settings: Any) -> Any:
    return kind(output_dir=str(folder / "trl"), use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False, **settings)


def rows_of(pairs: list[tuple[str, str, str]]) -> Dataset:
    return Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in pairs])


def unpadded(ids: Tensor, attention: Tensor, supervised: Tensor) -> tuple[list[list[int]], list[list[int]]]:
    """The real tokens of each row, and which of them are supervised."""
    real = [one.bool() for one in attention]
    return ([row[keep].tolist() for row, keep in zip(one, real, strict=True)] for one in (ids, supervised.long()))  # type: ignore[return-value]


def interleaved(chosen: list[list[int]], rejected: list[list[int]]) -> list[list[int]]:
    return [one for pair in zip(chosen, rejected, strict=True) for one in pair]


def pair_tokens(folder: Path, ids: list[list[int]], masks: list[list[int]], margins: list[float] | None = None) -> Path:
    """TRL's batch, all chosen and then all rejected, as our tokens."""
    half = len(ids) // 2
    tiny_run.write_split(folder, "train", "preference", interleaved(ids[:half], ids[half:]), interleaved(masks[:half], masks[half:]), margins=margins)
    return folder


def write_reference(folder: Path, model: Any, tokens: Path, of: Callable[..., Any]) -> Path:
    folder.mkdir()
    for name, values in of(model, Tokens(tokens, "train")):
        np.save(folder / f"train{name}.npy", values)
    return folder


def agree(objective: Objective, model: Any, expected: Tensor) -> dict[str, float]:
    """The loss and its gradients are TRL's, with a pair's prompt computed once and with plain rows; the metrics as means are returned."""
    theirs = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    for worth in (math.inf, 0.0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shared_prompt, "WORTH", worth)
            metrics = compare(objective, model, float(expected.detach()), theirs)
    return metrics


def compare(objective: Objective, model: Any, expected: float, theirs: tuple[Tensor | None, ...]) -> dict[str, float]:
    named = dict(model.named_parameters())
    rows = objective.dataset("train")
    batch = rows.batch(range(len(rows)))
    if isinstance(objective, Preparing):
        with torch.no_grad():
            batch = objective.prepare(model, GlobalBatch(0, [batch], objective.weight(batch), 0)).micro_batches[0]
    parts = objective.loss(model, batch)
    assert float(parts.sum.detach() / parts.weight) == pytest.approx(expected, abs=1e-6)
    ours = torch.autograd.grad(parts.sum / parts.weight, list(named.values()), allow_unused=True)
    for name, one, other in zip(named, ours, theirs, strict=True):
        if other is not None or one is not None:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    return {name: float(value) / float(parts.weight) for name, value in parts.metrics.items()}


CASES = {
    "sigmoid": (partial(dpo, beta=0.3, label_smoothing=0.0, length_normalized=False), {}, 3),
    "sigmoid_norm": (partial(dpo, beta=0.3, label_smoothing=0.0, length_normalized=True), {}, 3),
    "aot": (partial(dpo, beta=0.3, label_smoothing=0.1, length_normalized=False), {"label_smoothing": 0.1}, 1),  # of one pair it is conservative DPO
    "ipo": (partial(ipo, beta=0.3, average_log_ratio=True), {}, 3),
    "hinge": (partial(hinge, beta=0.3), {}, 3),
}


@pytest.mark.parametrize("loss_type", CASES)
def test_losses_with_a_reference_are_dpo_trainers(loss_type: str, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    loss, settings, count = CASES[loss_type]
    model, reference = policy(), tiny_run.tiny_llama()
    made = options(DPOConfig, tmp_path, loss_type=[loss_type], beta=0.3, **settings)
    trainer = DPOTrainer(model, reference, made, train_dataset=rows_of(PAIRS), processing_class=words())
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(count)])
    expected = trainer.compute_loss(trainer.model, dict(batch))
    tokens = pair_tokens(tmp_path / "tokens", *unpadded(batch["input_ids"], batch["attention_mask"], batch["completion_mask"]))
    scores = write_reference(tmp_path / "reference", reference, tokens, pair_scores)
    metrics = agree(Preference(tokens, scores, loss), model, expected)
    if loss_type in ("sigmoid", "aot", "hinge"):  # TRL's rewards are of the summed log-ratios, whatever the loss sees
        logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        assert {name: metrics[name] for name in LEAF} == pytest.approx({name: logged[name] for name in LEAF}, abs=1e-5)


def test_ipo_of_the_paper_is_not_trls(tmp_path: Path) -> None:
    """TRL's DPOTrainer averages over tokens; with the paper's sums it is equal where every answer has one token, and only there."""
    from trl import DPOConfig, DPOTrainer

    model, reference = policy(), tiny_run.tiny_llama()
    trainer = DPOTrainer(model, reference, options(DPOConfig, tmp_path, loss_type=["ipo"], beta=0.3), train_dataset=rows_of(PAIRS), processing_class=words())
    for name, cut in (("one", True), ("all", False)):
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(3)])
        if cut:
            later = (batch["completion_mask"].cumsum(1) > 1) & batch["completion_mask"].bool()
            batch["completion_mask"] = batch["completion_mask"].masked_fill(later, 0)
        expected = trainer.compute_loss(trainer.model, dict(batch))
        tokens = pair_tokens(tmp_path / name, *unpadded(batch["input_ids"], batch["attention_mask"], batch["completion_mask"]))
        scores = write_reference(tmp_path / f"reference-{name}", reference, tokens, pair_scores)
        objective = Preference(tokens, scores, partial(ipo, beta=0.3, average_log_ratio=False))
        if cut:
            agree(objective, model, expected)
        else:
            parts = objective.loss(model, objective.dataset("train").batch(range(3)))
            assert float(parts.sum.detach() / parts.weight) != pytest.approx(float(expected.detach()), rel=1e-2)


def experimental(batch: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Ids and masks of a batch of TRL's experimental trainers, all chosen and then all rejected."""
    both = [unpadded(batch[f"{name}_input_ids"], batch[f"{name}_attention_mask"], batch[f"{name}_labels"] != -100) for name in ("chosen", "rejected")]
    (ids, masks), (other_ids, other_masks) = both
    return [*ids, *other_ids], [*masks, *other_masks]


def test_simpo_is_cpo_trainers(tmp_path: Path) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    model = policy()
    made = options(CPOConfig, tmp_path, loss_type="simpo", beta=2.0, simpo_gamma=0.7, cpo_alpha=0.0)
    trainer = CPOTrainer(model, made, train_dataset=rows_of(PAIRS), processing_class=words())
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(3)])
    expected, logged = trainer.get_batch_loss_metrics(model, batch)
    tokens = pair_tokens(tmp_path / "tokens", *experimental(batch))
    metrics = agree(Preference(tokens, None, partial(simpo, beta=2.0, gamma=0.7)), model, expected)
    shared = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}
    assert {name: metrics[name] for name in shared} == pytest.approx({name: logged[name] for name in shared}, abs=1e-5)


def test_orpo_over_the_prompt_is_orpo_trainers(tmp_path: Path) -> None:
    """The NLL of the chosen example's every token, weighted by tokens; prompts and answers of uneven length."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    model = policy()
    trainer = ORPOTrainer(model, options(ORPOConfig, tmp_path, beta=0.7), train_dataset=rows_of(PAIRS), processing_class=words())
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(3)])
    expected, logged = trainer.get_batch_loss_metrics(model, batch)
    metrics = agree(WholeNll(pair_tokens(tmp_path / "tokens", *experimental(batch)), None, partial(orpo, beta=0.7)), model, expected)
    assert metrics["nll/chosen"] == pytest.approx(logged["nll_loss"], abs=1e-5)
    shared = {"rewards/accuracies"}
    assert {name: metrics[name] for name in shared} == pytest.approx({name: logged[name] for name in shared})


@pytest.mark.parametrize("whole", [True, False])
def test_orpo_is_orpo_trainers_but_for_the_nll_of_the_prompt(whole: bool, tmp_path: Path) -> None:
    """TRL's NLL is over the prompt too and weighted by tokens. Where neither shows, all is equal; else all but the NLL."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    model = policy()
    trainer = ORPOTrainer(model, options(ORPOConfig, tmp_path, beta=0.7), train_dataset=rows_of(SHORT if whole else PAIRS), processing_class=words())
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(2 if whole else 3)])
    expected, logged = trainer.get_batch_loss_metrics(model, batch)
    ids, masks = experimental(batch)
    objective = Preference(pair_tokens(tmp_path / "tokens", ids, masks), None, partial(orpo, beta=0.7))
    if whole:
        metrics = agree(objective, model, expected)
        assert metrics["nll/chosen"] == pytest.approx(logged["nll_loss"], abs=1e-5)
        return
    chosen, rejected, _, _, theirs = trainer.concatenated_forward(model, batch)[:5]
    assert float(theirs.detach()) != pytest.approx(-float(chosen.detach().mean()), rel=1e-3)
    terms = trainer.odds_ratio_loss(chosen, rejected)[0]
    agree(objective, model, -chosen.mean() - terms.mean())


def test_kto_is_kto_trainers(tmp_path: Path) -> None:
    """TRL gives each prompt the answer before it; ours, half the split on, is the same for three answers in reverse."""
    from trl import KTOConfig, KTOTrainer

    model, reference = tiny_run.tiny_llama(), policy()  # this way round the baseline is not clamped to 0
    data = Dataset.from_list([{"prompt": p, "completion": a, "label": label} for (p, a, _), label in zip(PAIRS, (True, False, True), strict=True)])
    made = options(KTOConfig, tmp_path, beta=0.3, desirable_weight=1.5, undesirable_weight=0.7, per_device_train_batch_size=3)
    trainer = KTOTrainer(model, reference, made, train_dataset=data, processing_class=words())
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(3)])
    expected = trainer.compute_loss(trainer.model, dict(batch))
    ids, masks = unpadded(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    tiny_run.write_split(
        tmp_path / "tokens", "train", "feedback", list(ids)[::-1], list(masks)[::-1], labels=[bool(one) for one in batch["label"].flip(0)], seq_len=16
    )
    scores = write_reference(tmp_path / "reference", reference, tmp_path / "tokens", answer_scores)
    objective = Kto(tmp_path / "tokens", scores, 0.3, 1.5, 0.7)
    metrics = {**agree(objective, model, expected), **objective.figures()}
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert logged["kl"] > 0.01
    shared = {"kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"}
    assert {name: metrics[name] for name in shared} == pytest.approx({name: logged[name] for name in shared}, abs=1e-5)


@pytest.mark.parametrize(("margins", "centering"), [(None, 0.0), ([0.5, 0.0, 2.0], 0.1)])
def test_reward_model_is_reward_trainers(margins: list[float] | None, centering: float, tmp_path: Path) -> None:
    from trl import RewardConfig, RewardTrainer

    torch.manual_seed(0)
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=tiny_run.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            max_position_embeddings=64, eos_token_id=0, bos_token_id=0, pad_token_id=PAD, num_labels=1, initializer_range=0.1,
        )
    )  # fmt: skip
    data = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in PAIRS]
    for row, margin in zip(data, margins or [], strict=bool(margins)):
        row["margin"] = margin  # type: ignore[assignment]
    made = options(RewardConfig, tmp_path, center_rewards_coefficient=centering)
    trainer = RewardTrainer(model, made, train_dataset=Dataset.from_list(data), processing_class=words())
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(3)])
    expected = trainer.compute_loss(trainer.model, dict(batch))
    ids, _ = unpadded(batch["input_ids"], batch["attention_mask"], batch["attention_mask"])
    prompts = [len(pair[0].split()) for pair in PAIRS] * 2
    ids = list(ids)
    masks = [[0] * prompt + [1] * (len(one) - prompt) for one, prompt in zip(ids, prompts, strict=True)]
    metrics = agree(BradleyTerry(pair_tokens(tmp_path / "tokens", ids, masks, margins), 0.0, centering), model, expected)
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert {name: metrics[name] for name in ("accuracy", "margin")} == pytest.approx({name: logged[name] for name in ("accuracy", "margin")}, abs=1e-5)


def test_sft_is_sft_trainers(tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    model = policy()
    data = Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer, _ in PAIRS])
    trainer = SFTTrainer(model, options(SFTConfig, tmp_path, completion_only_loss=True), train_dataset=data, processing_class=words())
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(3)])
    expected = trainer.compute_loss(trainer.model, dict(batch))
    attention = batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(batch["input_ids"])
    ids, masks = unpadded(batch["input_ids"], attention, batch["labels"] != -100)
    tiny_run.write_split(tmp_path / "tokens", "train", "chat", list(ids), list(masks))
    agree(CausalLM(tmp_path / "tokens", 16), model, expected)


def test_the_oracle_can_disagree(tmp_path: Path) -> None:
    tokens = tiny_run.write_tokens(tmp_path, "preference", examples=4)
    with pytest.raises(AssertionError):
        agree(Preference(tokens, None, partial(simpo, beta=2.0, gamma=0.7)), policy(), torch.zeros((), requires_grad=True))
