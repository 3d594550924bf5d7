"""What the training module asks of the strategy that runs it: all that differs between the ways to spread a step over ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from lmforge.parallel.layout import Ranks

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

BACKEND = {"cpu": "gloo", "cuda": "nccl"}
Batch = Mapping[str, Tensor]
Part = Callable[[tuple[slice, ...]], Tensor]  # slices of all dimensions to those values of one weight on the CPU, in any dtype
Parts = Mapping[str, Part | None]  # by the parameters' names in the whole model; None where a state brings it
Read = Callable[[Mapping[str, Tensor]], dict[str, Any]]  # weights to fill, by name -> all that a state holds for this rank


def patience(seconds: float) -> timedelta:
    """How long collectives wait for a rank that does not answer, in every group that this process makes from here on.

    torch takes it for one group at a time, and meshes, DeepSpeed and states make groups of their own by torch's defaults: 10 minutes for NCCL, 30 for gloo.
    """
    waits = timedelta(seconds=seconds)
    distributed_c10d.default_pg_timeout = waits
    distributed_c10d.default_pg_nccl_timeout = waits  # type: ignore[attr-defined]
    return waits


class Losses(Protocol):
    """The loss of a micro-batch, scaled for its share in the global batch's mean."""

    def of(self, batch: Batch) -> Tensor:
        """With the forward pass."""
        ...

    def of_logits(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of a forward pass that is done, in the last stage of a pipeline."""
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """What a forward pass runs in."""
        ...


class Engine:
    """Mixed into a Lightning strategy. These methods are those of ranks that hold whole, equal models; others override what differs.

    Gradients are means over the data-parallel ranks, so a loss is multiplied by their number to give sums.
    """

    mesh: Mapping[str, int]

    @property
    def ranks(self) -> Ranks:
        """This rank's place in the mesh."""
        return Ranks(self.global_rank, self.mesh)  # type: ignore[attr-defined]

    def spread(self, model: Any, parts: Parts | None = None) -> Any:
        """Called once, on every rank, with a whole model on the CPU: what is trained on this rank, which may be a part of it.

        Or, on a mesh, with a model without memory and a way to read a part of each weight, of which this rank reads its own.
        """
        assert parts is None
        return model

    def gradients(self, module: LightningModule, batches: Sequence[Batch], loss: Losses) -> None:
        """The gradients of the loss summed over `batches`."""
        for index, batch in enumerate(batches):
            with self.accumulating(module, last=index == len(batches) - 1):
                module.manual_backward(loss.of(batch))

    def accumulating(self, module: LightningModule, *, last: bool) -> AbstractContextManager[Any]:
        """Around one micro-batch: gradients need not be shared before the last one."""
        return contextlib.nullcontext()

    def groups(self, optimizers: Sequence[Optimizer]) -> None:
        """Called once after the optimizers are built; may split their parameter groups."""

    def update(self, parameters: Sequence[nn.Parameter], optimizers: Sequence[Optimizer], clip: float | None, skips: Callable[[Tensor], bool]) -> Tensor:
        """Clip to a global norm, one step of each optimizer, and no gradients left; returns the norm before clipping, the same on every rank [scalar].

        Where `skips` says so of the norm, nothing is changed.
        """
        norm = self.norm(parameters)
        skip = skips(norm)
        if clip is not None and not skip:
            self.clip(parameters, clip, norm)
        for optimizer in optimizers:
            if not skip:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm

    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """The global norm of all gradients [scalar]."""
        return get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])

    def clip(self, parameters: Sequence[nn.Parameter], most: float, norm: Tensor) -> None:
        """Scale all gradients so that their global norm is at most `most`."""
        clip_grads_with_norm_(parameters, most, norm)

    def whole(self, model: Any) -> Any:
        """The trained model, whole, for rank 0 to save; None on other ranks. Every rank calls it."""
        return model if self.is_global_zero else None  # type: ignore[attr-defined]

    # The resumable state, by the names that parameters have in the whole model

    def state(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
        """Trained parameters and persistent buffers ("weights"), and what the optimizer keeps for each ("optimizer"), as this rank holds them."""
        names, moments = _names(model), {}
        for optimizer in optimizers:
            for parameter, values in optimizer.state.items():
                moments[names[parameter]] = {key: _number(value) for key, value in values.items()}
        return {"weights": changing(model), "optimizer": moments}

    def put_state(self, model: nn.Module, optimizers: Sequence[Optimizer], read: Read) -> dict[str, Any]:
        """Take back what `state` gave, from ranks of any mesh; returns all that `read` does, which fills the weights it is given in place."""
        saved, names = read(changing(model)), _names(model)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if values := saved["optimizer"].get(names[parameter]):
                        optimizer.state[parameter] = {key: counter(value, optimizer, group, parameter) for key, value in values.items()}
        return saved


def changing(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: trainable parameters, shared ones once, and persistent buffers. Frozen weights come from where they came from before."""
    kept = model.state_dict().keys()
    buffers = {name: value for name, value in model.named_buffers() if name in kept}
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad} | buffers


def _names(model: nn.Module) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def _number(value: Any) -> Any:
    """A step counter is a number on disk, wherever the optimizer keeps it."""
    return float(value) if isinstance(value, Tensor) and value.ndim == 0 else value


def counter(value: Any, optimizer: Optimizer, group: Mapping[str, Any], parameter: nn.Parameter) -> Any:
    """A step counter as torch's optimizers keep it: a tensor, on the parameter's device where the update is fused. bitsandbytes keeps a number."""
    if isinstance(value, Tensor) or not type(optimizer).__module__.startswith("torch."):
        return value
    return torch.tensor(value, dtype=torch.float32, device=parameter.device if group.get("fused") or group.get("capturable") else "cpu")
