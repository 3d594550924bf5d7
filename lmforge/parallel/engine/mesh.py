"""A mesh of named axes on DTensors, as a Lightning strategy: FSDP2 and HSDP, tensor parallel, pipeline parallel, and their products."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.parallel import ParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from lmforge.parallel.engine.base import BACKEND, Batch, Engine, Losses, Parts, patience
from lmforge.parallel.engine.fill import fill
from lmforge.parallel.engine.gather import gathered, shapes, skeleton, some
from lmforge.parallel.engine.pipeline import Pipeline
from lmforge.parallel.engine.shard import Sharding, shard
from lmforge.parallel.engine.tensor import split_matrices

if TYPE_CHECKING:
    from lmforge.parallel.layout import Spread
    from lmforge.parallel.nodes import Mesh


class MeshEngine(Engine, ModelParallelStrategy):
    """Lightning's ModelParallelStrategy with a mesh of any axes; the stock one knows data x tensor only."""

    def __init__(self, options: Mesh, spread: Spread) -> None:
        # Offloaded gradients are normed on the CPU, which NCCL cannot do.
        backend = "cpu:gloo,cuda:nccl" if options.cpu_offload and spread.accelerator == "cuda" else BACKEND[spread.accelerator]
        super().__init__(process_group_backend=backend, timeout=patience(options.timeout_s))
        self.options, self.told, self.mesh = options, spread, spread.mesh
        self.pipeline: Pipeline | None = None
        self._sharded: list[Any] = []

    def setup_environment(self) -> None:
        """Processes, then the mesh over them."""
        ParallelStrategy.setup_environment(self)
        self._setup_distributed()
        self._device_mesh = init_device_mesh(self.told.accelerator, tuple(self.mesh.values()), mesh_dim_names=tuple(self.mesh))

    def spread(self, model: Any, parts: Parts | None = None) -> Any:
        self.skeleton = skeleton(model)
        self.shapes = shapes(self.skeleton)
        self.pipeline, self._sharded = lay_out(model, self.device_mesh, self.options, self.told, self.root_device)
        if parts is not None:
            fill(model, parts, torch.device("cpu") if self.options.cpu_offload else self.root_device)
        return model

    def accumulating(self, module: LightningModule, *, last: bool) -> AbstractContextManager[Any]:
        """Each micro-batch's gradients go to the ranks that own them at once, for whole ones would not fit; only copies wait for the last."""
        for part in self._sharded:
            part.set_requires_all_reduce(last)
        return contextlib.nullcontext()

    def gradients(self, module: LightningModule, batches: Sequence[Batch], loss: Losses) -> None:
        if self.pipeline is None:
            super().gradients(module, batches, loss)
        else:
            self.pipeline.backward(batches, loss.of_logits, loss.autocast)

    def groups(self, optimizers: Sequence[Optimizer]) -> None:
        """Parameters of one mesh each: torch updates a list of tensors at once, and they must lie on the same ranks."""
        for optimizer in optimizers:
            if isinstance(optimizer, torch.optim.SGD):  # torch has no fused SGD of DTensors
                for group in optimizer.param_groups:
                    group.update(fused=False, foreach=True)
            split = [(group, part) for group in optimizer.param_groups for part in by_mesh(group["params"])]
            optimizer.param_groups[:] = [{**group, "params": part} for group, part in split]

    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Norms of each mesh's gradients, and over the stages of a pipeline."""
        norms = [_plain(get_total_norm([parameter.grad for parameter in part if parameter.grad is not None])) for part in by_mesh(parameters)]
        square = torch.stack([norm.to(self.root_device) for norm in norms]).square().sum()
        if self.mesh["pp"] > 1:
            dist.all_reduce(square, group=self.device_mesh["pp"].get_group())
        return square.sqrt()

    def clip(self, parameters: Sequence[nn.Parameter], most: float, norm: Tensor) -> None:
        for part in by_mesh(parameters):
            clip_grads_with_norm_(part, most, norm)

    def whole(self, model: Any) -> Any:
        return gathered(model, self.skeleton, self.device_mesh)

    def some(self, model: Any, names: Sequence[str]) -> dict[str, Tensor]:
        """Some weights by their names in the whole model, whole, for rank 0 to save; nothing on other ranks. Every rank calls it alike."""
        return some(model, self.shapes, self.device_mesh, names)


def lay_out(model: Any, ranks: DeviceMesh, options: Mesh, told: Spread, device: torch.device) -> tuple[Pipeline | None, list[Any]]:
    """Leave of a whole model, in place, what this rank holds; returns its pipeline, where there is one, and what FSDP2 shards. Weights may be on meta.

    A model is cut into pipeline stages first, then its matrices over tp, then what is left over dp_shard (torchtitan's order).
    """
    sizes = told.mesh
    pipeline: Pipeline | None = None
    sharded: list[Any] = []
    if sizes["pp"] > 1:
        pipeline = Pipeline(model, ranks["pp"], device, options.pp_schedule, options.reshard_after_forward)
    if sizes["tp"] > 1:
        split_matrices(model, ranks["tp"], told.splits)
    if sizes["dp_replicate"] * sizes["dp_shard"] > 1 or options.cpu_offload:
        axes = ("dp_replicate", "dp_shard") if sizes["dp_replicate"] > 1 else ("dp_shard",)
        compute, reduce = (getattr(torch, dtype) for dtype in (told.compute_dtype, told.reduce_dtype))
        sharding = Sharding(ranks[axes], compute, reduce, options.reshard_after_forward, options.prefetch, options.cpu_offload)
        sharded = shard(model, sharding, pipeline.stage if pipeline else None)
    return pipeline, sharded


def by_mesh(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters of each mesh, and the plain ones, in their order."""
    found: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        found.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return list(found.values())


def _plain(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
