"""Number formats of a training step. They decide its result, so they are part of its identity."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from lmforge.errors import Problem
from lmforge.registry import Key, Node, node, register

Dtype = Literal["float32", "bfloat16", "float16"]

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def dtype_bytes(name: str) -> int:
    """Bytes of one element of a dtype, by its torch name."""
    return _BYTES[name]


@node
class Precision(Node):
    """What weights are kept in, what matrices are multiplied in, and what gradients are summed in."""

    group = "precision"

    param_dtype: Annotated[Literal["float32", "bfloat16"], Key("dtype that weights and gradients are kept in")]
    compute_dtype: Annotated[Dtype, Key("dtype of matrix products; autocast where it is not param_dtype")]
    reduce_dtype: Annotated[Dtype, Key("dtype in which devices sum their gradients")]
    buffer_dtype: Annotated[Literal["float32", "bfloat16"], Key("dtype of what is neither trained nor a product, such as rotary frequencies")]
    loss_scale: Annotated[float | None, Key("first value of the dynamic loss scale, a power of two; set with float16 and only then", ge=1)]

    @property
    def autocast(self) -> bool:
        """Whether matrix products run in another dtype than the weights are kept in."""
        return self.compute_dtype != self.param_dtype

    @property
    def param_bytes(self) -> int:
        """Bytes per weight as it is kept, and per gradient."""
        return dtype_bytes(self.param_dtype)

    def check(self, where: str) -> Iterator[Problem]:
        if self.autocast and self.param_dtype != "float32":
            what = f"{self.compute_dtype} products of {self.param_dtype} weights gain nothing"
            yield Problem(f"{where}.compute_dtype", what, f"type {where}.compute_dtype={self.param_dtype} or {where}.param_dtype=float32")
        if self.compute_dtype == "float16" and self.loss_scale is None:
            what = "must be set: small gradients vanish in float16"
            yield Problem(f"{where}.loss_scale", what, f"type {where}.loss_scale=65536 or {where}.compute_dtype=bfloat16")
        if self.compute_dtype != "float16" and self.loss_scale is not None:
            what = f"{self.compute_dtype} has float32's range and needs no loss scale"
            yield Problem(f"{where}.loss_scale", what, f"type {where}.loss_scale=null")
        elif self.loss_scale is not None and self.loss_scale.as_integer_ratio()[0].bit_count() != 1:
            yield Problem(f"{where}.loss_scale", f"{self.loss_scale:g} is not a power of two, so scaling would round", f"type {where}.loss_scale=65536")


@register("precision", "mixed")
class Mixed(Precision):
    """Mixed precision training (Micikevicius et al. 2018): weights in one dtype, matrix products in another under autocast."""
