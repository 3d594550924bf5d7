"""What a training run is told: everything but the model, the objective and the place it runs in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lmforge.errors import RunError
from lmforge.optimizer.nodes import Optimizer
from lmforge.parallel.nodes import Parallel

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run. A row is a packed sequence or a preference pair; RunError where the dtypes do not go together."""

    steps: int  # optimizer steps
    rows_per_step: int  # rows of one global batch, over all devices
    seq_len: int  # tokens
    seed: int
    optimizer: Optimizer
    param_dtype: Dtype  # weights, gradients and optimizer state
    compute_dtype: Dtype  # matrix products; autocast where it differs from param_dtype
    reduce_dtype: Dtype  # the sum of gradients over devices
    buffer_dtype: Dtype  # rotary frequencies and the like
    loss_scale: float | None  # first scale of dynamic loss scaling (float16); None = no scaling
    parallel: Parallel  # how it is spread over devices, what is recomputed in backward, what is compiled
    log_every: int  # steps
    save_every_s: float  # seconds between resumable states

    def __post_init__(self) -> None:
        if self.param_dtype == "float16":
            raise RunError("precision.param_dtype", "float16 weights cannot be trained: small updates vanish", "float32 weights with float16 compute")
        if self.param_dtype == "bfloat16" and self.compute_dtype != "bfloat16":
            raise RunError("precision.compute_dtype", f"{self.compute_dtype} compute on bfloat16 weights", "use bfloat16 for both")
        if self.loss_scale is not None and self.compute_dtype != "float16":
            raise RunError("precision.loss_scale", f"loss scaling is for float16, not for {self.compute_dtype}", "set it to null")
