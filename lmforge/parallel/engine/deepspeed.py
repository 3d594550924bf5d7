"""ZeRO by DeepSpeed under Lightning's strategy, on GPUs and (where Lightning refuses it) on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lmforge.parallel.engine.base import BACKEND, Batch, Engine, Losses, Parts, Read, counter, patience
from lmforge.parallel.engine.gather import fill, skeleton

if TYPE_CHECKING:
    from lmforge.parallel.layout import Spread
    from lmforge.parallel.nodes import DeepSpeed


class AsItComes(DeepSpeedPrecision):
    """float32 weights, and batches as they are: the step's own autocast casts what matrix products take."""

    def __init__(self) -> None:
        super().__init__("32-true")

    def convert_input(self, data: Any) -> Any:
        return data


class DeepSpeedEngine(Engine, DeepSpeedStrategy):
    """DeepSpeed owns gradients, clipping and the update; `config` is the one that the plan shows."""

    def __init__(self, options: DeepSpeed, spread: Spread) -> None:
        config = options.deepspeed_config(
            compute_dtype=spread.compute_dtype,
            reduce_dtype=spread.reduce_dtype,
            gradient_clipping=spread.gradient_clipping,
            micro_batch_size=spread.micro_batch_size,
            accumulation=spread.accumulation,
        )
        waits = patience(options.timeout_s)
        super().__init__(config=config, process_group_backend=BACKEND[spread.accelerator], timeout=waits, precision_plugin=AsItComes())
        self._config_initialized = True  # it is whole: Lightning has nothing to fill in
        self.options, self.told, self.mesh = options, spread, spread.mesh

    # Lightning allows DeepSpeed on GPUs only; DeepSpeed itself runs on both.

    def setup_environment(self) -> None:
        if self.told.accelerator == "cpu":
            DDPStrategy.setup_environment(self)
        else:
            super().setup_environment()

    def setup_distributed(self) -> None:
        if self.told.accelerator == "cpu":
            self.set_world_ranks()
            self._init_deepspeed_distributed()
        else:
            super().setup_distributed()

    @property
    def root_device(self) -> torch.device:
        """DeepSpeed wants an index, on the CPU too."""
        return torch.device("cpu", self.local_rank) if self.told.accelerator == "cpu" else super().root_device

    def spread(self, model: Any, parts: Parts | None = None) -> Any:
        assert parts is None
        self.skeleton = skeleton(model)
        return model

    def gradients(self, module: LightningModule, batches: Sequence[Batch], loss: Losses) -> None:
        """DeepSpeed divides by the number of micro-batches, so each is multiplied by it; `step` after all but the last only counts."""
        engine = self.deepspeed_engine
        for index, batch in enumerate(batches):
            # What its forward does first; a step of ours is one forward of many micro-batches, and ZeRO-3 would keep the last one's gradients only.
            engine.optimizer.clear_backward_seen_flag()
            module.manual_backward(loss.of(batch) * len(batches))
            if index < len(batches) - 1:
                engine.step()

    def update(self, parameters: Sequence[nn.Parameter], optimizers: Sequence[Optimizer], clip: float | None, skips: Callable[[Tensor], bool]) -> Tensor:
        """Its config says how to clip, and it knows the norm once it has stepped, so that nothing can be skipped."""
        self.deepspeed_engine.step()
        norm = torch.as_tensor(float(self.deepspeed_engine.get_global_grad_norm() or 0.0), device=self.root_device)
        skips(norm)
        return norm

    def whole(self, model: Any) -> Any:
        parameters = dict(model.named_parameters())
        return fill(self.skeleton, lambda name: _whole(parameters[name]), model.training)

    # The resumable state in the form of the other engines: whole tensors, each kept by one rank

    def state(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
        weights, moments = {}, {}
        self._link()
        steps = _steps(self._client)
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if not parameter.requires_grad:
                continue
            found = {"weight": safe_get_full_fp32_param(parameter)} | {key: safe_get_full_optimizer_state(parameter, key) for key in self._moments()}
            if index % self.world_size == self.global_rank:  # all ranks have it for a moment, one keeps it
                kept = {key: value.detach().cpu().clone() for key, value in found.items()}
                weights[name] = kept.pop("weight")
                moments[name] = {**kept, **steps}
        return {"weights": weights | dict(_buffers(model)), "optimizer": moments}

    def put_state(self, model: nn.Module, optimizers: Sequence[Optimizer], read: Read) -> dict[str, Any]:
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        empty = {name: torch.empty(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in trained.items()}
        saved = read(empty | dict(_buffers(model)))
        self._begin(next(iter(saved["optimizer"].values()), {}))
        for name, parameter in trained.items():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
                parameter.copy_(saved["weights"][name])  # what forward runs on; DeepSpeed brings the weights that it updates over only in a step
            self._put(parameter, saved["weights"][name])
            for key, value in saved["optimizer"].get(name, {}).items():
                if isinstance(value, Tensor):
                    self._put(parameter, value, key)
        return saved

    def _begin(self, kept: Mapping[str, Any]) -> None:
        """Make what the optimizer keeps of each element, zero yet, and its counters: DeepSpeed does so in the first step only."""
        for flat in self._zero.fp32_partitioned_groups_flat if self.options.stage == 3 else self._zero.single_partition_of_fp32_groups:
            made = {key: torch.zeros_like(flat) if isinstance(value, Tensor) else value for key, value in kept.items()}
            self._client.state[flat] = {key: counter(value, self._client, self._client.param_groups[0], flat) for key, value in made.items()}
        self._link()

    def _link(self) -> None:
        """ZeRO-1 and 2 find a parameter's moments by a link, which they make once the first group has stepped; then other groups have no moments yet."""
        if self.options.stage < 3:
            for parameters, flat in zip(self._zero.bit16_groups, self._zero.single_partition_of_fp32_groups, strict=True):
                lazy_init_hp_params_optimizer_state(parameters, flat, self._client.state)

    def _put(self, parameter: Any, value: Tensor, *key: str) -> None:
        """Set the float32 weight of a parameter, or what the optimizer keeps of it under `key`, where this rank has a part of it."""
        if not hasattr(parameter, "ds_id"):
            (safe_set_full_optimizer_state if key else safe_set_full_fp32_param)(parameter, value, *key)
            return
        size = parameter.ds_tensor.numel()  # the last ranks' parts are filled up to it
        padded = torch.nn.functional.pad(value.detach().flatten(), (0, size * self.world_size - value.numel()))
        mine = padded[size * self.global_rank : size * (self.global_rank + 1)]
        (safe_set_local_optimizer_state if key else safe_set_local_fp32_param)(parameter, mine, *key)

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer."""
        return self.optimizers[0]

    @property
    def _client(self) -> Optimizer:
        """The optimizer of ours inside it."""
        inner: Optimizer = self._zero.optimizer
        return inner

    def _moments(self) -> list[str]:
        """The names of what the optimizer keeps for every element."""
        first: Mapping[str, Any] = next(iter(self._client.state.values()), {})
        return [key for key, value in first.items() if isinstance(value, Tensor) and value.ndim > 0]


def _steps(optimizer: Optimizer) -> dict[str, float]:
    """Step counters, which all parameters share."""
    first: Mapping[str, Any] = next(iter(optimizer.state.values()), {})
    return {key: float(value) for key, value in first.items() if not (isinstance(value, Tensor) and value.ndim > 0)}


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    persistent = model.state_dict().keys()
    yield from ((name, value) for name, value in model.named_buffers() if name in persistent)


def _whole(parameter: Tensor) -> Tensor:
    """A weight that ZeRO-3 has split, whole; others as they are."""
    if not hasattr(parameter, "ds_id"):
        return parameter
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()
