"""The wheel works in an empty folder, and an installed plugin of a few lines adds an optimizer and a stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.conftest import SMALL

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = '''
import math
from lmforge.optimizer.nodes import Optimizer
from lmforge.registry import register
from lmforge.stage.nodes import Sft

@register("optimizer", "rprop")
class Rprop(Optimizer):
    """Resilient propagation (Riedmiller and Braun 1993)."""
    def build(self, named_parameters):
        import torch
        return [torch.optim.Rprop([parameter for _, parameter in named_parameters], lr=self.lr)]
    def state_bytes(self, shape, name, param_bytes):
        return 2 * param_bytes * math.prod(shape)

@register("stage", "polish")
class Polish(Sft):
    """SFT once more."""
'''
RPROP = "defaults: [{schedule: constant}, _self_]\ntype: rprop\nlr: 1e-3\nweight_decay: 0.0\ngrad_clip: null\nglobal_batch_tokens: null\n"
RPROP += "skip_sigma: null\nskip_window: 128\nmax_skips: 0\n"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our wheel and the plugin's, in a folder that comes before this checkout."""
    work = tmp_path_factory.mktemp("wheel")
    target, plugin = work / "site", work / "plugin"
    package = plugin / "lmforge_demo"
    (package / "conf/optimizer").mkdir(parents=True)
    (package / "conf/stage").mkdir()
    (package / "__init__.py").write_text(PLUGIN)
    (package / "conf/optimizer/rprop.yaml").write_text(RPROP)
    sft = (ROOT / "conf/stage/sft.yaml").read_text()
    (package / "conf/stage/polish.yaml").write_text(sft.replace("stage.sft", "stage.polish").replace("type: sft", "type: polish"))
    (plugin / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n[project]\nname = "lmforge-demo"\nversion = "1"\n'
        '[project.entry-points."lmforge.plugins"]\ndemo = "lmforge_demo"\n'
    )
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(target)]
    subprocess.run([*pip, str(ROOT), str(plugin)], check=True, capture_output=True)
    return target


def lmforge(*words: str, site: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lmforge", *words], cwd=cwd, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True, timeout=120
    )


def test_a_wheel_plans_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    where = subprocess.run(
        [sys.executable, "-c", "import lmforge; print(lmforge.__file__)"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert where.stdout.startswith(str(installed))
    done = lmforge("plan", "--json", cwd=tmp_path, site=installed)
    assert done.returncode == 0, done.stderr
    assert {step["name"] for step in json.loads(done.stdout)["steps"]} >= {"data", "pretrain", "sft", "dpo", "quantize"}
    assert "lr_nano" in lmforge("list", cwd=tmp_path, site=installed).stdout
    assert not list(tmp_path.iterdir())


def test_a_plugin_adds_an_optimizer_and_a_stage(installed: Path, corpus: Path, tmp_path: Path) -> None:
    steps = [f"stage.{name}.{key}" for name in ("pretrain", "polish") for key in ("budget.steps=2", "optimizer.global_batch_tokens=1024")]
    words = ("stage=[pretrain,polish]", "optimizer=rprop", *SMALL, *steps, "data=text", f"data.path={corpus}", "eval=none", "track=none")
    planned = lmforge("plan", "--json", *words, cwd=tmp_path, site=installed)
    assert planned.returncode == 0, planned.stderr
    by_name = {step["name"]: step for step in json.loads(planned.stdout)["steps"]}
    assert by_name["pretrain"]["spec"]["optimizer"]["type"] == "rprop"
    assert {one["kind"] for one in by_name["polish"]["inputs"]} == {"checkpoint", "tokens:chat"}
    done = lmforge(*words, cwd=tmp_path, site=installed)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("outputs/steps/polish-*/checkpoint/model.safetensors"))
    assert "Resilient" in lmforge("list", "optimizer=rprop", cwd=tmp_path, site=installed).stdout
