"""A base in 4 bits, as QLoRA trains on (Dettmers et al. 2023), and its dense twin: the very weights that 4 bits stand for."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lmforge.errors import RunError


def quantize(model: Any, *, quant_type: str, double_quant: bool) -> Any:
    """Replace every linear layer but the output layer by bitsandbytes' Linear4bit, in place, on the layer's own device; returns the model.

    The layers compute in the dtype of what comes in. Their packed form for one kind of CPU is off: it has no backward pass.
    """
    library = _bitsandbytes()
    for parent, name, layer in list(_linears(model)):
        weight = _weight(layer).detach()
        outputs, inputs = weight.shape
        made = library.nn.Linear4bit(inputs, outputs, bias=layer.bias is not None, compress_statistics=double_quant, quant_type=quant_type, device="meta")
        made.weight = library.nn.Params4bit(weight.contiguous(), requires_grad=False, compress_statistics=double_quant, quant_type=quant_type, module=made).to(
            weight.device
        )
        if layer.bias is not None:
            made.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
        made.support_avx512bf16_for_cpu, made.source = False, type(layer)
        setattr(parent, name, made.train(layer.training))
    return model


@torch.no_grad()
def round_weights(model: Any, *, quant_type: str, double_quant: bool) -> Any:
    """Give every layer that `quantize` would replace the weights its 4 bits stand for, in place and in its own dtype; returns the model.

    Rounded on the accelerator where there is one, as in training, wherever the model is.
    """
    functional, device = _bitsandbytes().functional, "cuda" if torch.cuda.is_available() else "cpu"
    for _, _, layer in _linears(model):
        weight = _weight(layer)
        codes, state = functional.quantize_4bit(weight.detach().contiguous().to(device), compress_statistics=double_quant, quant_type=quant_type)
        weight.copy_(functional.dequantize_4bit(codes, state).view_as(weight))
    return model


@torch.no_grad()
def dense(model: Any) -> Any:
    """Undo `quantize`: every layer becomes what it was, with the weights its 4 bits stand for, in place; returns the model."""
    library = _bitsandbytes()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, library.nn.Linear4bit):
            weight = library.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            with torch.device("meta"):
                made: Any = nn.Linear(1, 1) if layer.source is nn.Linear else layer.source(1, 1)
            if layer.source is nn.Linear:
                made.in_features, made.out_features = layer.in_features, layer.out_features
            else:
                made.nf, made.nx, weight = layer.out_features, layer.in_features, weight.t().contiguous()
            made.weight, made.bias = nn.Parameter(weight, requires_grad=False), layer.bias
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, made.train(layer.training))
    return model


def _linears(model: Any) -> Iterator[tuple[nn.Module, str, Any]]:
    """(parent, name in it, layer) of nn.Linear and GPT-2's Conv1D, but for the output layer (or a scalar head), which stays exact."""
    from transformers.pytorch_utils import Conv1D

    heads = (model.get_output_embeddings(), getattr(model, "score", None))
    for name, layer in model.named_modules():
        if type(layer) in (nn.Linear, Conv1D) and layer not in heads:
            parent, _, last = name.rpartition(".")
            yield model.get_submodule(parent), last, layer


def _weight(layer: Any) -> torch.Tensor:
    """The weight as [outputs, inputs]; Conv1D keeps it the other way round."""
    found: torch.Tensor = layer.weight if type(layer) is nn.Linear else layer.weight.t()
    return found


def _bitsandbytes() -> Any:
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it reports an optional kernel for CPUs that is not installed
    try:
        import bitsandbytes
    except ImportError as error:
        raise RunError("adapter", "a base in 4 bits needs bitsandbytes, which is not installed", 'type: pip install "lmforge[bnb]"') from error
    finally:
        logger.setLevel(level)
    return bitsandbytes
