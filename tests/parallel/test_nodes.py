"""Parallel options: meshes, what each splits, what is emitted, and that no key is inert."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from lmforge.codec import decode, encode
from lmforge.compose.catalog import Catalog
from lmforge.errors import ConfigError, LmforgeError, PlanError
from lmforge.parallel.layout import AXES, ONE, Spread
from lmforge.parallel.nodes import Parallel
from lmforge.verbs.list import tree

CATALOG = Catalog.of()
EVERY = sorted(CATALOG.options["parallel"])
OPTIONS = [name for name in EVERY if name != "auto"]  # which becomes one of the others before it is emitted (tests/compiler/test_auto.py)
MESHES = [name for name in OPTIONS if tree(CATALOG, "parallel", name)["type"] == "mesh"]
PARTS: tuple[Any, ...] = ("params", "grads", "optimizer")


def make(name: str, **changes: Any) -> Any:
    return decode(Parallel, tree(CATALOG, "parallel", name) | changes, "parallel")


def zero_config(node: Any, **changes: Any) -> dict[str, Any]:
    given = {"compute_dtype": "float32", "reduce_dtype": "float32", "gradient_clipping": None, "micro_batch_size": 2, "accumulation": 3}
    return node.deepspeed_config(**(given | changes))


def spread(mesh: dict[str, int], accelerator: str = "cpu") -> Spread:
    return Spread(accelerator, mesh, "float32", "float32", gradient_clipping=1.0, micro_batch_size=2, accumulation=3, splits={})


def test_every_option_of_the_issue_is_there() -> None:
    zero = {f"deepspeed_zero{stage}" for stage in (1, 2, 3)}
    assert set(EVERY) == {"auto", "single", "ddp", "fsdp", "fsdp_zero2", "hsdp", "tp", "fsdp_tp", "pp", "fsdp_pp", "3d"} | zero


@pytest.mark.parametrize("name", EVERY)
def test_an_option_decodes(name: str) -> None:
    node = make(name)
    assert decode(Parallel, encode(node)) == node
    if name not in (*MESHES, "auto"):
        assert node.option == name


# The mesh that each makes of 8 devices, without its axes of 1.
ON_8 = {
    "single": {}, "ddp": {"dp_replicate": 8}, "fsdp": {"dp_shard": 8}, "fsdp_zero2": {"dp_shard": 8}, "hsdp": {"dp_replicate": 2, "dp_shard": 4},
    "tp": {"tp": 8}, "fsdp_tp": {"dp_shard": 4, "tp": 2}, "pp": {"pp": 8}, "fsdp_pp": {"pp": 2, "dp_shard": 4}, "3d": {"pp": 2, "dp_shard": 2, "tp": 2},
    "deepspeed_zero1": {"dp_shard": 8}, "deepspeed_zero2": {"dp_shard": 8}, "deepspeed_zero3": {"dp_shard": 8},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_a_mesh_has_every_axis_and_its_product_is_the_devices(name: str) -> None:
    node = make(name)
    for available in (4, 8, 64, 512):
        devices = node.world(available)
        mesh = node.mesh(devices)
        assert devices == (1 if name == "single" else available)
        assert tuple(mesh) == AXES
        assert math.prod(mesh.values()) == devices
    assert node.mesh(node.world(8)) == ONE | ON_8[name]


def typed(message: str) -> list[dict[str, Any]]:
    """The layouts that a refusal names, as changes of keys."""
    found = [dict([one.split("=")]) for one in re.findall(r"parallel\.(\w+=\d+)", message)]
    return [{key: int(value) for key, value in one.items()} for one in found]


@pytest.mark.parametrize(
    ("name", "changes", "devices", "arithmetic"),
    [
        ("fsdp_tp", {"tp": 3}, 8, "tp 3 = 3, and that does not divide 8 devices"),
        ("3d", {}, 2, "pp 2 x tp 2 = 4, and that does not divide 2 devices"),
        ("3d", {"dp_replicate": 2}, 12, "pp 2 x dp_replicate 2 x tp 2 = 8, and that does not divide 12 devices"),
        ("fsdp_tp", {"dp_shard": 2}, 8, "dp_shard 2 x tp 2 = 4, and there are 8 devices"),
        ("tp", {"tp": 4, "dp_shard": 4}, 8, "dp_shard 4 x tp 4 = 16, and there are 8 devices"),
        ("fsdp", {"dp_shard": 1}, 8, "every axis 1 = 1, and there are 8 devices"),
        ("hsdp", {"dp_replicate": 3}, 4, "dp_replicate 3 = 3, and that does not divide 4 devices"),
        ("pp", {"dp_shard": 5}, 7, "dp_shard 5 = 5, and that does not divide 7 devices"),
    ],
)
def test_axes_that_do_not_multiply_show_the_arithmetic_and_layouts_that_fit(name: str, changes: dict[str, int], devices: int, arithmetic: str) -> None:
    """One line; whatever it tells one to type works when typed."""
    with pytest.raises(PlanError) as caught:
        make(name, **changes).mesh(devices)
    message = str(caught.value)
    assert f"parallel: {arithmetic}; type " in message
    assert "\n" not in message
    offers = typed(message)
    assert offers
    for offer in offers:
        asked = offer.get("devices", devices)
        assert math.prod(make(name, **{**changes, **offer}).mesh(asked).values()) == asked, offer
        assert asked <= max(devices, int(arithmetic.split(" = ")[1].split(",")[0])), offer  # no more than there are, where fewer would do


def test_two_axes_that_are_left_open_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"dp_shard and tp are both null, .*; type parallel\.tp=1") as caught:
        make("fsdp", tp=None)
    assert "\n" not in str(caught.value)
    assert make("fsdp", tp=1).mesh(8)["dp_shard"] == 8
    assert make("tp", dp_shard=2).mesh(8) == ONE | {"dp_shard": 2, "tp": 4}


def emitted(node: Any) -> Any:
    """Everything a plan or a run takes from a node; an axis matters where the mesh is another, or refused."""
    config = zero_config(node) if node.type == "deepspeed" else None
    try:
        mesh: Any = node.mesh(node.world(64))
    except LmforgeError as error:
        return str(error)
    parts = [(node.shard_degree(part, node.world(64)), node.offloads(part)) for part in PARTS]
    run = [getattr(node, key, None) for key in ("micro_batch_size", "data_workers", "max_restarts", "grace_s", "timeout_s")]
    return (mesh, run, node.strategy_args(), parts, config)


OTHER = {
    "devices": 16, "micro_batch_size": 4, "activation_checkpointing": "full", "compile": True, "data_workers": 2, "max_restarts": 1, "grace_s": 9.0,
    "timeout_s": 9.0, "dp_replicate": 4, "dp_shard": 4,
    "cp": 4, "tp": 4, "pp": 4, "pp_schedule": "gpipe", "prefetch": 1, "cpu_offload": True, "offload_optimizer": True, "offload_parameters": True,
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_no_key_is_inert(name: str) -> None:
    """That a run reads data_workers, max_restarts, grace_s and timeout_s is tests/keys's to see."""
    values = tree(CATALOG, "parallel", name)
    for key, value in values.items():
        no_pipeline = key == "pp_schedule" and values["pp"] == 1
        if key == "type" or no_pipeline or (key == "offload_parameters" and not name.endswith("3")):
            continue
        other = {"stage": 1 if value == 3 else 3, "reshard_after_forward": not value}.get(key, OTHER.get(key))
        assert other != value, key
        assert emitted(make(name, **{key: other})) != emitted(make(name)), key


