"""The state on disk survives kills, full disks and damage, or says so."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import tiny_run
import torch

from lmforge.errors import CheckpointError, RunError
from lmforge.training import state


def payload(step: int) -> dict[str, object]:
    return {"step": step, "weights": {"w": torch.full((20_000,), float(step))}, "scaler": {}}


def test_round_trip_keeps_one_file(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    assert state.load(folder) is None
    for step in (1, 2):
        state.save(folder, step, payload(step))
    loaded = state.load(folder)
    assert loaded is not None
    assert loaded["step"] == 2
    assert torch.equal(loaded["weights"]["w"], torch.full((20_000,), 2.0))
    assert sorted(path.name for path in folder.iterdir()) == ["index.json", "step-2.pt"]


def test_a_kill_at_any_moment_leaves_a_readable_state(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    state.save(folder, 1, payload(1))
    generator, seen = random.Random(0), set()
    for _ in range(25):
        if (child := os.fork()) == 0:
            step = 1
            while True:
                state.save(folder, step := step + 1, payload(step))
        before, deadline = (folder / "index.json").stat().st_ino, time.monotonic() + 10
        while (folder / "index.json").stat().st_ino == before and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(generator.uniform(0.0, 0.04))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        loaded = state.load(folder)
        assert loaded is not None
        assert torch.equal(loaded["weights"]["w"], torch.full((20_000,), float(loaded["step"])))
        seen.add(loaded["step"])
    assert seen - {1}  # the children did get somewhere
    state.save(folder, 999, payload(999))
    assert sorted(path.name for path in folder.iterdir()) == ["index.json", "step-999.pt"]  # nothing half-written stays


@pytest.mark.parametrize("name", ["index.json", "step-7.pt"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_damage_is_named(tmp_path: Path, name: str, damage: str) -> None:
    folder = tmp_path / "state"
    state.save(folder, 7, payload(7))
    path = folder / name
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
        if name == "index.json":
            assert state.load(folder) is None  # no index: there never was a state
            return
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes({"flip": bytes(data), "cut": bytes(data[:-10]), "empty": b""}[damage])
    with pytest.raises(CheckpointError) as caught:
        state.load(folder)
    assert name in str(caught.value)
    assert "remove the folder" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_bit_of_the_index_counts(tmp_path: Path) -> None:
    state.save(tmp_path, 7, payload(7))
    good = (tmp_path / "index.json").read_bytes()
    for position in range(len(good)):
        data = bytearray(good)
        data[position] ^= 4
        (tmp_path / "index.json").write_bytes(bytes(data))
        try:
            assert json.loads(bytes(data)) == json.loads(good) or state.load(tmp_path) is None
        except (CheckpointError, ValueError):
            continue


def test_an_index_cannot_point_elsewhere(tmp_path: Path) -> None:
    state.save(tmp_path / "state", 7, payload(7))
    index = json.loads((tmp_path / "state" / "index.json").read_text()) | {"file": "../other.pt"}
    (tmp_path / "state" / "index.json").write_text(json.dumps(index | {"check": state._check(index)}))
    with pytest.raises(CheckpointError, match=r"index.json"):
        state.load(tmp_path / "state")


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/ran",)

    state.save(tmp_path / "state", 7, {"step": Evil()})
    with pytest.raises(CheckpointError, match=r"step-7.pt"):
        state.load(tmp_path / "state")
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_keeps_the_last_state(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    state.save(folder, 1, payload(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))  # a real write error in the middle of the file
    try:
        with pytest.raises(RunError, match=r"cannot write the training state: .*the last good state is kept") as caught:
            state.save(folder, 2, payload(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    loaded = state.load(folder)
    assert loaded is not None
    assert loaded["step"] == 1
    assert sorted(path.name for path in folder.iterdir()) == ["index.json", "step-1.pt"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write the training state: Not a directory"):
        state.save(tmp_path / "file" / "state", 1, payload(1))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    model = tiny_run.tiny_model()
    saved = {name: value.clone() for name, value in state.weights(model).items()}
    state.put_weights(model, saved, tmp_path)
    saved["transformer.wte.weight"] = torch.zeros(3, 3)
    with pytest.raises(CheckpointError, match=r"was made by another model: .*wte.weight is \(3, 3\), not \(61, 24\)"):
        state.put_weights(model, saved, tmp_path)


def test_frozen_weights_are_not_saved() -> None:
    model = tiny_run.tiny_model()
    model.transformer.wte.weight.requires_grad_(False)
    assert not {"transformer.wte.weight", "lm_head.weight"} & state.weights(model).keys()
    assert "transformer.h.0.attn.c_attn.weight" in state.weights(model)
