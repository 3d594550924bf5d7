"""Fresh weights, a tensor at a time, by transformers' own `_init_weights`: each is drawn from a generator of its own.

So a rank that holds a part of a model draws the numbers that one rank draws, and has never more than one whole tensor in memory.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lmforge.errors import ConfigError
from lmforge.model.parts import Parts, sliced


def drawn(bones: Any, seed: int) -> Parts:
    """How each weight of a transformers model on the meta device begins; `bones` is kept as it is for as long as the parts are."""
    return {name: functools.partial(_part, bones, name, seed) for name, _ in bones.named_parameters()}


def _part(bones: Any, name: str, seed: int, slices: tuple[slice, ...]) -> Tensor:
    return sliced(_begun(bones, name, seed), slices)


def real_buffers(bones: Any) -> None:
    """Give the buffers of a model on the meta device, in place, what transformers begins them with (rotary frequencies, mostly)."""
    for name, _ in list(bones.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        bones.get_submodule(owner)._buffers[leaf] = _begun(bones, name, 0)


@torch.no_grad()
def _begun(bones: Any, name: str, seed: int) -> Tensor:
    """One tensor on the CPU: it alone is real while the modules around it begin, from the one that has it outwards, as transformers goes.

    (GPT-2's residual projections are drawn by their own module, and again, smaller, by the one around it.) All others are on the meta device, where
    drawing takes no time, no memory and nothing from the generator. The caller's random state is left alone.
    """
    owner, _, leaf = name.rpartition(".")
    module = bones.get_submodule(owner)
    kind = module._parameters if leaf in module._parameters else module._buffers
    bone = kind[leaf]
    real = torch.empty_like(bone, device="cpu")
    kind[leaf] = nn.Parameter(real, requires_grad=False) if kind is module._parameters else real
    before = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(_seed(seed, name))
        for model, one in _around(bones, owner):
            model._init_weights(one)
        if kind[leaf]._version == 0:  # what no operation in place has touched
            what = f"transformers does not say what {name} of a {bones.config.model_type} begins with"
            raise ConfigError("model", what, "start from weights: model=hf, or stage.<name>.init_from")
        begun: Tensor = kind[leaf].detach()
        return begun
    finally:
        kind[leaf] = bone
        torch.set_rng_state(before)


def _around(bones: Any, path: str) -> Iterator[tuple[Any, nn.Module]]:
    """The module at a path and those around it, each with the transformers model that says how it begins: the nearest one that it is or lies in."""
    from transformers import PreTrainedModel

    modules, model = [(bones, bones)], bones
    for name in filter(None, path.split(".")):
        module: Any = getattr(modules[-1][1], name)
        model = module if isinstance(module, PreTrainedModel) else model
        modules.append((model, module))
    yield from reversed(modules)


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest(), "big") % 2**63
