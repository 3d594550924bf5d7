"""One rank's failure ends all, in one line of its own; a crash goes on from the last state, as often as the config says."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch

from tests.runtime import trap
from tests.runtime.conftest import Run
from tests.runtime.test_interrupt import WORDS, final
from tests.runtime.test_ranks import ranks

STEPS = 12
TOOK_S = 90.0  # far under the half hour that gloo and NCCL would wait for a rank that is gone


@pytest.fixture
def trapped(corpus: Path, tmp_path: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """What to type and the environment of a run whose schedule does what traps.json in its folder says."""
    site = trap.install(tmp_path / "site")
    typed = (*WORDS, "data=text", f"data.path={corpus}", f"stage.pretrain.budget.steps={STEPS}", "stage.pretrain.save_every_s=0.001")
    return (*typed, "optimizer/schedule=trap"), {"PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="reads processes from /proc")
def test_a_rank_that_fails_is_the_line_a_user_sees(trapped: tuple[tuple[str, ...], dict[str, str]], lmforge: Run, tmp_path: Path) -> None:
    words, environment = trapped
    two = (*words, "parallel=ddp", "parallel.devices=2")
    folder = tmp_path / "outputs/steps"

    trap.lay(tmp_path, {"step": 2, "rank": 1, "how": "refuse"})
    refused = lmforge(*two, cwd=tmp_path, check=2, **environment)
    assert refused.stderr == "data error: rows.jsonl:7: is not a row (on rank 1); mend it\n"
    assert "restart" not in refused.stdout

    trap.lay(tmp_path, {"step": 4, "rank": 1, "how": "fail"}, {"step": 4, "rank": 0, "how": "hang"})
    started = time.monotonic()
    failed = lmforge(*two, "parallel.max_restarts=0", cwd=tmp_path, check=2, **environment)
    (log,) = folder.glob("pretrain-*/ranks/1.log")
    assert failed.stderr == f"run error: pretrain: rank 1: ValueError: a foreign error; its output is in {log.relative_to(tmp_path)}\n"
    assert "Traceback" in log.read_text()
    assert "and more of it" in log.read_text()
    assert time.monotonic() - started < TOOK_S
    assert ranks(tmp_path) == [], "a rank that hung was left"

    trap.lay(tmp_path, {"step": 5, "rank": 1, "how": "hang"})
    hung = lmforge(*two, "parallel.max_restarts=0", "parallel.timeout_s=15", cwd=tmp_path, check=2, **environment)
    assert hung.stderr == f"run error: pretrain: rank 1 did not answer rank 0 (parallel.timeout_s=15); its output is in {log.relative_to(tmp_path)}\n"
    assert ranks(tmp_path) == []

    trap.lay(tmp_path, {"step": 6, "rank": 1, "how": "die"}, {"step": 9, "rank": 0, "how": "fail"})
    again = lmforge(*two, cwd=tmp_path, **environment)
    said = [line for line in again.stdout.splitlines() if "restart" in line]
    assert [line.rpartition(", from step")[0] for line in said] == [
        "pretrain: rank 1 was killed (signal 9): usually out of memory; restart 1 of 3",
        "pretrain: rank 0: ValueError: a foreign error; restart 2 of 3",
    ]
    assert again.stderr == ""
    assert ranks(tmp_path) == []

    calm = tmp_path / "calm"
    calm.mkdir()
    trap.lay(calm)
    lmforge(*two, cwd=calm, **environment)
    undisturbed, restarted = final(calm), final(tmp_path)
    assert all(torch.equal(undisturbed[name], restarted[name]) for name in undisturbed)


def test_one_device_goes_on_after_a_crash_and_counts_down(trapped: tuple[tuple[str, ...], dict[str, str]], lmforge: Run, tmp_path: Path) -> None:
    words, environment = trapped
    trap.lay(tmp_path, *({"step": 5, "rank": 0, "how": "fail"} for _ in range(2)))
    done = lmforge(*words, "parallel.max_restarts=1", cwd=tmp_path, check=2, **environment)
    (said,) = [line for line in done.stdout.splitlines() if "restart" in line]
    assert said.startswith("pretrain: ValueError: a foreign error; restart 1 of 1, from step ")
    assert done.stderr.startswith("run error: pretrain: rank 0: ValueError: a foreign error; its output is in ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("devices", [1, 2])
def test_a_step_that_ends_well_though_it_was_to_stop_is_done(
    devices: int, trapped: tuple[tuple[str, ...], dict[str, str]], lmforge: Run, tmp_path: Path
) -> None:
    words, environment = trapped
    typed = (*words, f"parallel={'ddp parallel.devices=2' if devices == 2 else 'single'}", "quantize=int8")
    typed = tuple(part for word in typed for part in word.split())
    trap.lay(tmp_path, {"step": STEPS - 1, "rank": 0, "how": "stop"})
    stopped = lmforge(*typed, cwd=tmp_path, check=130, **environment)
    assert "type the same again to go on" in stopped.stderr
    assert "pretrain: loss" in stopped.stdout
    (folder,) = tmp_path.glob("outputs/steps/pretrain-*")
    assert json.loads((folder / "step.json").read_text())["metrics"]["steps"] == STEPS
    assert not list(tmp_path.glob("outputs/steps/quantize-*/step.json")), "a step began after the signal"
    again = lmforge(*typed, cwd=tmp_path, **environment)
    assert "pretrain: loss" not in again.stdout
    assert final(tmp_path)
