"""Tensor parallel (Shoeybi et al. 2019) by torch's parallelize_module: a family says how each of its matrices is split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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

    Weights shared by two modules stay shared.
    """
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and getattr(table, "weight", None) is getattr(head, "weight", 0)
    here = {name.replace("{layer}", "*"): style for name, style in styles.items() if head is not None or name != "lm_head"}  # a reward model has a score
    plan: dict[str, ParallelStyle] = {name: STYLES[style]() for name, style in here.items()}
    parallelize_module(model, mesh, plan)
    if tied:
        head.weight = table.weight
