"""Each tracker writes for real, and its files are read back by the tool's own reader."""

from __future__ import annotations

import html
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lmforge.codec import decode, encode
from lmforge.errors import RunError
from lmforge.track import login
from lmforge.track.guard import Guard, Silent
from lmforge.track.nodes import ArtifactRef, RunInfo, Track

CONF = Path(__file__).parents[2] / "conf" / "track"
KEY = "0123456789abcdef" * 2 + "01234567"
COLUMNS = ["prompt", "answer", "reward", "done"]
ROWS = [["def f(x):", "    return x | 1\n", 0.5, True], ["def <g>():", "", float("nan"), None]]


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_ERROR_REPORTING", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    login.reachable.cache_clear()


def make(name: str, **change: Any) -> Track:
    return decode(Track, yaml.safe_load((CONF / f"{name}.yaml").read_text()) | change, "track")


def info(folder: Path, **change: Any) -> RunInfo:
    folder.mkdir(parents=True, exist_ok=True)
    given = {"id": "dpo-0123abcd", "name": "dpo", "experiment": "quickstart", "stage": "dpo", "config": {"stage": {"beta": 0.1}}, "folder": folder}
    return RunInfo(**(given | change))


def checkpoint(folder: Path, name: str) -> ArtifactRef:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    return ArtifactRef(name, "checkpoint", folder)


def drive(track: Track, run: RunInfo, said: list[str]) -> None:
    tracker = track.open(run, said.append)
    tracker.log(10, {"loss": 2.5, "lr": 1e-3})
    tracker.log(20, {"loss": float("nan")})
    tracker.text("sample", "def f(x):\n    return x < 1")
    tracker.table("answers", COLUMNS, ROWS)
    tracker.log(30, {"loss": 1.5})
    tracker.table("answers", COLUMNS, ROWS[:1])
    tracker.artifact(checkpoint(run.folder / "made", "dpo-0123abcd"), [checkpoint(run.folder / "used", "sft-4567cdef")])
    tracker.finish({"preference_accuracy": 0.75})


def records(folder: Path) -> list[dict[str, Any]]:
    (log,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    printed = subprocess.run([sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)], capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in printed.splitlines()]


@pytest.mark.parametrize("name", ["none", "wandb", "tensorboard"])
def test_an_option_decodes(name: str) -> None:
    track = make(name)
    assert decode(Track, encode(track)) == track
    assert not track.identity


