"""Hydra for real: several axes, a launcher of Hydra's own, flags, and steps that points share."""

from __future__ import annotations

import json
from pathlib import Path

from tests.runtime.conftest import FEW, SMALL, Run

SWEEP = ("stage=pretrain", "stage.pretrain.budget.steps=2", "stage.pretrain.optimizer.global_batch_tokens=1024", *SMALL)


def test_four_points_share_one_data_step_and_compare_shows_them_all(corpus: Path, lmforge: Run, tmp_path: Path) -> None:
    axes = ("model.num_hidden_layers=1,2", "optimizer.lr=1e-3,3e-3")
    small = [word for word in SMALL if "num_hidden_layers" not in word]
    fixed = [word for word in SWEEP if word not in SMALL]
    lmforge("-m", *axes, *small, *fixed, *FEW, "data=text", f"data.path={corpus}", cwd=tmp_path)
    made = [folder.name.rpartition("-")[0] for folder in (tmp_path / "outputs/steps").iterdir() if (folder / "step.json").is_file()]
    assert {name: made.count(name) for name in set(made)} == {
        "data": 1,
        "tokenizer": 1,
        "tokens.chat": 1,
        "tokens.text": 1,
        "tokens.preference": 1,
        "pretrain": 4,
        "eval.pretrain": 4,
    }
    shown = json.loads(lmforge("compare", "--json", cwd=tmp_path).stdout)
    assert len(shown["runs"]) == 4
    assert sorted(shown["keys"]["pretrain.optimizer.lr"].values()) == [0.001, 0.001, 0.003, 0.003]
    assert len(list(tmp_path.glob("outputs/steps/pretrain-*/wandb/offline-run-*"))) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outputs"]  # no multirun/ of Hydra's


def test_joblib_runs_points_side_by_side_and_a_bad_point_does_not_end_the_others(corpus: Path, lmforge: Run, tmp_path: Path) -> None:
    words = (
        "-m",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        "optimizer.lr=1e-3,-1",
        *SWEEP,
        "data=text",
        f"data.path={corpus}",
        "eval=none",
        "track=none",
    )
    done = lmforge(*words, cwd=tmp_path, check=2)
    assert "optimizer.lr: -1 must be > 0" in done.stderr.replace("-1.0", "-1")
    assert "1 points of the sweep failed" in done.stderr
    assert len([folder for folder in (tmp_path / "outputs/steps").glob("pretrain-*") if (folder / "step.json").is_file()]) == 1


def test_two_ranks_end_where_one_does(corpus: Path, lmforge: Run, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    common = (*SWEEP, "data=text", f"data.path={corpus}", "eval=none", "track=none")
    for name, more in (("one", ()), ("two", ("parallel=ddp", "parallel.devices=2"))):
        lmforge(*common, *more, f"output={name}", cwd=tmp_path)
    files = [next((tmp_path / name).glob("steps/pretrain-*/checkpoint/model.safetensors")) for name in ("one", "two")]
    assert files[0].parent.parent.name == files[1].parent.parent.name  # where it runs is not what it is
    one, two = (load_file(file) for file in files)
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5


def test_hydra_flags(lmforge: Run, tmp_path: Path) -> None:
    assert "hidden_size: " in lmforge("--cfg", "job", "stage=pretrain", cwd=tmp_path).stdout
    assert "stage/pretrain" in lmforge("--info", "defaults", "stage=pretrain", cwd=tmp_path).stdout
    assert "complete " in lmforge("--shell-completion", "install=bash", cwd=tmp_path).stdout
    offered = lmforge("--shell-completion", "query=bash", cwd=tmp_path, COMP_LINE="lmforge plan stage=").stdout.split()
    assert {"stage=pretrain", "stage=sft", "stage=dpo"} <= set(offered)
    assert not list(tmp_path.iterdir())
