"""Which parameter is what, told by its name and shape alone, so that a plan knows it without torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch.nn import Parameter

Named = Iterable[tuple[str, "Parameter"]]
Role = Literal["matrix", "embedding", "head", "vector"]


def role(name: str, shape: tuple[int, ...]) -> Role:
    """`matrix` (hidden weights, also stacked experts), `embedding` (a tied head too), `head`, or `vector` (norms, biases), by transformers' names."""
    if len(shape) < 2:
        return "vector"
    parts = name.split(".")
    if "lm_head" in parts or "embed_out" in parts:
        return "head"
    if any("embed" in part or part in ("wte", "wpe") for part in parts):
        return "embedding"
    return "matrix"


def decays(name: str, shape: tuple[int, ...]) -> bool:
    """Weight decay is for matrices: not for norms and biases, nor for embeddings, whose norms it shrinks (OLMo 2, 2024)."""
    return role(name, shape) in ("matrix", "head")


def split_decay(named: Named, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: what decays with `weight_decay`, and the rest without."""
    listed = list(named)
    decayed = [parameter for name, parameter in listed if decays(name, tuple(parameter.shape))]
    rest = [parameter for name, parameter in listed if not decays(name, tuple(parameter.shape))]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def numel(shape: tuple[int, ...]) -> int:
    """Elements of a tensor of this shape."""
    return math.prod(shape)
