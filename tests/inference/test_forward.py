"""One way to call a model: aligned with its input whatever stands before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor

from lmforge.inference import forward
from lmforge.inference.positions import follow_mask
from lmforge.model.build import from_scratch

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
GROUPED = {**SIZES, "num_key_value_heads": 2}
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.2}
FAMILIES: list[dict[str, Any]] = [
    {"model_type": "llama", **GROUPED},
    {"model_type": "mistral", **GROUPED},
    {"model_type": "mixtral", **GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    {"model_type": "qwen2", **GROUPED},
    {"model_type": "qwen3", **GROUPED},
    {"model_type": "qwen3_moe", **GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    {"model_type": "gemma2", **GROUPED, "head_dim": 8},
    {"model_type": "olmo2", **GROUPED},
    {"model_type": "gpt2", "vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    {"model_type": "gpt_neox", **SIZES},
]
VIRTUAL = 5
KEEP = torch.tensor([0, 3, 7, 11])


def named(config: dict[str, Any]) -> str:
    return str(config["model_type"])


def plain(config: dict[str, Any] = FAMILIES[0]) -> Any:
    return from_scratch({**config, **IDS}, 0).eval()


def soft(config: dict[str, Any] = FAMILIES[0]) -> Any:
    torch.manual_seed(0)
    made = get_peft_model(plain(config), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)).eval()
    follow_mask(made)
    return made


def batch(*lengths: int) -> dict[str, Tensor]:
    """Rows that each hold documents of these lengths."""
    ids = torch.randint(1, 97, (2, sum(lengths)), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "position_ids": torch.cat([torch.arange(length) for length in lengths]).expand(2, -1), "labels": ids.clone()}


@torch.no_grad()
def logits(model: Any, given: dict[str, Tensor], keep: Tensor | None = None) -> Tensor:
    return forward.logits(model, given, keep)


@torch.no_grad()
def by_hand(model: Any, ids: Tensor) -> Tensor:
    """Prompt and text embedded side by side; the logits of the text."""
    base = model.get_base_model()
    prompt = model.get_prompt(batch_size=len(ids))
    return base(inputs_embeds=torch.cat([prompt, base.get_input_embeddings()(ids)], 1)).logits[:, VIRTUAL:]


@pytest.mark.parametrize("config", FAMILIES, ids=named)
@pytest.mark.parametrize("make", [plain, soft])
def test_kept_positions_are_a_slice_of_all(config: dict[str, Any], make: Any) -> None:
    model, given = make(config), batch(12)
    whole = logits(model, given)
    assert whole.shape == (2, 12, 97)
    kept = logits(model, given, KEEP)
    assert kept.shape == (2, 4, 97)
    assert (kept - whole[:, KEEP]).abs().max() < 1e-5


@pytest.mark.parametrize("config", FAMILIES, ids=named)
def test_a_soft_prompt_is_cut_off(config: dict[str, Any]) -> None:
    model, given = soft(config), batch(12)
    assert (logits(model, given) - by_hand(model, given["input_ids"])).abs().max() < 1e-5


def test_only_what_is_kept_is_multiplied_with_the_output_layer() -> None:
    for model, rows in ((plain(), 4), (soft(), 4)):
        seen: list[int] = []
        forward.base(model).lm_head.register_forward_hook(lambda layer, given, found, seen=seen: seen.append(found.shape[1]))
        logits(model, batch(12), KEEP)
        assert seen == [rows]
    seen = []
    model = soft()
    model.get_base_model().lm_head.register_forward_hook(lambda layer, given, found: seen.append(found.shape[1]))
    logits(model, batch(12))
    assert seen == [12]  # the virtual tokens' are nobody's


class Old(torch.nn.Module):
    """A model whose forward knows nothing of logits_to_keep."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None, use_cache: bool) -> Any:
        return self.inner(input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=use_cache)


def test_a_family_that_keeps_none_is_sliced() -> None:
    model, given = plain(), batch(12)
    assert torch.equal(logits(Old(model), given, KEEP), logits(model, given)[:, KEEP])
    assert torch.equal(logits(Old(model), given), logits(model, given))


def test_packed_documents_are_as_if_alone() -> None:
    for model in (plain(), get_peft_model(plain(), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).eval()):
        given = batch(5, 7)
        alone = [logits(model, {"input_ids": part, "position_ids": torch.arange(part.shape[1]).expand(2, -1)}) for part in given["input_ids"].split((5, 7), 1)]
        assert (logits(model, given) - torch.cat(alone, 1)).abs().max() < 1e-5


def test_packed_rows_under_a_soft_prompt_are_refused() -> None:
    given = batch(5, 7)
    with pytest.raises(ValueError, match="one sequence each"):
        logits(soft(), given)
    with pytest.raises(ValueError, match="one sequence each"):
        logits(soft(), {name: given[name] for name in ("input_ids", "position_ids")})
    padding = {**given, "labels": torch.where(torch.arange(12) < 5, given["labels"], -100)}  # as collate fills a row up
    found = logits(soft(), padding)
    assert (found[:, :5] - by_hand(soft(), given["input_ids"][:, :5])).abs().max() < 1e-5
    masked = {**given, "attention_mask": (torch.arange(12) < 5).long().expand(2, -1)}
    assert (logits(soft(), masked)[:, :5] - found[:, :5]).abs().max() < 1e-5


def test_padding_on_the_left_does_not_part_the_prompt_from_the_text() -> None:
    model, given = soft(), batch(9)
    alone = logits(model, given)
    ids = torch.nn.functional.pad(given["input_ids"], (3, 0))
    mask = (torch.arange(12) >= 3).long().expand(2, -1)
    found = logits(model, {"input_ids": ids, "position_ids": (mask.cumsum(1) - 1).clamp_min(0), "attention_mask": mask})
    assert (found[:, 3:] - alone).abs().max() < 1e-5


def test_batched_generation_under_a_soft_prompt_is_that_of_one() -> None:
    model, ids = soft(), batch(9)["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    one = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, 9:]
    mask = (torch.arange(13) >= 4).long().expand(2, -1)
    padded = model.generate(torch.nn.functional.pad(ids, (4, 0)), attention_mask=mask, **options)[:, 13:]
    assert torch.equal(one, padded)
    row = ids
    for step in range(8):  # without a cache
        row = torch.cat([row, by_hand(model, row)[:, -1].argmax(-1, keepdim=True)], 1)
        assert torch.equal(row[:, -1], one[:, step])


def test_a_prompt_that_is_off_is_no_prompt() -> None:
    model, given = soft(), batch(12)
    assert forward.virtual_tokens(model) == VIRTUAL
    with model.disable_adapter():
        assert forward.virtual_tokens(model) == 0
        assert torch.equal(logits(model, given), logits(plain(), given))
        logits(model, batch(5, 7))
    assert forward.virtual_tokens(plain()) == 0
