"""How a model is run: its dtype, recomputed activations and compiled blocks."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from lmforge.parallel.engine.shard import layers
from lmforge.training.recipe import Recipe

# Dear to compute and small to keep; the rest (norms, activations, rotary) is recomputed. The choice of torchtitan.
KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def lower(model: Any, recipe: Recipe) -> None:
    """Turn on what the recipe asks for, in place, on a transformers model, or on a module whose `transformers()` are several."""
    buffers = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items() if buffer is not None]
    model.to(getattr(torch, recipe.param_dtype))
    for module, name, buffer in buffers:  # from what they were: rotary frequencies that went through bfloat16 are others
        module._buffers[name] = buffer.to(getattr(torch, recipe.buffer_dtype)) if buffer.is_floating_point() else buffer
    for one in model.transformers() if hasattr(model, "transformers") else [model]:
        _lower(one, recipe)


def _lower(model: Any, recipe: Recipe) -> None:
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":  # autocast passes it by: it would compute in what a norm hands it, which is float32
            module.compute_dtype, module.compute_type_is_set = getattr(torch, recipe.compute_dtype), True
    if recipe.parallel.checkpointing != "none":
        options: dict[str, Any] = {"use_reentrant": False}
        if recipe.parallel.checkpointing == "selective":
            options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if recipe.parallel.compile:
        for block in layers(model):  # quick, for they share their code
            block.compile()


def _policy(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
