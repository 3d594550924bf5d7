"""How a step is spread over devices. None of it decides a step's result, so none of it is identity.

A mesh has torchtitan's axes, outermost first; `devices` is their product. Global batch in tokens belongs to the
optimizer: `micro_batch_size` and accumulation follow from it here, and never change what is learnt. Ranks that differ
only in cp, tp or pp work on the same rows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from lmforge.errors import PlanError, Problem
from lmforge.parallel import traffic
from lmforge.parallel.layout import ONE, Spread, layouts
from lmforge.registry import Key, Node, node, register

if TYPE_CHECKING:
    from lmforge.parallel.engine.base import Engine
    from lmforge.parallel.shards import Cut

Part = Literal["params", "grads", "optimizer"]
Checkpointing = Literal["none", "selective", "full"]
CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "selective", "full")  # from what keeps most to what computes most again


@node
class Parallel(Node):
    """What every way of running a step has in common."""

    group = "parallel"
    identity = False
    flat: ClassVar[bool] = False  # whether what is split is one flat buffer, and not each tensor by its rows

    micro_batch_size: Annotated[int | None, Key("rows per device and pass; null = the compiler picks", unit="rows", gt=0)]
    activation_checkpointing: Annotated[
        Checkpointing | None,
        Key("recomputed in backward: selective = all of a layer but its matrix products and attention, full = all but its input; null = the fastest that fits"),
    ]
    compile: Annotated[bool, Key("torch.compile each decoder layer")]
    data_workers: Annotated[int, Key("processes a rank reads its batches ahead with; 0 = none but its own", "processes", ge=0)]
    max_restarts: Annotated[int, Key("times a run that crashed goes on from its last state by itself", ge=0)]
    grace_s: Annotated[float, Key("time for ranks that are asked to stop: the running step, and a state to disk; then they are killed", "seconds", gt=0)]

    def world(self, available: int) -> int:
        """Devices this uses of a machine that has `available` of them; more than there are is the compiler's to refuse."""
        raise NotImplementedError

    def mesh(self, devices: int) -> dict[str, int]:
        """Size of each axis; the product is `devices`. PlanError where the axes do not multiply to it."""
        raise NotImplementedError

    def shard_degree(self, part: Part, devices: int) -> int:
        """Over how many of `devices` a part of the training state is split, where it is at rest between steps."""
        return 1

    def offloads(self, part: Part) -> bool:
        """Whether a part of the training state is kept in host memory."""
        return False

    def sent(self, cut: Cut, moved: traffic.Moved) -> Sequence[traffic.Sent]:
        """What a device sends in an optimizer step, by axis of the mesh and collective; empty on one device."""
        return ()

    def sends(self, cut: Cut, moved: traffic.Moved) -> traffic.Traffic:
        """The same in bytes by collective."""
        return traffic.by_kind(self.sent(cut, moved))

    def strategy_args(self) -> dict[str, Any]:
        """The emitted strategy as plain data, for the plan: `strategy`, `activation_checkpointing`, `compile`, and what a subclass adds."""
        return {"strategy": self.type, "activation_checkpointing": self.checkpointing, "compile": self.compile}

    def emitted(self, *, compute_dtype: str, reduce_dtype: str, gradient_clipping: float | None, micro_batch_size: int, accumulation: int) -> dict[str, Any]:
        """What the plan shows of the strategy once precision, clipping and the micro-batch are known; most options need none of them."""
        return self.strategy_args()

    @property
    def checkpointing(self) -> Checkpointing:
        """What is computed again in backward; nothing until the compiler has picked."""
        return self.activation_checkpointing or "none"

    @property
    def whole(self) -> bool:
        """Whether every device holds the whole model."""
        return self.shard_degree("params", 2**20) == 1

    @property
    def option(self) -> str:
        """What the user types for it."""
        return self.type

    def engine(self, spread: Spread) -> Engine:
        """The Lightning strategy that runs it (torch)."""
        raise NotImplementedError


@register("parallel", "single")
class Single(Parallel):
    """One device."""

    def world(self, available: int) -> int:
        return 1

    def mesh(self, devices: int) -> dict[str, int]:
        return dict(ONE)

    def engine(self, spread: Spread) -> Engine:
        from lmforge.parallel.engine import whole

        return whole.single(spread)


@node
class Several(Parallel):
    """Any way that uses more than one device."""

    devices: Annotated[int | None, Key("devices to use; null = all of the hardware's", gt=0)]
    timeout_s: Annotated[float, Key("time that ranks wait for one that does not answer; then all are ended", "seconds", gt=0)]

    def world(self, available: int) -> int:
        return available if self.devices is None else self.devices


