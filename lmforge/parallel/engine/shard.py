"""FSDP2 on a model: each decoder layer gathers its weights when it runs, what is left when the model does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard


@dataclass(frozen=True)
class Sharding:
    """Where and how. A mesh of two axes holds copies along the first (HSDP)."""

    mesh: DeviceMesh
    compute_dtype: torch.dtype
    reduce_dtype: torch.dtype
    reshard_after_forward: bool
    prefetch: int
    cpu_offload: bool

    def options(self) -> dict[str, Any]:
        """What fully_shard takes. Inputs keep their dtype: autocast, which is on all the same, casts what matrix products take."""
        offload = CPUOffloadPolicy(pin_memory=self.mesh.device_type == "cuda") if self.cpu_offload else OffloadPolicy()
        mixed = MixedPrecisionPolicy(param_dtype=self.compute_dtype, reduce_dtype=self.reduce_dtype, cast_forward_inputs=False)
        return {"mesh": self.mesh, "reshard_after_forward": self.reshard_after_forward, "mp_policy": mixed, "offload_policy": offload}


def shard(model: Any, sharding: Sharding, root: nn.Module | None = None) -> list[Any]:
    """Shard in place a transformers model, one under an adapter, or a module whose `transformers()` are several; returns what was sharded.

    `root` is what is called in the model's stead, where that is another module around it (a pipeline's stage).
    """
    parts = model.transformers() if hasattr(model, "transformers") else [model]
    return [module for part in parts for module in _shard(part, sharding, root)]


def _shard(model: Any, sharding: Sharding, root: nn.Module | None) -> list[Any]:
    options, blocks = sharding.options(), layers(model)
    rest = [root or model]
    classifier = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(classifier, "score"):  # it is called in two parts, its network and its head
        rest = [classifier.base_model, classifier.score]
    for module in (*blocks, *rest):
        fully_shard(module, **options)
    if sharding.prefetch:
        _prefetch(blocks, sharding.prefetch)
    return [*blocks, *rest]


def _prefetch(blocks: list[Any], layers: int) -> None:
    for index, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[index + 1 : index + 1 + layers])
        block.set_modules_to_backward_prefetch(blocks[max(0, index - layers) : index][::-1])


def layers(model: nn.Module) -> list[Any]:
    """The decoder layers: the outermost list of modules with the most parameters."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in lists]
    return [layer for layer in lists[sizes.index(max(sizes))] if any(True for _ in layer.parameters())] if lists else []
