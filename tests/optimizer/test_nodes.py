"""Every optimizer as its YAML file has it: it builds, learns, and keeps the bytes it says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

from lmforge.codec import decode, encode
from lmforge.errors import ConfigError, RunError
from lmforge.optimizer.groups import role
from lmforge.optimizer.nodes import Optimizer
from lmforge.registry import types

CONF = Path(__file__).parents[2] / "conf"
NAMES = sorted(types("optimizer"))


def option(name: str, **changes: Any) -> Optimizer:
    with initialize_config_dir(str(CONF), version_base=None):
        plain = OmegaConf.to_container(compose(f"optimizer/{name}"))
    made: Optimizer = decode(Optimizer, {**plain["optimizer"], **changes}, "optimizer")
    return made


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens": (50, 96),
        "q_proj": (96, 64),
        "experts": (3, 8, 16),
        "norm": (96,),
        "bias": (5000,),
        "lm_head": (50, 96),
    }
    module = nn.ModuleDict()
    for name, shape in shapes.items():
        module[name] = nn.Module()
        module[name].weight = nn.Parameter(torch.randn(shape) * 0.5)
    return module


def step(parameters: list[nn.Parameter], optimizers: list[torch.optim.Optimizer]) -> float:
    loss = sum((parameter**2).sum() for parameter in parameters)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return float(loss)


def test_each_has_a_yaml_and_round_trips() -> None:
    assert sorted(path.stem for path in (CONF / "optimizer").glob("*.yaml")) == NAMES
    assert sorted(types("optimizer/schedule")) == sorted(path.stem for path in (CONF / "optimizer" / "schedule").glob("*.yaml"))
    for name in NAMES:
        assert decode(Optimizer, encode(option(name))) == option(name)
    with initialize_config_dir(str(CONF), version_base=None):
        other = compose("optimizer/adamw", ["optimizer/schedule=wsd"])
    assert decode(Optimizer, OmegaConf.to_container(other.optimizer)).schedule.type == "wsd"


@pytest.mark.parametrize("name", NAMES)
def test_lowers_a_quadratic(name: str) -> None:
    module, chosen = model(), option(name, lr=0.01)
    optimizers = chosen.build(module.named_parameters())
    updated = [id(parameter) for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(updated) == sorted(id(parameter) for parameter in module.parameters())
    losses = [step(list(module.parameters()), optimizers) for _ in range(30)]
    assert losses[-1] < 0.99 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_state_bytes_are_exact(name: str, dtype: torch.dtype) -> None:
    module, chosen = model().to(dtype), option(name)
    optimizers = chosen.build(module.named_parameters())
    step(list(module.parameters()), optimizers)
    held = {id(parameter): state for optimizer in optimizers for parameter, state in optimizer.state.items()}
    for full, parameter in module.named_parameters():
        tensors = {key: value for key, value in held.get(id(parameter), {}).items() if isinstance(value, torch.Tensor) and key != "step"}
        shared = {"qmap1", "qmap2"}  # bitsandbytes' code tables: one pair for all parameters
        real = sum(value.numel() * value.element_size() for key, value in tensors.items() if key not in shared)
        assert chosen.state_bytes(tuple(parameter.shape), full, dtype.itemsize) == real, full


@pytest.mark.parametrize("name", [name for name in NAMES if name != "adam"])  # Adam's is in the gradient
def test_decay_is_for_matrices_only(name: str) -> None:
    module = model()
    before = {full: parameter.detach().clone() for full, parameter in module.named_parameters()}
    optimizers = option(name, weight_decay=0.5).build(module.named_parameters())
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    moved = {full.split(".")[0] for full, parameter in module.named_parameters() if not torch.equal(parameter, before[full])}
    assert moved == {"q_proj", "experts", "lm_head"}


def test_roles_by_transformers_names() -> None:
    assert role("model.layers.0.self_attn.q_proj.weight", (8, 8)) == "matrix"
    assert role("model.embed_tokens.weight", (8, 8)) == role("transformer.wte.weight", (8, 8)) == role("gpt_neox.embed_in.weight", (8, 8)) == "embedding"
    assert role("lm_head.weight", (8, 8)) == role("embed_out.weight", (8, 8)) == "head"
    assert role("model.norm.weight", (8,)) == "vector"


def test_muon_takes_hidden_matrices_alone() -> None:
    muon, adamw = option("muon").build(model().named_parameters())
    assert [tuple(parameter.shape) for group in muon.param_groups for parameter in group["params"]] == [(96, 64)]
    assert {group["lr"] for group in adamw.param_groups} == {0.003}


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"optimizer.lr: -1.0 must be > 0"):
        option("adamw", lr=-1)
    with pytest.raises(ConfigError, match="unknown optimizer type 'adamv'; did you mean 'adam"):
        option("adamw", type="adamv")
    assert option("adamw", grad_clip=None).grad_clip is None


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # Python's own way of saying: not importable
    with pytest.raises(RunError, match=r'pip install "lmforge\[bnb\]"'):
        option("adamw_8bit").build(model().named_parameters())


@pytest.mark.parametrize("name", NAMES)
def test_skipping_is_off_as_it_comes_and_asks_for_a_cap(name: str) -> None:
    made = option(name)
    assert (made.skip_sigma, made.skip_window, made.max_skips) == (None, 128, 0)
    with pytest.raises(ConfigError) as caught:
        option(name, skip_sigma=6.0)
    [problem] = caught.value.problems
    assert str(problem) == (
        "optimizer.skip_sigma: 6 is to skip steps, and optimizer.max_skips=0 allows none; "
        "type how many, such as optimizer.max_skips=10, or optimizer.skip_sigma=null"
    )
    assert option(name, skip_sigma=6.0, max_skips=1).max_skips == 1
    assert option(name, max_skips=1).skip_sigma is None
    with pytest.raises(ConfigError, match=r"optimizer.skip_window: 1 must be >= 2"):  # one value has no deviation
        option(name, skip_window=1)
