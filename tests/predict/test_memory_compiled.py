"""What a compiled layer keeps for backward, by the rule and by torch's own partitioner."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent))

from tiny_models import FAMILIES

from lmforge.model import build
from lmforge.predict.job import shape
from lmforge.predict.tensors.compiled import kept
from lmforge.predict.tensors.run import Run

ROWS, LENGTH = 2, 128


def partitioned(config: dict[str, Any], dtype: torch.dtype, autocast: bool) -> int:
    """Bytes that the layer's graph saves, without weights and rotary tables."""
    torch._dynamo.reset()
    model: Any = build.from_scratch(config, 0).to(dtype)
    layer = model.model.layers[0]
    layer.compile(backend="aot_eager_decomp_partition")
    x = torch.randn(ROWS, LENGTH, config["hidden_size"], dtype=dtype, requires_grad=True)
    trig = model.model.rotary_emb(x, torch.arange(LENGTH)[None].expand(ROWS, LENGTH))
    known = {one.untyped_storage()._cdata for one in (*layer.parameters(), *trig)}
    saved: dict[int, torch.Tensor] = {}

    def pack(one: torch.Tensor) -> torch.Tensor:
        if one.untyped_storage()._cdata not in known:
            saved[one.untyped_storage()._cdata] = one
        return one

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for _ in range(2):
            saved.clear()
            layer(x, attention_mask=None, position_embeddings=trig, past_key_values=None, use_cache=False)
    return sum(one.untyped_storage().nbytes() for one in saved.values())


@pytest.mark.parametrize(("family", "param", "compute"), [("llama", 4, 4), ("llama", 4, 2), ("llama", 2, 2), ("olmo2", 4, 4)])
def test_the_rule_is_the_partitioners(family: str, param: int, compute: int) -> None:
    found = partitioned(FAMILIES[family], torch.float32 if param == 4 else torch.bfloat16, param != compute)
    assert sum(kept(shape(FAMILIES[family]), Run(ROWS, LENGTH, param, compute)).values()) == found
