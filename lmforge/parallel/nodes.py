"""How a step is spread over devices. None of it decides a step's result, so none of it is identity.

A mesh has torchtitan's axes, outermost first; `devices` is their product. Global batch in tokens belongs to the
optimizer: `micro_batch_size` and accumulation follow from it here, and never change what is learnt.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from lmforge.errors import Problem, RunError
from lmforge.registry import Key, Node, node, register

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

NOT_YET, INSTEAD = "planned but not yet run by this version", "type parallel=ddp or use plan"
AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
Part = Literal["params", "grads", "optimizer"]


@node
class Parallel(Node):
    """What every way of running a step has in common."""

    group = "parallel"
    identity = False
    runs: ClassVar[bool] = False  # whether `run` can execute it, or only `plan`
    axis: ClassVar[str] = "dp_replicate"  # the axis that all devices lie on

    micro_batch_size: Annotated[int | None, Key("rows per device and pass; null = the compiler picks", unit="rows", gt=0)]
    activation_checkpointing: Annotated[
        Literal["none", "selective", "full"],
        Key("recomputed in backward: selective = all of a layer but its matrix products and attention, full = all but its input"),
    ]
    compile: Annotated[bool, Key("torch.compile each decoder layer")]

    def world(self, available: int) -> int:
        """Devices this uses of a machine that has `available` of them; more than there are is the compiler's to refuse."""
        raise NotImplementedError

    def mesh(self, devices: int) -> dict[str, int]:
        """Size of each axis; the product is `devices`."""
        return dict.fromkeys(AXES, 1) | {self.axis: devices}

    def shard_degree(self, part: Part, devices: int) -> int:
        """Over how many of `devices` a part of the training state is split, where it is at rest between steps."""
        return 1

    def offloads(self, part: Part) -> bool:
        """Whether a part of the training state is kept in host memory."""
        return False

    def strategy_args(self) -> dict[str, Any]:
        """The emitted strategy as plain data, for the plan: `strategy`, `activation_checkpointing`, `compile`, and what a subclass adds."""
        return {"strategy": self.type, "activation_checkpointing": self.activation_checkpointing, "compile": self.compile}

    def emitted(
        self, *, compute_dtype: str, loss_scale: float | None, reduce_dtype: str, gradient_clipping: float | None, micro_batch_size: int, accumulation: int
    ) -> dict[str, Any]:
        """What the plan shows of the strategy once precision, clipping and the micro-batch are known; most options need none of them."""
        return self.strategy_args()

    @property
    def reason(self) -> str:
        """Why `run` refuses this option, in one line; '' where it runs."""
        return "" if self.runs else f"parallel={self.option}: {NOT_YET}; {INSTEAD}"

    @property
    def option(self) -> str:
        """What the user types for it."""
        return self.type

    def strategy(self, accelerator: str, devices: int, reduce_dtype: str) -> Strategy:
        """The Lightning strategy for `cpu` or `cuda`, gradients summed in `reduce_dtype`; RunError where this option only plans."""
        raise RunError(f"parallel={self.option}", NOT_YET, INSTEAD)


@register("parallel", "single")
class Single(Parallel):
    """One device."""

    runs = True

    def world(self, available: int) -> int:
        return 1

    def strategy(self, accelerator: str, devices: int, reduce_dtype: str) -> Strategy:
        from lmforge.parallel import strategies

        return strategies.single(accelerator)


@node
class Several(Parallel):
    """Any way that uses more than one device."""

    devices: Annotated[int | None, Key("devices to use; null = all of the hardware's", gt=0)]

    def world(self, available: int) -> int:
        return available if self.devices is None else self.devices


@register("parallel", "ddp")
class DDP(Several):
    """Data parallel (Li et al. 2020, PyTorch Distributed): every device holds the whole state, gradients are averaged."""

    runs = True

    def strategy(self, accelerator: str, devices: int, reduce_dtype: str) -> Strategy:
        from lmforge.parallel import strategies

        return strategies.ddp(accelerator, reduce_dtype) if devices > 1 else strategies.single(accelerator)


@register("parallel", "fsdp")
class FSDP(Several):
    """Fully sharded data parallel, FSDP2 (Zhao et al. 2023; torch's fully_shard): the state is split, layers are gathered as needed."""

    axis = "dp_shard"

    reshard_after_forward: Annotated[bool, Key("free a layer's gathered weights after forward: less memory, one more all-gather in backward")]
    cpu_offload: Annotated[bool, Key("keep weights, gradients and optimizer states in host memory")]

    def shard_degree(self, part: Part, devices: int) -> int:
        return devices

    def offloads(self, part: Part) -> bool:
        return self.cpu_offload

    def strategy_args(self) -> dict[str, Any]:
        return super().strategy_args() | {"reshard_after_forward": self.reshard_after_forward, "cpu_offload": self.cpu_offload}


@register("parallel", "deepspeed")
class DeepSpeed(Several):
    """ZeRO (Rajbhandari et al. 2020) by DeepSpeed: stage 1 splits optimizer states, 2 gradients too, 3 parameters too."""

    axis = "dp_shard"

    stage: Annotated[int, Key("what is split: 1 optimizer states, 2 and gradients, 3 and parameters", choices=(1, 2, 3))]
    offload_optimizer: Annotated[bool, Key("keep optimizer states in host memory and update there (ZeRO-Offload)")]
    offload_parameters: Annotated[bool, Key("keep parameters in host memory; stage 3 only (ZeRO-Infinity)")]

    @property
    def option(self) -> str:
        return f"deepspeed_zero{self.stage}"

    def check(self, where: str) -> Iterator[Problem]:
        if self.offload_parameters and self.stage != 3:
            what = f"ZeRO stage {self.stage} does not split parameters, so it cannot offload them"
            yield Problem(f"{where}.offload_parameters", what, "type parallel=deepspeed_zero3")

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
        self, *, compute_dtype: str, loss_scale: float | None, reduce_dtype: str, gradient_clipping: float | None, micro_batch_size: int, accumulation: int
    ) -> dict[str, Any]:
        """The config.json of DeepSpeed, whole; nothing in it comes from anywhere but typed keys.

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
        if compute_dtype == "bfloat16":
            emitted["bf16"] = {"enabled": True}
        if compute_dtype == "float16" and loss_scale is not None:
            # loss_scale 0 means dynamic; it starts at 2^initial_scale_power, and Precision admits powers of two only.
            emitted["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": int(loss_scale).bit_length() - 1}
        return emitted
