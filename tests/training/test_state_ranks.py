"""States across ranks and layouts: written on two under FSDP2 and read on one, on two and under tensor parallelism, and by one for two."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
import tiny_state
import torch
from safetensors.torch import load_file, save_file
from test_processes import ENVIRONMENT

from lmforge.training.state import Saver, open_state

SCRIPT = Path(tiny_run.__file__).with_name("tiny_state.py")


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process wrote, and two ranks after it; they end by a SIGKILL."""
    folder = tmp_path_factory.mktemp("states")
    made = tiny_state.model(2)
    given = tiny_state.tree(made, tiny_state.trained(made))
    saver = Saver(folder / "one", background=False)
    saver.save(1, given)
    saver.close()
    save_file(tiny_state.whole(given), folder / "one.safetensors")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(SCRIPT), str(folder)]
    done = subprocess.run(launch, timeout=500, env=ENVIRONMENT, capture_output=True, text=True)
    assert (folder / "passed").is_file(), done.stderr[-6000:]
    assert "SIGKILL" in done.stderr or "-9" in done.stderr
    return folder


def test_two_ranks_agree(left: Path) -> None:
    """All that tiny_state checks: FSDP2 and TP read what one and two ranks wrote; damage, a full disk and stages of a pipeline are met alike."""
    assert sorted(path.name for path in (left / "two" / "step-1").iterdir()) == ["rank-00000.safetensors", "rank-00001.safetensors"]


def test_one_process_reads_what_two_ranks_wrote(left: Path) -> None:
    saved = open_state(left / "two")
    assert saved is not None
    tiny_state.equal(tiny_state.whole(saved.tree()), load_file(left / "two.safetensors"))
    only = saved.tree(only=[("weights", "single")])
    assert only["weights"].keys() == {"single"}


def test_a_rank_that_dies_while_it_saves(left: Path) -> None:
    saved = open_state(left / "last")
    assert saved is not None
    read = saved.tree()
    assert all(torch.equal(read[f"own.{rank}"], torch.full((3_000_000,), float(saved.step))) for rank in range(2))
