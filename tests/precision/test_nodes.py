"""Precision options: what they mean in torch, and which mixtures are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lmforge.codec import decode, digest, encode
from lmforge.errors import ConfigError
from lmforge.precision.nodes import Precision, dtype_bytes

CONF = Path(__file__).parents[2] / "conf" / "precision"


def option(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONF / f"{name}.yaml").read_text())


@pytest.mark.parametrize(("name", "compute", "autocast"), [("fp32", "float32", False), ("bf16", "bfloat16", True), ("fp16", "float16", True)])
def test_an_option_multiplies_in_the_dtype_of_its_name(name: str, compute: str, autocast: bool) -> None:
    node = decode(Precision, option(name), "precision")
    assert (node.compute_dtype, node.autocast, node.param_bytes) == (compute, autocast, 4)
    assert decode(Precision, encode(node)) == node


def test_element_sizes_are_torchs() -> None:
    torch = pytest.importorskip("torch")
    for name in ("float32", "bfloat16", "float16"):
        assert dtype_bytes(name) == torch.empty(0, dtype=getattr(torch, name)).element_size()


def test_every_key_is_identity() -> None:
    base = decode(Precision, option("fp32"))
    for key, value in {"param_dtype": "bfloat16", "reduce_dtype": "bfloat16", "compute_dtype": "bfloat16"}.items():
        change = {key: value} | ({"compute_dtype": "bfloat16"} if key == "param_dtype" else {})
        assert digest(encode(decode(Precision, option("fp32") | change), identity=True)) != digest(encode(base, identity=True))
    scaled = decode(Precision, option("fp16") | {"loss_scale": 1024})
    assert digest(encode(scaled, identity=True)) != digest(encode(decode(Precision, option("fp16")), identity=True))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("fp16", {"loss_scale": None}, r"precision\.loss_scale: must be set.*loss_scale=65536"),
        ("bf16", {"loss_scale": 65536}, r"needs no loss scale; type precision\.loss_scale=null"),
        ("fp16", {"loss_scale": 1000}, "not a power of two"),
        ("fp16", {"loss_scale": 0}, "must be >= 1"),
        ("fp32", {"param_dtype": "bfloat16"}, r"type precision\.compute_dtype=bfloat16"),
        ("fp32", {"param_dtype": "float16"}, "did you mean 'bfloat16'"),
        ("fp32", {"compute_dtype": "fp16"}, "one of: bfloat16, float16, float32"),
    ],
)
def test_a_mixture_that_cannot_work_is_refused(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decode(Precision, option(name) | change, "precision")
