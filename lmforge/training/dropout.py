"""Dropout, for losses that compare log-probs with those of a policy without it."""

from __future__ import annotations

from torch import nn


def switch_off(model: nn.Module) -> None:
    """No dropout in any module, an adapter's included, in training mode too: gradient checkpointing needs that mode. The config stays.

    Modules of torch and PEFT hold the share as `p`; attention and layers of transformers that call functions hold a float named after it.
    """
    for module in model.modules():
        names = ["p"] if isinstance(module, nn.modules.dropout._DropoutNd) else [name for name, value in vars(module).items() if _is_share(name, value)]
        for name in names:
            setattr(module, name, 0.0)


def _is_share(name: str, value: object) -> bool:
    return "drop" in name and isinstance(value, float)