# ZeRO (Rajbhandari et al. 2020), figure 1: bytes per device of a 7.5B model on 64 devices with mixed-precision Adam.
@pytest.mark.parametrize(("name", "gb"), [("ddp", 120), ("deepspeed_zero1", 31.4), ("deepspeed_zero2", 16.6), ("deepspeed_zero3", 1.9), ("fsdp", 1.9)])
def test_what_is_split_reproduces_the_zero_papers_figure_1(name: str, gb: float) -> None:
    node, bytes_per_param = make(name), {"params": 2, "grads": 2, "optimizer": 12}
    total = sum(7.5e9 * size / node.shard_degree(part, 64) for part, size in bytes_per_param.items())
    assert total / 1e9 == pytest.approx(gb, rel=0.02)


def test_the_deepspeed_config_is_the_golden_one() -> None:
    node = make("deepspeed_zero3", offload_optimizer=True, offload_parameters=True)
    config = zero_config(node, compute_dtype="float16", reduce_dtype="bfloat16", gradient_clipping=1.0)
    assert config == {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "offload_param": {"device": "cpu", "pin_memory": True}},
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "bf16",
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {"enabled": True, "dtype": "float16"},
    }
    assert zero_config(make("deepspeed_zero1")) == {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",
    }
    whole = zero_config(make("deepspeed_zero2"), compute_dtype="bfloat16")["torch_autocast"]
    assert whole == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}  # gradients are summed in float32, of linear layers too


