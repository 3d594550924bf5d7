"""One way to call a causal language model, in training and in evaluation, with or without an adapter."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

IGNORE = -100  # a label that nothing is learned or measured from


def logits(model: Any, batch: Mapping[str, Tensor], keep: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Logits of a batch: [rows, seq_len, vocabulary], or at the positions `keep` [n] of every row: [rows, n, vocabulary].

    `batch` has `input_ids` and `position_ids`, each [rows, seq_len]. A reset of the positions begins another document, which does not see the ones
    before it: without an attention mask and a cache transformers reads the borders from there (masking_utils). Padding is on the right, or a document
    of its own.

    Under a soft prompt (PEFT's prompt tuning) the virtual tokens stand before every row and are cut off again, so logits are aligned with `input_ids`.
    The prompt is read by the first document of a row only, so a row must hold one: ValueError where it holds more. `attention_mask` [rows, seq_len]
    of the batch is used there, for padding on the left.

    `mask` [rows, 1, seq_len, seq_len] says who sees whom instead, as the model's attention takes it; ValueError under a soft prompt.
    """
    virtual = virtual_tokens(model)
    if virtual and mask is not None:
        raise ValueError("a soft prompt and a mask of its own do not go together")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": mask, "use_cache": False}
    if virtual:
        _refuse_packed(batch)
        inputs["attention_mask"] = batch.get("attention_mask")
    else:
        inputs["position_ids"] = batch.get("position_ids")
    wanted = _wanted(batch["input_ids"].shape[1], virtual, keep)
    found: Tensor
    family: Any = type(base(model))
    if wanted is not None and _keeps(family):
        found = model(**inputs, logits_to_keep=wanted).logits
        return found
    found = model(**inputs).logits
    if wanted is None:
        return found
    return found[:, wanted] if isinstance(wanted, Tensor) else found[:, -wanted:]


def virtual_tokens(model: Any) -> int:
    """How many positions a soft prompt takes before every row; 0 without one, or where the adapter is off."""
    config = getattr(model, "active_peft_config", None)
    if config is None or not config.is_prompt_learning or not model.has_active_enabled_adapter:
        return 0
    return int(config.num_virtual_tokens)


@contextlib.contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Models in evaluation mode (dropout off), and then as they were."""
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


def base(model: Any) -> Any:
    """The transformers model within a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _wanted(length: int, virtual: int, keep: Tensor | None) -> Tensor | int | None:
    """transformers' `logits_to_keep`: positions that count the virtual tokens too, the last so many, or None for all."""
    if keep is not None:
        return keep + virtual
    return length if virtual else None


@functools.cache
def _keeps(family: Any) -> bool:
    """Whether the model multiplies only the wanted positions with its output layer."""
    return "logits_to_keep" in inspect.signature(family.forward).parameters


def _refuse_packed(batch: Mapping[str, Tensor]) -> None:
    """ValueError where a row holds a second document; padding that begins a segment of its own is none."""
    positions = batch.get("position_ids")
    if positions is None:
        return
    begins = positions == 0
    if "attention_mask" in batch:
        real = batch["attention_mask"] != 0
    elif "labels" in batch:
        real = batch["labels"] != IGNORE
    else:
        real = torch.ones_like(begins)
    # The documents that begin at or before each position; on the left of the first real token there is padding only.
    if "attention_mask" in batch:
        begins = begins & real
    if bool(((begins.cumsum(1) > 1) & real).any()):
        raise ValueError("rows under a soft prompt hold one sequence each: only the first of a packed row would read the prompt")
