"""Two real ranks over gloo: the averaged gradient is that of the whole batch, in the dtype that was asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lmforge
from lmforge.codec import decode
from lmforge.compose.catalog import Catalog
from lmforge.parallel.layout import Spread
from lmforge.parallel.nodes import Parallel
from lmforge.verbs.list import tree


def first_gradients(folder: Path, reduce_dtype: str) -> None:
    """One manual step of a linear layer on this rank's half of the batch; rank 0 writes the gradient it ended up with."""
    import lightning
    import torch

    class Linear(lightning.LightningModule):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(4, 1, bias=False)

        def training_step(self, batch: torch.Tensor, index: int) -> None:
            self.manual_backward(self.layer(batch).pow(2).mean())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    node = decode(Parallel, tree(Catalog.of(), "parallel", "ddp") | {"devices": 2}, "parallel")
    spread = Spread("cpu", node.mesh(2), "float32", reduce_dtype, gradient_clipping=None, micro_batch_size=4, accumulation=1, splits={})
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    strategy: Any = node.engine(spread)
    trainer = lightning.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, limit_train_batches=1, **quiet)
    model = Linear()
    trainer.fit(model, torch.utils.data.DataLoader(batch(), batch_size=4, shuffle=False))
    if trainer.is_global_zero:
        (folder / f"{reduce_dtype}.json").write_text(json.dumps(model.layer.weight.grad.tolist()))


def batch() -> Any:
    import torch

    return torch.randn(8, 4, generator=torch.Generator().manual_seed(1))


def test_two_ranks_have_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(lmforge.__file__).parents[1])}
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 1, bias=False)
    layer(batch()).pow(2).mean().backward()
    whole = layer.weight.grad
    exact, coarse = (torch.tensor(json.loads((tmp_path / f"{dtype}.json").read_text())) for dtype in ("float32", "bfloat16"))
    torch.testing.assert_close(exact, whole, rtol=1e-6, atol=1e-7)
    assert torch.equal(coarse, coarse.bfloat16().float())  # it travelled in bfloat16
    torch.testing.assert_close(coarse, whole, rtol=2e-2, atol=2e-3)


if __name__ == "__main__":
    for dtype in ("float32", "bfloat16"):
        first_gradients(Path(sys.argv[1]), dtype)