@register("parallel", "ddp")
class DDP(Several):
    """Data parallel (Li et al. 2020, PyTorch Distributed): every device holds the whole state, gradients are averaged."""

    def mesh(self, devices: int) -> dict[str, int]:
        return ONE | {"dp_replicate": devices}

    def sent(self, cut: Cut, moved: traffic.Moved) -> Sequence[traffic.Sent]:
        return traffic.copies(cut.mesh["dp_replicate"], moved)

    def engine(self, spread: Spread) -> Engine:
        from lmforge.parallel.engine import whole

        return whole.ReducingDDP(spread, self.timeout_s) if math.prod(spread.mesh.values()) > 1 else whole.single(spread)


@register("parallel", "mesh")
class Mesh(Several):
    """A mesh of named axes on DTensors: FSDP2 and HSDP (Zhao et al. 2023), tensor parallel (Shoeybi et al. 2019), pipeline (Huang et al. 2019)."""

    dp_replicate: Annotated[int | None, Key("groups of ranks that each hold a whole copy of the state (HSDP)", "ranks", gt=0)]
    dp_shard: Annotated[int | None, Key("ranks that weights, gradients and optimizer states are split over", "ranks", gt=0)]
    cp: Annotated[int | None, Key("ranks that a sequence is split over (context parallel)", "ranks", gt=0)]
    tp: Annotated[int | None, Key("ranks that each matrix is split over (tensor parallel)", "ranks", gt=0)]
    pp: Annotated[int | None, Key("ranks that the layers are split over (pipeline stages)", "ranks", gt=0)]
    pp_schedule: Annotated[
        Literal["1f1b", "gpipe"], Key("order of a pipeline's micro-batches: 1f1b keeps fewer activations (Narayanan et al. 2019), gpipe runs all forward first")
    ]
    reshard_after_forward: Annotated[bool, Key("free a layer's gathered weights after forward: less memory, one more all-gather in backward")]
    prefetch: Annotated[int, Key("layers whose weights are gathered ahead of the one that runs; 0 = FSDP2's own order", "layers", ge=0)]
    cpu_offload: Annotated[bool, Key("keep weights, gradients and optimizer states in host memory")]

    def axes(self) -> dict[str, int | None]:
        """The sizes as they are typed; None is what the others leave."""
        return {"pp": self.pp, "dp_replicate": self.dp_replicate, "dp_shard": self.dp_shard, "cp": self.cp, "tp": self.tp}

    def mesh(self, devices: int) -> dict[str, int]:
        sizes = self.axes()
        fixed = math.prod(size for size in sizes.values() if size is not None)
        rest = [axis for axis, size in sizes.items() if size is None]
        if devices % fixed or (not rest and fixed != devices):
            shown = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size is not None and size > 1) or "every axis 1"
            what = f"{shown} = {fixed}, and {'that does not divide' if rest else 'there are'} {devices} devices"
            raise PlanError("parallel", what, f"type {layouts(sizes, devices)}")
        return {axis: devices // fixed if size is None else size for axis, size in sizes.items()}

    def check(self, where: str) -> Iterator[Problem]:
        open_axes = [axis for axis, size in self.axes().items() if size is None]
        if len(open_axes) > 1:
            yield Problem(where, f"{' and '.join(open_axes)} are both null, and one axis only can be what the others leave", f"type {where}.{open_axes[1]}=1")

    @property
    def whole(self) -> bool:
        return False

    def shard_degree(self, part: Part, devices: int) -> int:
        return self.mesh(devices)["dp_shard"]

    def sent(self, cut: Cut, moved: traffic.Moved) -> Sequence[traffic.Sent]:
        return traffic.mesh(cut, moved, reshards=self.reshard_after_forward)

    def offloads(self, part: Part) -> bool:
        return self.cpu_offload

    def strategy_args(self) -> dict[str, Any]:
        own = {"reshard_after_forward": self.reshard_after_forward, "prefetch": self.prefetch, "cpu_offload": self.cpu_offload}
        pipeline = {"pp_schedule": self.pp_schedule} if self.pp != 1 else {}
        return super().strategy_args() | own | pipeline

    def engine(self, spread: Spread) -> Engine:
        from lmforge.parallel.engine import mesh, whole

        return mesh.MeshEngine(self, spread) if math.prod(spread.mesh.values()) > 1 else whole.single(spread)


@register("parallel", "deepspeed")
class DeepSpeed(Several):
    """ZeRO (Rajbhandari et al. 2020) by DeepSpeed: stage 1 splits optimizer states, 2 gradients too, 3 parameters too."""

    needs = {"deepspeed": "deepspeed"}  # noqa: RUF012
    flat: ClassVar[bool] = True

    stage: Annotated[int, Key("what is split: 1 optimizer states, 2 and gradients, 3 and parameters", choices=(1, 2, 3))]
    offload_optimizer: Annotated[bool, Key("keep optimizer states in host memory and update there (ZeRO-Offload)")]
    offload_parameters: Annotated[bool, Key("keep parameters in host memory; stage 3 only (ZeRO-Infinity)")]

    @property
    def option(self) -> str:
        return f"deepspeed_zero{self.stage}"

    def mesh(self, devices: int) -> dict[str, int]:
        return ONE | {"dp_shard": devices}

    def sent(self, cut: Cut, moved: traffic.Moved) -> Sequence[traffic.Sent]:
        return traffic.zero(self.stage, cut.mesh["dp_shard"], moved)

    def check(self, where: str) -> Iterator[Problem]:
        if self.offload_parameters and self.stage != 3:
            what = f"ZeRO stage {self.stage} does not split parameters, so it cannot offload them"
            yield Problem(f"{where}.offload_parameters", what, "type parallel=deepspeed_zero3")

    def engine(self, spread: Spread) -> Engine:
        if spread.accelerator == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed looks here when it is imported
        from lmforge.parallel.engine import deepspeed

        return deepspeed.DeepSpeedEngine(self, spread)

    def shard_degree(self, part: Part, devices: int) -> int:
        first_stage = {"optimizer": 1, "grads": 2, "params": 3}
        return devices if self.stage >= first_stage[part] else 1

    def offloads(self, part: Part) -> bool:
        return {"optimizer": self.offload_optimizer, "params": self.offload_parameters, "grads": False}[part]

    def strategy_args(self) -> dict[str, Any]:
        return super().strategy_args() | {"zero_optimization": self._zero()}

    def _zero(self) -> dict[str, Any]:
        host = {"device": "cpu", "pin_memory": True}
        offload = {"offload_optimizer": self.offload_optimizer, "offload_param": self.offload_parameters}
        return {"stage": self.stage} | {name: dict(host) for name, wanted in offload.items() if wanted}

    def emitted(self, **known: Any) -> dict[str, Any]:
        """DeepSpeed is told everything by one dict, so the plan shows it whole."""
        return super().strategy_args() | {"config": self.deepspeed_config(**known)}

    def deepspeed_config(
        self, *, compute_dtype: str, reduce_dtype: str, gradient_clipping: float | None, micro_batch_size: int, accumulation: int
    ) -> dict[str, Any]:
        """The config.json of DeepSpeed, whole; nothing in it comes from anywhere but typed keys. Weights are kept in float32.

        `micro_batch_size` in rows per device, `accumulation` in passes per optimizer step, `gradient_clipping` a norm.
        """
        emitted: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": gradient_clipping or 0.0,  # DeepSpeed's way to say none
            "zero_optimization": self._zero(),
            "zero_allow_untested_optimizer": True,  # the optimizer is ours, built from the optimizer group
            "communication_data_type": {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[reduce_dtype],
        }
        if self.offload_optimizer:
            emitted["zero_force_ds_cpu_optimizer"] = False  # the same optimizer on the host, not DeepSpeed's own Adam
        if compute_dtype != "float32":
            emitted["torch_autocast"] = {"enabled": True, "dtype": compute_dtype}
            if reduce_dtype == "float32":  # else it sums the gradients of linear layers in the dtype that they compute in
                emitted["torch_autocast"]["lower_precision_safe_modules"] = []
        return emitted


@register("parallel", "auto")
class Auto(Several):
    """The compiler searches: the fastest of one device, DDP and meshes that fits (lmforge.compiler.auto). Null is searched, what is typed is kept."""

    dp_replicate: Annotated[int | None, Key("groups of ranks that each hold a whole copy of the state; null = searched", "ranks", gt=0)]
    dp_shard: Annotated[int | None, Key("ranks that weights, gradients and optimizer states are split over; null = searched", "ranks", gt=0)]
    tp: Annotated[int | None, Key("ranks that each matrix is split over; null = searched, within a node", "ranks", gt=0)]
    pp: Annotated[int | None, Key("ranks that the layers are split over; null = searched, stages of as many layers each", "ranks", gt=0)]
    pp_schedule: Annotated[Literal["1f1b", "gpipe"], Key("order of a pipeline's micro-batches, if one is chosen")]
    reshard_after_forward: Annotated[bool | None, Key("free a layer's gathered weights after forward; null = searched")]
    prefetch: Annotated[int, Key("layers whose weights are gathered ahead of the one that runs, if they are sharded", "layers", ge=0)]
    cpu_offload: Annotated[bool | None, Key("keep weights, gradients and optimizer states in host memory; null = searched")]