def test_the_plan_shows_the_deepspeed_config_whole() -> None:
    node = make("deepspeed_zero2")
    known = {"compute_dtype": "bfloat16", "reduce_dtype": "float32", "gradient_clipping": 1.0, "micro_batch_size": 4, "accumulation": 1}
    assert node.emitted(**known)["config"] == node.deepspeed_config(**known)
    assert make("fsdp").emitted(**known) == make("fsdp").strategy_args()


def test_deepspeed_itself_takes_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    config = pytest.importorskip("deepspeed.runtime.config")
    node = make("deepspeed_zero3", offload_optimizer=True, offload_parameters=True)
    read = config.DeepSpeedConfig(zero_config(node, compute_dtype="bfloat16", reduce_dtype="bfloat16", gradient_clipping=0.5))
    assert (read.zero_config.stage, read.gradient_accumulation_steps, read.train_micro_batch_size_per_gpu, read.gradient_clipping) == (3, 3, 2, 0.5)
    assert (read.torch_autocast_enabled, str(read.torch_autocast_dtype)) == (True, "torch.bfloat16")
    assert (read.zero_config.offload_optimizer.device, read.zero_config.offload_param.device) == ("cpu", "cpu")
    assert (read.float16_config.enabled, read.bfloat16_config.enabled) == (False, False)  # weights stay in float32
    assert not config.DeepSpeedConfig(zero_config(make("deepspeed_zero1"))).torch_autocast_enabled


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_offers_selective_recomputation(name: str) -> None:
    assert make(name, activation_checkpointing="selective").strategy_args()["activation_checkpointing"] == "selective"
    with pytest.raises(ConfigError, match="activation_checkpointing"):
        make(name, activation_checkpointing="some")


def test_keys_out_of_range_and_of_other_options() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.offload_parameters: ZeRO stage 2 .*; type parallel=deepspeed_zero3"):
        make("deepspeed_zero2", offload_parameters=True)
    for key in ("devices", *AXES):
        with pytest.raises(ConfigError, match=rf"parallel\.{key}: 0 must be > 0"):
            make("fsdp", **{key: 0})
    for key in ("prefetch", "data_workers", "max_restarts"):
        with pytest.raises(ConfigError, match=rf"parallel\.{key}: -1 must be >= 0"):
            make("fsdp", **{key: -1})
    with pytest.raises(ConfigError, match=r"parallel\.devices: unknown key"):
        make("single", devices=2)
    with pytest.raises(ConfigError, match=r"parallel\.tp: unknown key"):
        make("ddp", tp=2)
    with pytest.raises(ConfigError, match="pp_schedule"):
        make("pp", pp_schedule="interleaved")


def test_engines_are_lightnings_strategies() -> None:
    strategies = pytest.importorskip("lightning.pytorch.strategies")
    single = make("single").engine(spread(ONE))
    assert isinstance(single, strategies.SingleDeviceStrategy)
    assert single.root_device.type == "cpu"
    for accelerator, backend in {"cpu": "gloo", "cuda": "nccl"}.items():
        for name, kind in {"ddp": strategies.DDPStrategy, **dict.fromkeys(MESHES, strategies.ModelParallelStrategy)}.items():
            made = make(name).engine(spread(make(name).mesh(8), accelerator))
            assert isinstance(made, kind)
            assert made.process_group_backend == backend
            assert made.mesh == ONE | ON_8[name]
    assert isinstance(make("fsdp").engine(spread(make("fsdp").mesh(1))), strategies.SingleDeviceStrategy)  # a mesh of one rank is no mesh
    offloading = make("fsdp", cpu_offload=True).engine(spread(make("fsdp").mesh(8), "cuda"))
    assert offloading.process_group_backend == "cpu:gloo,cuda:nccl"


def test_deepspeeds_engine_is_told_the_config_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    strategies = pytest.importorskip("lightning.pytorch.strategies")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    node = make("deepspeed_zero3")
    made = node.engine(spread(node.mesh(8)))
    assert isinstance(made, strategies.DeepSpeedStrategy)
    assert made.config == zero_config(node, gradient_clipping=1.0)
