"""Positions of tokens behind a soft prompt where rows are padded on the left, as in batched generation."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def follow_mask(model: Any) -> None:
    """Make the base of a prompt-tuned PEFT model number its tokens by the attention mask, where there is one; other models are left alone.

    PEFT puts the virtual tokens before the padding and drops position_ids, so padding would stand between the prompt and the text it belongs to.
    """
    if model.active_peft_config.is_prompt_learning:
        model.get_base_model().register_forward_pre_hook(_number, with_kwargs=True)


def _number(_: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    mask = options.get("attention_mask")
    given = options.get("inputs_embeds") if options.get("inputs_embeds") is not None else options.get("input_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2 and given is not None and options.get("position_ids") is None:
        options["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)[:, -given.shape[1] :]
    return arguments, options
