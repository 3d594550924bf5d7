"""calibrate on the machine at hand: rates that a machine can have, and plans for it are timed with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmforge.hardware.calibration import calibrated, read
from lmforge.predict.time import seconds
from lmforge.runtime.learned import correction
from tests.predict.machines import machine, planned

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One calibration by the command line, as a person types it."""
    folder = tmp_path_factory.mktemp("calibrate")
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lmforge", "calibrate", "--json", "output=outputs"]
    ran = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True, timeout=300)
    said: dict[str, Any] = json.loads(ran.stdout)
    return said | {"cwd": folder}


def test_it_writes_what_it_says(found: dict[str, Any]) -> None:
    kept = read(found["cwd"] / found["file"])
    assert kept.fingerprint == machine("here").fingerprint == Path(found["file"]).stem
    assert [file.name for file in (found["cwd"] / "outputs").iterdir()] == ["calibration"]
    assert {"float32", "bfloat16"} <= set(kept.matmul)
    assert 1e8 < kept.matmul["float32"] < 1e15
    assert 1e8 < kept.memory < 1e14
    assert 1e-8 < kept.launch < 1e-2
    assert kept.loader > 1e3
    assert kept.residual > 0


def test_plans_here_are_timed_with_it(found: dict[str, Any]) -> None:
    """A model eight times as large as the one it trained takes longer, and less than sixteen times as long."""
    known, warning = calibrated(machine("here"), found["cwd"] / "outputs")
    assert warning == ""
    words = ("stage=pretrain", "model=nano", "precision=fp32", "parallel=single", "model.hidden_size=128", "model.num_attention_heads=4")
    small, large = (seconds(planned(*words, f"model.num_hidden_layers={layers}")[0], known) for layers in (4, 32))
    assert small is not None
    assert large is not None
    assert small.measured
    assert 2 * small.total < large.total < 9 * small.total


def test_finished_runs_correct_it(cli: Callable[..., Any], rows: Path, tmp_path: Path, found: dict[str, Any]) -> None:
    """A step that took half as long again as the calibration says moves it by so much."""
    words = ("stage=pretrain", "data=text", f"data.path={rows}", "eval=none", "track=none", "model.max_position_embeddings=64")
    steps = ("stage.pretrain.budget.steps=6", "stage.pretrain.optimizer.global_batch_tokens=512")
    answer = cli("run", *words, *steps, f"output={tmp_path / 'runs'}")
    assert answer.code == 0, answer.err
    known, _ = calibrated(machine("here"), found["cwd"] / "outputs")
    assert correction(tmp_path / "runs", known)[1] == 1
    predicted = seconds(planned(*words, "hardware=here", *steps)[0], known)
    assert predicted is not None
    file = next((tmp_path / "runs" / "steps").glob("pretrain-*/step.json"))
    record = json.loads(file.read_text())
    record["measured"]["step_seconds"] = 1.5 * predicted.total
    file.write_text(json.dumps(record))
    assert correction(tmp_path / "runs", known) == (pytest.approx(1.5), 1)
    assert correction(tmp_path / "nothing", known) == (1.0, 0)


@pytest.mark.parametrize("word", ["--fast", "links=maybe", "output=", "hardware=h100x8"])
def test_what_it_does_not_know_is_refused(cli: Callable[..., Any], word: str) -> None:
    answer = cli("calibrate", word)
    assert answer.code == 2
    assert answer.err.strip() == f"conf error: {word}: is no word of calibrate; type: calibrate [output=FOLDER] [links=false] [--json]"
    assert answer.written == []


def test_an_output_that_cannot_be_written_is_refused_before_measuring(cli: Callable[..., Any], tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("x")
    answer = cli("calibrate", f"output={blocked}/sub")
    assert answer.code == 2
    assert "cannot write" in answer.err
    assert len(answer.err.strip().splitlines()) == 1
