"""A model without memory and a way to read each of its weights, or a part of one: what a rank of a mesh opens, who is to hold a share of the model only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Part = Callable[[tuple[slice, ...]], Tensor]  # slices of the first dimensions (none: all) to those values on the CPU, in whatever dtype they are kept
Parts = Mapping[str, Part]  # by the names of `named_parameters`


@dataclass(frozen=True)
class Unread:
    """A model whose parameters are on the meta device, or (an adapter's) real; `parts` has a way to read each of the former. Its buffers are real."""

    model: Any
    parts: Parts

    def under(self, attach: Callable[[Any], Any]) -> Unread:
        """With an adapter, whose own weights `attach` makes, on the CPU; the base's keep where they are read from under their new names.

        An adapter goes to the device of its base, so meanwhile each weight of that is one number that says it is as many.
        """
        there = {parameter: (parameter, self.parts[name]) for name, parameter in self.model.named_parameters()}
        stand_ins = {bone: nn.Parameter(torch.zeros((), dtype=bone.dtype).expand(bone.shape)) for bone in there}
        replace(self.model, stand_ins)
        bones = {one: there[bone] for bone, one in stand_ins.items()}
        made = attach(self.model)
        parts = {name: bones[one][1] for name, one in made.named_parameters() if one in bones}
        replace(made, {one: bone.requires_grad_(one.requires_grad) for one, (bone, _) in bones.items()})
        return Unread(made, parts)

    @torch.no_grad()
    def read(self) -> Any:
        """The model with all its weights on the CPU, in the dtype of the meta ones."""
        made = {bone: self.parts[name](()).to(bone.dtype) for name, bone in self.model.named_parameters() if name in self.parts}
        replace(self.model, {bone: nn.Parameter(value, requires_grad=bone.requires_grad) for bone, value in made.items()})
        return self.model


def replace(model: nn.Module, others: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Put other parameters in the place of a model's own, wherever they are; shared ones stay shared."""
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter in others:
                module._parameters[leaf] = others[parameter]


def sliced(value: Tensor, slices: tuple[slice, ...]) -> Tensor:
    """A part of a tensor in memory of its own, so that the rest can go; all of it as it is."""
    return value[slices].clone() if slices else value
