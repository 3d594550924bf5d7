"""What a run refuses before it starts, and what a full disk leaves behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lmforge.compiler import compile
from lmforge.compose import App, experiment
from lmforge.errors import PlanError
from lmforge.runtime.runner import runnable
from tests.runtime.conftest import SMALL, Run


def planned(*words: str) -> object:
    return compile(experiment(App(list(words)).compose()))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("stage=pretrain", "eval=lm_eval"), 'eval.pretrain: eval=lm_eval: needs lm_eval, which is not installed; type: pip install "lmforge[lm-eval]"'),
        (
            ("stage=pretrain", "optimizer=adamw_8bit"),
            'pretrain: optimizer=adamw_8bit: needs bitsandbytes, which is not installed; type: pip install "lmforge[bnb]"',
        ),
        (
            ("stage=pretrain", "track=tensorboard"),
            'track: track=tensorboard: needs tensorboard, which is not installed; type: pip install "lmforge[tensorboard]"',
        ),
    ],
)
def test_a_missing_extra_is_named_before_anything_runs(words: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(*words)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PlanError) as refused:
        runnable(plan)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("stage=pretrain", "hardware=h100x8"), "is described, not this machine"),
    ],
)
def test_what_can_only_be_planned_says_so_in_one_line(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(PlanError) as refused:
        runnable(planned(*words))
    assert said in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="needs a small file system of its own")
def test_a_full_disk_is_one_line_and_what_was_done_is_kept(corpus: Path, lmforge: Run, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("may not mount a file system here")
    try:
        words = (*SMALL, "stage=pretrain", "stage.pretrain.budget.steps=2", "stage.pretrain.optimizer.global_batch_tokens=1024", "eval=none", "track=none")
        done = lmforge(*words, "data=text", f"data.path={corpus}", f"output={disk}", cwd=tmp_path, check=2)
        assert "No space left" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        finished = {file.parent.name.rpartition("-")[0] for file in disk.glob("steps/*/step.json")}
        assert "pretrain" not in finished
    finally:
        subprocess.run(["umount", str(disk)], check=True)