def test_an_offline_wandb_run_holds_everything(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    said: list[str] = []
    drive(make("wandb", entity="team"), info(tmp_path / "step"), said)
    assert said == []
    found = records(tmp_path / "step")
    run = next(record["run"] for record in found if record["type"] == "run")
    wanted = {"run_id": "dpo-0123abcd", "display_name": "dpo", "run_group": "quickstart", "job_type": "dpo", "project": "lmforge", "entity": "team"}
    assert {key: run[key] for key in wanted} == wanted
    assert run["config"]["update"]["stage"] == {"beta": 0.1}
    history = {record["history"]["item"]["_step"]: record["history"]["item"] for record in found if record["type"] == "history"}
    assert (history[10]["loss"], history[10]["lr"], history[20]["loss"]) == (2.5, 1e-3, "NaN")
    assert history[20]["sample._type"] == "html-file"
    summary = {key: value for record in found if record["type"] == "summary" for key, value in record["summary"].get("update", {}).items()}
    assert summary["preference_accuracy"] == 0.75
    assert next(record["exit"] for record in found if record["type"] == "exit").get("exit_code", 0) == 0


def test_an_offline_wandb_run_holds_each_table_at_its_step(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    drive(make("wandb"), info(tmp_path / "step"), [])
    items = [record["history"]["item"] for record in records(tmp_path / "step") if record["type"] == "history"]
    tables = {item["_step"]: {name: item[f"answers.{name}"] for name in ("_type", "path", "nrows", "ncols")} for item in items if "answers._type" in item}
    assert {step: (one["_type"], one["nrows"], one["ncols"]) for step, one in tables.items()} == {20: ("table-file", 2, 4), 30: ("table-file", 1, 4)}
    (folder,) = (tmp_path / "step").glob("wandb/offline-run-*/files")
    first, second = (json.loads((folder / tables[step]["path"]).read_text()) for step in (20, 30))
    assert first == {"columns": COLUMNS, "data": [ROWS[0], ["def <g>():", "", "nan", None]]}
    assert second == {"columns": COLUMNS, "data": ROWS[:1]}


def test_wandb_lineage_is_an_input_and_an_output_by_reference(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    drive(make("wandb"), info(tmp_path / "step"), [])
    artifacts = [record["artifact"] for record in records(tmp_path / "step") if record["type"] == "artifact" and record["artifact"]["type"] != "run_table"]
    used, made = artifacts
    assert (used["name"], used.get("use_after_commit", False)) == ("sft-4567cdef", True)
    assert (made["name"], made.get("use_after_commit", False), made["type"]) == ("dpo-0123abcd", False, "checkpoint")
    assert json.loads(made["metadata"]) == {"inputs": ["sft-4567cdef"]}
    assert [entry["ref"] for entry in made["manifest"]["contents"]] == [(tmp_path / "step" / "made" / "model.safetensors").as_uri()]
    assert not list((tmp_path / "step").glob("wandb/**/*.safetensors"))


def test_nothing_of_the_user_or_the_machine_is_kept_but_the_hosts_name(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    drive(make("wandb"), info(tmp_path / "step"), [])
    names = {path.name for path in tmp_path.glob("step/wandb/**/*") if path.is_file()}
    assert not names & {"requirements.txt", "wandb-metadata.json", "output.log", "conda-environment.yaml"}
    kinds = {record["type"] for record in records(tmp_path / "step")}
    assert not kinds & {"environment", "stats", "output_raw"}


def test_wandb_dir_mode_and_system_metrics_are_read(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    from lmforge.track.wandb import _settings

    assert _settings(make("wandb")).x_disable_stats is True
    assert _settings(make("wandb", system_metrics=True)).x_disable_stats is False
    make("wandb", dir=str(tmp_path / "all"), project="other").open(info(tmp_path / "a")).finish({})
    assert next(record["run"]["project"] for record in records(tmp_path / "all") if record["type"] == "run") == "other"
    make("wandb", mode="disabled").open(info(tmp_path / "b")).finish({})
    assert [path.name for path in (tmp_path / "b").iterdir()] == []
    assert wandb.run is None  # no global run: several steps may be open at once


HANGING = """
import sys; from pathlib import Path; sys.path[:0] = [{tests!r}, {root!r}]
import lmforge.track.wandb as room
from test_trackers import drive, info, make
room.INIT_TIMEOUT_S = 1
said = []
drive(make("wandb"), info(Path({folder!r})), said)
print("\\n".join(said))
"""


def test_a_server_that_hangs_is_left_for_offline_with_one_line(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    here = Path(__file__).parent
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes the connection, never answers
        env = {**os.environ, "WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}", "WANDB_API_KEY": KEY}
        code = HANGING.format(tests=str(here), root=str(here.parents[1]), folder=str(tmp_path / "step"))
        # A process of its own, since wandb reads its environment once.
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env, check=True)
    assert done.stderr == ""
    assert re.fullmatch(r"track: W&B did not start online \(.*\)\n", done.stdout)
    assert KEY not in done.stdout
    assert "loss" in json.dumps(records(tmp_path / "step"))


def test_a_failure_is_said_once_and_never_raised(tmp_path: Path) -> None:
    class Broken(Silent):
        def log(self, step: int, metrics: Any) -> None:
            raise ConnectionError("the service\nis gone")

    said: list[str] = []
    tracker = Guard(Broken(), "W&B", said.append)
    for step in range(3):
        tracker.log(step, {"loss": 1.0})
    tracker.finish({})
    assert said == ["track: W&B stopped (ConnectionError: the service is gone); the run goes on, metrics.jsonl has everything"]


def test_tensorboard_files_are_read_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said: list[str] = []
    drive(make("tensorboard"), info(tmp_path / "step"), said)
    resumed = make("tensorboard").open(info(tmp_path / "step", resumed_from=15))
    resumed.log(20, {"loss": 2.0})
    resumed.finish({})
    assert said == []
    events = EventAccumulator(str(tmp_path / "step" / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(10, 2.5), (20, 2.0)]
    make("tensorboard", dir=str(tmp_path / "all"), flush_s=1).open(info(tmp_path / "b")).finish({})
    assert list((tmp_path / "all" / "quickstart" / "dpo").glob("events.out.*"))


def test_a_tensorboard_table_is_markdown_that_shows_the_text_as_it_is(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugin_util import markdown_to_safe_html

    drive(make("tensorboard"), info(tmp_path / "step"), [])
    events = EventAccumulator(str(tmp_path / "step" / "tensorboard")).Reload()
    shown = events.Tensors("answers/text_summary")
    assert [event.step for event in shown] == [20, 30]
    page = markdown_to_safe_html(shown[0].tensor_proto.string_val[0])
    cells = [html.unescape(re.sub(r"<br ?/?>", "\n", cell)).replace("\xa0", " ") for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", page, re.DOTALL)]
    assert [cell.strip() for cell in cells] == [str(cell).strip() for line in (COLUMNS, *ROWS) for cell in line]


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package or name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # what the import system does for a package that is not there
    with pytest.raises(RunError, match=rf"track={package}: the package {package} is not installed; type: pip install"):
        make(package).open(info(tmp_path))
