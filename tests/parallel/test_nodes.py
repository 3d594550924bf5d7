"""Parallel options: meshes, what each splits, what is emitted, and that no key is inert."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from lmforge.codec import decode, encode
from lmforge.errors import ConfigError, RunError
from lmforge.parallel.nodes import AXES, Parallel

CONF = Path(__file__).parents[2] / "conf" / "parallel"
OPTIONS = sorted(path.stem for path in CONF.glob("*.yaml"))


def make(name: str, **change: Any) -> Any:
    return decode(Parallel, yaml.safe_load((CONF / f"{name}.yaml").read_text()) | change, "parallel")


def emitted(node: Any) -> Any:
    """Everything a plan or a job takes from a node."""
    config = zero_config(node) if node.type == "deepspeed" else None
    parts = [(node.shard_degree(part, 8), node.offloads(part)) for part in ("params", "grads", "optimizer")]
    return (node.world(64), node.micro_batch_size, node.strategy_args(), parts, config)


def zero_config(node: Any, **change: Any) -> dict[str, Any]:
    given = {"compute_dtype": "float32", "loss_scale": None, "reduce_dtype": "float32", "gradient_clipping": None, "micro_batch_size": 2, "accumulation": 3}
    return node.deepspeed_config(**(given | change))


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_decodes_and_is_typed_by_its_own_name(name: str) -> None:
    node = make(name)
    assert node.option == name
    assert decode(Parallel, encode(node)) == node


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("devices", [1, 2, 64])
def test_a_mesh_has_every_axis_and_its_product_is_the_devices(name: str, devices: int) -> None:
    mesh = make(name).mesh(devices)
    assert tuple(mesh) == AXES
    assert math.prod(mesh.values()) == devices


@pytest.mark.parametrize("name", OPTIONS)
def test_no_key_is_inert(name: str) -> None:
    other = {"devices": 2, "micro_batch_size": 4, "activation_checkpointing": "full", "compile": True, "reshard_after_forward": False, "cpu_offload": True}
    other |= {"stage": 1 if name.endswith("3") else 3, "offload_optimizer": True, "offload_parameters": True}
    values = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    for key in values:
        if key == "type" or (key == "offload_parameters" and not name.endswith("3")):
            continue
        assert emitted(make(name, **{key: other[key]})) != emitted(make(name)), key


# ZeRO (Rajbhandari et al. 2020), figure 1: bytes per device of a 7.5B model on 64 devices with mixed-precision Adam.
@pytest.mark.parametrize(("name", "gb"), [("ddp", 120), ("deepspeed_zero1", 31.4), ("deepspeed_zero2", 16.6), ("deepspeed_zero3", 1.9), ("fsdp", 1.9)])
def test_what_is_split_reproduces_the_zero_papers_figure_1(name: str, gb: float) -> None:
    node, bytes_per_param = make(name), {"params": 2, "grads": 2, "optimizer": 12}
    total = sum(7.5e9 * size / node.shard_degree(part, 64) for part, size in bytes_per_param.items())
    assert total / 1e9 == pytest.approx(gb, rel=0.02)


def test_the_deepspeed_config_is_the_golden_one() -> None:
    node = make("deepspeed_zero3", offload_optimizer=True, offload_parameters=True)
    config = zero_config(node, compute_dtype="float16", loss_scale=65536.0, reduce_dtype="bfloat16", gradient_clipping=1.0)
    assert config == {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "offload_param": {"device": "cpu", "pin_memory": True}},
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "bf16",
        "zero_force_ds_cpu_optimizer": False,
        "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16},
    }
    assert zero_config(make("deepspeed_zero1"), compute_dtype="bfloat16") == {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",
        "bf16": {"enabled": True},
    }


def test_deepspeed_itself_takes_the_config() -> None:
    config = pytest.importorskip("deepspeed.runtime.config")
    node = make("deepspeed_zero3", offload_optimizer=True, offload_parameters=True)
    read = config.DeepSpeedConfig(zero_config(node, compute_dtype="float16", loss_scale=1024.0, reduce_dtype="bfloat16"))
    assert (read.zero_config.stage, read.gradient_accumulation_steps, read.float16_config.initial_scale_power) == (3, 3, 10)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_offers_selective_recomputation(name: str) -> None:
    assert make(name, activation_checkpointing="selective").strategy_args()["activation_checkpointing"] == "selective"
    with pytest.raises(ConfigError, match="activation_checkpointing"):
        make(name, activation_checkpointing="some")


def test_offloading_parameters_needs_stage_3() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.offload_parameters: ZeRO stage 2 .*; type parallel=deepspeed_zero3"):
        make("deepspeed_zero2", offload_parameters=True)
    with pytest.raises(ConfigError, match="0 must be > 0"):
        make("ddp", devices=0)
    with pytest.raises(ConfigError, match=r"parallel\.devices: unknown key"):
        make("single", devices=2)


@pytest.mark.parametrize("name", OPTIONS)
def test_what_only_plans_says_so_in_one_line(name: str) -> None:
    node = make(name)
    if node.runs:
        assert node.reason == ""
        return
    with pytest.raises(RunError, match=rf"parallel={name}: planned but not yet run by this version; type parallel=ddp or use plan") as caught:
        node.strategy("cpu", 2, "float32")
    assert str(caught.value) == f"run error: {node.reason}"


def test_the_strategies_that_run_are_lightnings() -> None:
    strategies = pytest.importorskip("lightning.pytorch.strategies")
    single = make("single").strategy("cpu", 1, "float32")
    assert isinstance(single, strategies.SingleDeviceStrategy)
    assert single.root_device.type == "cpu"
    for accelerator, backend in {"cpu": "gloo", "cuda": "nccl"}.items():
        ddp = make("ddp").strategy(accelerator, 2, "float32")
        assert isinstance(ddp, strategies.DDPStrategy)
        assert ddp.process_group_backend == backend
