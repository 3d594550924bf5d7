"""A model that no rank of a mesh holds whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class InShares:
    """What `fit` is told besides where the model comes without memory, for ranks of a mesh that never hold all of it."""

    parts: Mapping[str, Callable[[tuple[slice, ...]], torch.Tensor]]  # how a part of each weight is read
    begins: Callable[[Any, torch.device], Any]  # a check of the laid-out model on its device, before the first step of a run; all ranks call it
