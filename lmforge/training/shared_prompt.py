"""The prompt of a pair is computed once for both answers, where the model's architecture gives exactly what two plain rows would."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from lmforge.inference.forward import IGNORE, base, virtual_tokens
from lmforge.training.objective import Batch

# Architectures whose tokens meet in attention only, under a mask that is handed in, at places that position_ids give. A test compares each with
# plain rows; others (ALiBi, recurrent or convolutional layers, attention chunks) get plain rows.
EXACT = frozenset(
    {
        "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral", "mixtral", "olmo", "olmo2", "olmo3", "olmoe", "phi", "phi3",
        "qwen2", "qwen3", "qwen3_moe", "smollm3", "starcoder2",
    }
)  # fmt: skip
ROPES = frozenset({"default", "linear", "llama3", "yarn", "proportional"})  # rotations that depend on a token's place alone, not on the row's length
WORTH = 0.9  # a mask keeps attention from its fastest form, so a few tokens less would be no gain


def shares(model: Any, batch: Batch) -> bool:
    """Whether to run the rows of `formats.packing.collate_shared` as they are; else `unshare` them first. Reads shapes, not the device."""
    rows, width = batch["unshared"].shape
    answers = batch["input_ids"].shape[1] - batch["prompt_mask"].shape[1]
    worth = answers > 2 and batch["input_ids"].numel() <= WORTH * rows * width
    return worth and not virtual_tokens(model) and exact(base(model).config, width)


def exact(config: Any, longest: int) -> bool:
    """Whether a transformers model gives the same with a shared prompt, for examples of up to `longest` tokens."""
    window = getattr(config, "sliding_window", None)
    return (
        config.model_type in EXACT
        and config._attn_implementation in ("sdpa", "eager")
        and getattr(config, "is_causal", True)
        and not getattr(config, "use_bidirectional_attention", False)
        and (window is None or window >= longest)
        and _rope_types(getattr(config, "rope_parameters", None)) <= ROPES
    )


def _rope_types(parameters: Any) -> set[str]:
    """The kinds of rotary embedding in a config, which may have one for each kind of layer."""
    if not isinstance(parameters, Mapping):
        return set()
    here = {str(parameters["rope_type"])} if "rope_type" in parameters else set()
    return here.union(*(_rope_types(value) for value in parameters.values()))


def mask(model: Any, batch: Batch) -> Tensor:
    """Who sees whom, as the model's attention takes it: what an answer sees, [rows, 1, answer, prompt + answer] (sdpa), or all (eager)."""
    prompt, network = batch["prompt_mask"].bool(), base(model)
    rows, shared = prompt.shape
    answer = (batch["input_ids"].shape[1] - shared) // 2
    own = _causal(answer, prompt.device).expand(rows, -1, -1)
    before = prompt[:, None].expand(-1, answer, -1)
    if network.config._attn_implementation == "sdpa":
        return torch.cat([before, own], 2)[:, None]
    none = torch.zeros_like(own)
    first = torch.cat([_causal(shared, prompt.device), prompt.new_zeros(shared, 2 * answer)], 1).expand(rows, -1, -1)
    seen = torch.cat([first, torch.cat([before, own, none], 2), torch.cat([before, none, own], 2)], 1)[:, None]
    return torch.zeros(seen.shape, dtype=network.dtype, device=seen.device).masked_fill(~seen, torch.finfo(network.dtype).min)


def _causal(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> tuple[Tensor, None]:
    """transformers' sdpa attention, and with a `mask` from here the same part by part: neither answer is compared with the other or before the prompt's end.

    query [rows, heads, length, size]. No other mask of more than one query has as many queries and keys together as the row has tokens.
    """
    if attention_mask is None or attention_mask.shape[2] == 1 or attention_mask.shape[2] + attention_mask.shape[3] != query.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    answer = attention_mask.shape[2]
    prompt = query.shape[2] - 2 * answer
    shared = slice(0, prompt)
    parts = [sdpa_attention_forward(module, query[:, :, shared], key[:, :, shared], value[:, :, shared], None, **options)[0]] if prompt else []
    for start in (prompt, prompt + answer):
        own = slice(start, start + answer)
        keys, values = (torch.cat([one[:, :, shared], one[:, :, own]], 2) for one in (key, value))
        parts.append(sdpa_attention_forward(module, query[:, :, own], keys, values, attention_mask, **options)[0])
    return torch.cat(parts, 1), None


AttentionInterface.register("sdpa", attend)


def unshare(batch: Batch) -> Batch:
    """Plain rows, chosen and rejected in turn: {input_ids, labels, position_ids, ends, keep}, `ends` [2 * pairs, 1]."""
    places = batch["unshared"]
    padding, inside = places < 0, places.clamp_min(0)
    ids, labels = (batch[name].repeat_interleave(2, 0).gather(1, inside) for name in ("input_ids", "labels"))
    return {
        "input_ids": ids,  # what stands in the padding on the right is never seen
        "labels": labels.masked_fill(padding, IGNORE),
        "position_ids": torch.arange(places.shape[1], device=places.device).expand_as(places),
        "ends": (~padding).sum(1, keepdim=True) - 1,
        "keep": batch["unshared_keep"],
    }
