"""Objectives against transformers and TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import torch

from lmforge.errors import DataError
from lmforge.formats.tokens import Tokens
from lmforge.training.objectives.causal_lm import CausalLM
from lmforge.training.objectives.dpo import Dpo, PairRows
from lmforge.training.scoring import evaluate, preference_logprobs


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


def test_wrong_view_and_reference_are_refused(preference: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="preference view cannot be packed"):
        CausalLM(preference, 16).dataset("train")
    dpo = Dpo(preference, tmp_path, beta=0.1, label_smoothing=0.0)
    with pytest.raises(DataError, match=r"train.npy: cannot be read"):
        dpo.dataset("train")
    np.save(tmp_path / "train.npy", np.zeros(3, np.float32))
    with pytest.raises(DataError, match="for 30 pairs"):
        dpo.dataset("train")


def trl_trainer(policy: Any, reference: Any, folder: Path, loss_type: str) -> Any:
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    words = Tokenizer(WordLevel({"<eos>": 0, **{f"w{index}": index for index in range(1, tiny_run.VOCABULARY)}}, unk_token="<eos>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    pairs = [("w1 w2", " w3 w4 w5", " w6"), ("w7 w8 w9", " w10", " w11 w12"), ("w20", " w21 w22", " w23 w24 w25 w26")]
    data = Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in pairs])
    options = DPOConfig(
        output_dir=str(folder), loss_type=[loss_type], beta=0.3, label_smoothing=0.1 if loss_type == "aot" else 0.0, use_cpu=True, bf16=False,
        report_to=[], gradient_checkpointing=False,
    )  # fmt: skip
    return DPOTrainer(policy, reference, options, train_dataset=data, processing_class=tokenizer)


@pytest.mark.parametrize(("loss_type", "smoothing", "pairs"), [("sigmoid", 0.0, 3), ("aot", 0.1, 1)])  # AOT of one pair is DPO with label smoothing
def test_dpo_is_trls(loss_type: str, smoothing: float, pairs: int, tmp_path: Path) -> None:
    policy, reference = tiny_run.tiny_llama(), tiny_run.tiny_llama()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    trainer = trl_trainer(policy, reference, tmp_path / "trl", loss_type)
    theirs = trainer.data_collator([trainer.train_dataset[index] for index in range(pairs)])
    expected = trainer.compute_loss(trainer.model, theirs)
    named = dict(policy.named_parameters())
    expected_gradients = torch.autograd.grad(expected, list(named.values()))

    ids, masks = [], []
    for pair in range(pairs):
        for row in (pair, pairs + pair):  # TRL stacks all chosen, then all rejected
            keep = int(theirs["attention_mask"][row].sum())
            ids.append(theirs["input_ids"][row][:keep].tolist())
            masks.append(theirs["completion_mask"][row][:keep].tolist())
    folder = write_pairs(tmp_path / "tokens", ids, masks)
    (tmp_path / "reference").mkdir()
    np.save(tmp_path / "reference" / "train.npy", preference_logprobs(reference, PairRows(Tokens(folder, "train")), 2))

    objective = Dpo(folder, tmp_path / "reference", beta=0.3, label_smoothing=smoothing)
    parts = objective.loss(policy, objective.dataset("train").batch(range(pairs)))
    assert int(parts.weight) == pairs
    ours = parts.sum / parts.weight
    gradients = torch.autograd.grad(ours, list(named.values()))
    assert float(ours) == pytest.approx(float(expected), abs=1e-6)
    for one, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    if loss_type == "sigmoid":
        logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"):
            assert float(parts.metrics[name]) / pairs == pytest.approx(logged[name], abs=1e-5), name


def write_pairs(folder: Path, ids: list[list[int]], masks: list[list[int]]) -> Path:
    import json

    from lmforge.formats.tokens import SplitWriter

    tiny_run.write_tokens(folder, "preference")
    with SplitWriter(folder, "train", tiny_run.VOCABULARY) as writer:
        writer.extend(ids, masks)
    meta = json.loads((folder / "meta.json").read_text())
    meta["tokens"]["train"] = writer.tokens
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder
