"""What the tests of the checks share: sound objectives, and tokens, references and tokenizers to break."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import torch

from lmforge.formats.tokens import Tokens
from lmforge.stage.reference import answer_scores, pair_scores
from lmforge.training.losses.preference import dpo, orpo
from lmforge.training.objectives.causal_lm import CausalLM
from lmforge.training.objectives.kto import Kto
from lmforge.training.objectives.preference import Preference
from lmforge.training.order import RowOrder
from lmforge.training.preflight import preflight

SEQ_LEN, SEED = 32, 3


def check(objective: Any, model: Any, folder: Path, tokens: Path, checkpoint: Path | None = None, **inputs: Path) -> dict[str, float]:
    context = replace(tiny_run.context(folder), inputs=inputs)
    told = tiny_run.recipe(seq_len=SEQ_LEN, seed=SEED)
    return preflight(objective, model, tokens=tokens, checkpoint=checkpoint, recipe=told, context=context)


def loss_of_dpo(pairs: Any) -> Any:
    return dpo(pairs, beta=0.1, label_smoothing=0.0, length_normalized=False)


def write_reference(folder: Path, tokens: Path, model: Any, of: Callable[..., Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, values in of(copy.deepcopy(model).eval(), Tokens(tokens, "train")):
        np.save(folder / f"train{name}.npy", values)
    return folder


def loss_of_orpo(pairs: Any) -> Any:
    return orpo(pairs, beta=0.1)


def scorer(model: Any) -> Any:
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(1)
    return LlamaForSequenceClassification(copy.deepcopy(model.config).__class__(**{**model.config.to_dict(), "num_labels": 1}))


def sound(view: str, tokens: Path, folder: Path, model: Any) -> Any:
    if view in ("text", "chat"):
        return CausalLM(tokens, SEQ_LEN)
    if view == "preference":
        return Preference(tokens, write_reference(folder, tokens, model, pair_scores), loss_of_dpo)
    return Kto(tokens, write_reference(folder, tokens, model, answer_scores), beta=0.1, desirable_weight=1.0, undesirable_weight=1.0)


def edited(tokens: Path, folder: Path, edit: Callable[[int, list[int], list[int]], None], **changes: Any) -> Path:
    """The same tokens with every example's ids and mask through `edit(example, ids, mask)`."""
    read = Tokens(tokens, "train")
    examples = [tuple(part.astype(int).tolist() for part in read.example(index)) for index in range(len(read))]
    for index, (ids, mask) in enumerate(examples):
        edit(index, ids, mask)
    folder.mkdir()
    (folder / "meta.json").write_text(json.dumps({**json.loads((tokens / "meta.json").read_text()), **changes}))
    kinds = None if read.labels is None else [bool(one) for one in read.labels]
    tiny_run.write_split(folder, "train", read.meta["view"], [ids for ids, _ in examples], [mask for _, mask in examples], labels=kinds)
    return folder


def first_rows(rows: Any, count: int = 8) -> list[int]:
    return RowOrder(len(rows), SEED).take(0, count).tolist()


def named(error: pytest.ExceptionInfo[Any]) -> int:
    found = re.search(r"train: example (\d+) \(ids \[", str(error.value))
    assert found, str(error.value)
    assert "\n" not in str(error.value)
    return int(found[1])


def write_tokenizer(folder: Path, words: Sequence[str], template: str | None, added: Sequence[str] = ()) -> Path:
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
    made.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=words[0])
    tokenizer.add_tokens([AddedToken(one, special=True) for one in added], special_tokens=True)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


WORDS = ["<eos>", *(f"w{index}" for index in range(1, tiny_run.VOCABULARY))]
