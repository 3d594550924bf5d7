"""Which weights an adapter sits on, and what it adds to them, from names and shapes alone: planning needs no torch."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from lmforge.errors import Problem

ALL_LINEAR = "all-linear"
PREFIX = "base_model.model."  # PEFT's name for the model it wraps


class WeightLike(Protocol):
    """One parameter tensor as transformers names it; `{layer}` in the name stands for `count` layers of one shape."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def count(self) -> int: ...
    @property
    def role(self) -> str: ...


@dataclass(frozen=True)
class Trained:
    """A tensor that is trained, under PEFT's name; `{layer}` in the name stands for `count` layers of one shape."""

    name: str
    shape: tuple[int, ...]
    count: int

    @property
    def numel(self) -> int:
        """Elements in all layers."""
        return math.prod(self.shape) * self.count


@dataclass(frozen=True)
class Linear:
    """A linear layer: `{layer}` in `module` stands for `count` layers; widths of its input and output."""

    module: str
    inputs: int
    outputs: int
    count: int
    head: bool


def linears(weights: Iterable[WeightLike]) -> list[Linear]:
    """The linear layers of a model, as PEFT finds them: nn.Linear and GPT-2's Conv1D.

    Neither embeddings, nor stacked experts, nor their router: transformers 5 keeps those as bare parameters.
    """
    listed = list(weights)
    routers = {one.name.replace(".experts.gate_up_proj", ".gate.weight") for one in listed if one.name.endswith(".experts.gate_up_proj")}
    found = []
    for one in listed:
        if len(one.shape) != 2 or not one.name.endswith(".weight") or one.role == "embedding" or one.name in routers:
            continue
        module = one.name.removesuffix(".weight")
        outputs, inputs = reversed(one.shape) if transposed(module) else one.shape
        found.append(Linear(module, inputs, outputs, one.count, one.role == "head"))
    return found


def transposed(module: str) -> bool:
    """Whether the layer is GPT-2's Conv1D, which keeps its weight (inputs, outputs)."""
    return module.startswith("transformer.h.") and module.rpartition(".")[2] in ("c_attn", "c_proj", "c_fc")


def chosen(layers: Sequence[Linear], targets: Sequence[str]) -> list[Linear]:
    """The layers that `targets` mean: all but the output layer for `all-linear`, else those whose name ends in one of them (PEFT's rule)."""
    if tuple(targets) == (ALL_LINEAR,):
        return [one for one in layers if not one.head]
    return [one for one in layers if any(_named(one.module, target) for target in targets)]


def unmatched(layers: Sequence[Linear], targets: Sequence[str], where: str) -> Iterator[Problem]:
    """A problem for each target that names no linear layer, with the nearest name that does."""
    if tuple(targets) == (ALL_LINEAR,):
        return
    known = sorted({name for one in layers for name in _suffixes(one.module)}, key=lambda name: (name.count("."), name))
    short = [name for name in known if "." not in name]
    for index, target in enumerate(targets):
        if not any(_named(one.module, target) for one in layers):
            near = difflib.get_close_matches(target, known, n=1, cutoff=0.6)
            hint = f"did you mean '{near[0]}'?" if near else f"{ALL_LINEAR}, or some of: {', '.join(short)}"
            yield Problem(f"{where}.target_modules[{index}]", f"no linear layer of the model is named {target!r}", hint)


def _named(module: str, target: str) -> bool:
    return module == target or module.endswith(f".{target}")


def _suffixes(module: str) -> Iterator[str]:
    """q_proj and self_attn.q_proj of model.layers.{layer}.self_attn.q_proj: names that hold for every layer."""
    parts = module.rpartition("{layer}.")[2].split(".")
    for start in range(len(parts)):
        yield ".".join(parts[start:])


def low_rank(layers: Iterable[Linear], r: int, magnitude: bool) -> list[Trained]:
    """LoRA's A [r, inputs] and B [outputs, r] of every layer, and with `magnitude` DoRA's norm of each output [outputs]."""
    found = []
    for one in layers:
        found.append(Trained(f"{PREFIX}{one.module}.lora_A.default.weight", (r, one.inputs), one.count))
        found.append(Trained(f"{PREFIX}{one.module}.lora_B.default.weight", (one.outputs, r), one.count))
        if magnitude:
            found.append(Trained(f"{PREFIX}{one.module}.lora_magnitude_vector.default.weight", (one.outputs,), one.count))
    return found
