"""Tensor parallel (Shoeybi et al. 2019) by torch's parallelize_module: a family says how each of its matrices is split."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

STYLES: Mapping[str, Any] = {
    "column": lambda: ColwiseParallel(),
    "row": lambda: RowwiseParallel(),
    "column_gathered": lambda: ColwiseParallel(output_layouts=Replicate()),  # what follows needs all of it, as a norm over all heads does
    "row_from_whole": lambda: RowwiseParallel(input_layouts=Replicate()),
    "vocabulary": lambda: RowwiseParallel(input_layouts=Replicate()),
}


def split_matrices(model: Any, mesh: DeviceMesh, styles: Mapping[str, str]) -> None:
    """Split in place the modules that `styles` names (`model.layers.{layer}.mlp.up_proj` -> how). What it does not name stays whole on every rank.

    Weights shared by two modules stay shared. A module that is not here, or has no weights because another stage of a pipeline holds it, is passed over.
    """
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and getattr(table, "weight", None) is getattr(head, "weight", 0)
    here = [name for name, module in model.named_modules() if module._parameters]
    how = {name: styles[key] for name in here if (key := re.sub(r"\.\d+\.", ".{layer}.", name)) in styles}
    plan: dict[str, ParallelStyle] = {name: STYLES[style]() for name, style in how.items()}
    parallelize_module(model, mesh, plan)
    for name in (name for name, style in how.items() if style == "vocabulary"):
        model.get_submodule(name).register_forward_hook(_waited)
    if tied:
        head.weight = table.weight


def _waited(module: Any, given: Any, found: Tensor) -> Tensor:
    """An embedding's sum over ranks, there: of one that is on its way, a compiled layer makes a gradient that DTensor cannot take (torch 2.13)."""
    return found.clone()
