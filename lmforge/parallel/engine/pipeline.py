"""Pipeline parallel by torch.distributed.pipelining: a rank keeps its stage's layers, and micro-batches flow from stage to stage."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining._backward import stage_backward

from lmforge.parallel.layout import stages

SCHEDULES = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}
Autocast = Callable[[], AbstractContextManager[Any]]


class Elsewhere(nn.Module):
    """In the place of a module that another stage holds: hands on what it is given, so that names and loops stay as they are."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden


class Stage(nn.Module):
    """A transformers causal language model with the layers of one stage: ids or hidden states in, hidden states or logits out."""

    def __init__(self, model: Any, first: bool, last: bool) -> None:
        super().__init__()
        self.model, self.first, self.last = model, first, last
        self.autocast: Autocast = contextlib.nullcontext

    def forward(self, given: Tensor, position_ids: Tensor) -> Tensor:
        inputs = {"input_ids" if self.first else "inputs_embeds": given, "position_ids": position_ids}
        with self.autocast():
            if self.last:
                logits: Tensor = self.model(**inputs, attention_mask=None, use_cache=False).logits
                return logits
            hidden: Tensor = self.model.base_model(**inputs, attention_mask=None, use_cache=False).last_hidden_state
            return hidden


class Sharded(PipelineStage):
    """A stage under FSDP2 whose gradients go to their owners after every micro-batch. torch's keeps them, and the weights, whole to the end of a step,
    which a stage that was sharded for want of room cannot hold. Weights stay gathered through a step only where `reshards` is false.
    """

    reshards: bool

    def backward_maybe_with_nosync(self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False) -> Any:
        """Backward of one micro-batch, as FSDP2 runs it outside a pipeline; copies (HSDP) are summed in the last."""
        assert backward_type == "full"
        stage: Any = self.submod
        stage.set_is_last_backward(True)
        stage.set_reshard_after_backward(self.reshards or last_backward)
        stage.set_requires_gradient_sync(True)
        stage.set_requires_all_reduce(last_backward)
        return stage_backward(bwd_kwargs["stage_output"], bwd_kwargs["output_grads"], bwd_kwargs["input_values"]), None


class Pipeline:
    """This rank's stage and its schedule. The model is cut in place."""

    def __init__(self, model: Any, mesh: DeviceMesh, device: torch.device, schedule: str, reshards: bool) -> None:
        self.mesh, self.device, self.schedule_type, self.reshards = mesh, device, SCHEDULES[schedule], reshards
        self.index, self.count = mesh.get_local_rank(), mesh.size()
        self.first, self.last = self.index == 0, self.index == self.count - 1
        cut(model, self.index, self.count)
        self.stage = Stage(model, self.first, self.last)
        self._schedules: dict[int, Any] = {}
        self._loss: Any = None  # the last stage's, of the step that runs

    def backward(self, batches: Sequence[Mapping[str, Tensor]], loss: Callable[[Tensor, Tensor], Tensor], autocast: Autocast) -> None:
        """Gradients of the scaled `loss(logits, labels)` summed over micro-batches, which have one shape; the last stage alone calls it."""
        joined = {name: torch.cat([batch[name] for batch in batches]) for name in ("input_ids", "position_ids", "labels")}
        self._loss, self.stage.autocast = loss, autocast
        given = (joined["input_ids"],) if self.first else ()
        target = {"target": joined["labels"], "losses": []} if self.last else {}
        self._schedule(len(batches)).step(*given, position_ids=joined["position_ids"], **target, return_outputs=False)

    def _schedule(self, micro_batches: int) -> Any:
        if micro_batches not in self._schedules:
            kind = Sharded if isinstance(self.stage, FSDPModule) else PipelineStage
            stage = kind(self.stage, self.index, self.count, self.device, group=self.mesh.get_group())
            if isinstance(stage, Sharded):
                stage.reshards = self.reshards
            self._schedules[micro_batches] = self.schedule_type(stage, micro_batches, loss_fn=lambda *given: self._loss(*given), scale_grads=False)
        return self._schedules[micro_batches]


def cut(model: Any, index: int, count: int) -> None:
    """Keep what stage `index` of `count` runs: its layers, the embedding in the first, the final norm and the head in the last."""
    network = model.base_model
    mine = stages(len(network.layers), count)[index]
    for layer in range(len(network.layers)):
        if layer not in mine:
            network.layers[layer] = Elsewhere()
    if index > 0:
        network.embed_tokens = Elsewhere()
    if index < count - 1:
        network.norm = Elsewhere()
        model.lm_head = Elsewhere()
