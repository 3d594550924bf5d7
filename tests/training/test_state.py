"""The state on disk holds what it was given, survives kills, full disks and damage, or says so. One process; `test_state_ranks` has more."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lmforge.errors import CheckpointError, RunError
from lmforge.training.state import Saver, check, open_state, storage
from lmforge.training.state.index import checksum, sweep

SHARD = "step-7/rank-00000.safetensors"


def tree(step: int) -> dict[str, Any]:
    return {"step": step, "weights": {"w": torch.full((20_000,), float(step))}, "scaler": {}}


def put(folder: Path, step: int, what: Any = None, background: bool = False) -> None:
    saver = Saver(folder, background=background)
    saver.save(step, tree(step) if what is None else what)
    saver.close()


def got(folder: Path) -> Any:
    saved = open_state(folder)
    assert saved is not None
    return saved.tree()


def bits(value: torch.Tensor) -> torch.Tensor:
    return value.detach().contiguous().view(-1).view(torch.uint8)


def same(a: Any, b: Any) -> bool:
    """Equal in every bit and type."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and bits(a).equal(bits(b))
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


KINDS = {
    "0-dim": torch.tensor(3.5),
    "0-dim fp64": torch.tensor(1 / 3, dtype=torch.float64),
    "0-dim bool": torch.tensor(True),
    "0-dim int64": torch.tensor(2**62 + 1),
    "empty": torch.empty(0),
    "empty in the middle": torch.empty(3, 0, 2, dtype=torch.int64),
    "bf16": torch.randn(7).bfloat16(),
    "fp16": torch.randn(3, 1).half(),
    "fp64": torch.randn(5, dtype=torch.float64),
    "int64": torch.tensor([-(2**63), 2**63 - 1]),
    "bool": torch.tensor([[True], [False]]),
    "uint8": torch.arange(256, dtype=torch.uint8),
    "transposed": torch.randn(4, 6).t(),
    "a view": torch.randn(100)[3:9],
    "with gradient": torch.nn.Parameter(torch.randn(2)),
    "a/slash and ~tilde": torch.randn(2),
    "not finite": torch.tensor([float("nan"), float("inf"), -0.0]),
}


@pytest.mark.parametrize("background", [False, True])
def test_every_kind_of_value_comes_back(tmp_path: Path, background: bool) -> None:
    plain = {"a": 1, "b": 0.1, "c": "é/~", "d": None, "e": True, "f": [1, (2.0, [])], "g": {}, "h": float("-inf"), "i": float("nan"), "j": -0.0, 7: {0: "x"}}
    given = {"tensors": {**KINDS, 3: [torch.ones(2), (torch.zeros(1), None)]}, "plain": plain}
    put(tmp_path, 1, given, background)
    assert same(got(tmp_path), {**given, "tensors": {**given["tensors"], "with gradient": KINDS["with gradient"].detach()}})


@pytest.mark.parametrize("value", [object(), {1, 2}, torch.zeros(2, dtype=torch.complex64), {None: 1}, {"1": torch.ones(1), 1: torch.ones(1)}])
def test_what_cannot_be_held_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TypeError, match="here"):
        put(tmp_path, 1, {"here": value})
    assert open_state(tmp_path) is None


def test_one_state_is_kept_and_nothing_is_a_pickle(tmp_path: Path) -> None:
    assert open_state(tmp_path / "state") is None
    saver = Saver(tmp_path / "state", background=True)
    for step in (1, 2, 2):  # a run that is stopped right after a save writes the same step again
        saver.save(step, tree(step))
    saver.close()
    assert same(got(tmp_path / "state"), tree(2))
    files = [path for path in (tmp_path / "state").rglob("*") if path.is_file()]
    assert sorted(path.name for path in files) == ["index.json", "rank-00000.safetensors"]
    for path in files:
        data = path.read_bytes()
        assert data[:2] != b"PK", "a zip, as torch.save writes it"
        assert not (data[:1] == b"\x80" and data[1] <= 5), "a pickle"
        json.loads(data if path.suffix == ".json" else data[8 : 8 + int.from_bytes(data[:8], "little")])


def test_any_safetensors_reader_opens_a_shard(tmp_path: Path) -> None:
    put(tmp_path, 7, {name: value for name, value in KINDS.items() if value.dim()})
    read = load_file(tmp_path / SHARD)
    assert same(read["bf16"], KINDS["bf16"])
    assert same(read["transposed"], KINDS["transposed"])
    assert same(read["int64"], KINDS["int64"])


def test_only_what_is_wanted_and_in_place(tmp_path: Path) -> None:
    given = {"weights": {"a": torch.randn(3, 4), "b": torch.tensor(2.0)}, "optimizer": [{"m": torch.randn(2)}, torch.ones(1)], "step": 5}
    put(tmp_path, 5, given)
    saved = open_state(tmp_path)
    assert saved is not None
    assert saved.step == 5
    assert {path: (held.shape, held.dtype) for path, held in saved.keys().items()} == {
        ("weights", "a"): ((3, 4), torch.float32), ("weights", "b"): ((), torch.float32), ("optimizer", 0, "m"): ((2,), torch.float32),
        ("optimizer", 1): ((1,), torch.float32),
    }  # fmt: skip
    target, scalar = torch.nn.Parameter(torch.zeros(4, 3).t()), torch.zeros(())
    read = saved.tree(into={("weights", "a"): target, ("weights", "b"): scalar}, only=[("weights",)])
    assert read["weights"]["a"] is target
    assert torch.equal(target, given["weights"]["a"])
    assert scalar == 2
    assert {**read, "weights": None} == {"weights": None, "optimizer": [{}, None], "step": 5}


def test_another_model_is_refused(tmp_path: Path) -> None:
    put(tmp_path, 7)
    saved = open_state(tmp_path)
    assert saved is not None
    for into, says in (
        ({("weights", "w"): torch.zeros(3, 3)}, r"another model: weights.w is \(20000,\), not \(3, 3\)"),
        ({("weights", "v"): torch.zeros(3)}, r"another model: weights.v is None, not \(3,\)"),
        ({("weights", "w"): torch.zeros(20_000).half()}, r"weights.w is torch.float32, not torch.float16"),
    ):
        with pytest.raises(CheckpointError, match=says):
            saved.tree(into)
    with pytest.raises(CheckpointError, match=r"optimizer.m is not in it"):
        saved.tree(only=[("weights",), ("optimizer", "m")])


def test_a_background_save_keeps_the_moment(tmp_path: Path) -> None:
    model = torch.nn.Linear(300, 700)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    saver = Saver(tmp_path, background=True)
    for step in (1, 2):  # the second in the copies of the first
        saver.save(step, {"weights": model.state_dict()})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        saver.wait()
        assert same(got(tmp_path)["weights"], {name: value + (step - 1) for name, value in before.items()})
    saver.close()


def test_a_kill_at_any_moment_leaves_a_readable_state(tmp_path: Path) -> None:
    put(tmp_path, 1)
    generator, seen = random.Random(0), set()
    for turn in range(20):
        if (child := os.fork()) == 0:
            saver, step = Saver(tmp_path, background=turn % 2 == 1), 1
            while True:
                saver.save(step := step + 1, tree(step))
        before, deadline = (tmp_path / "index.json").stat().st_ino, time.monotonic() + 20
        while (tmp_path / "index.json").stat().st_ino == before and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(generator.uniform(0.0, 0.04))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        loaded = got(tmp_path)
        assert same(loaded, tree(loaded["step"]))
        seen.add(loaded["step"])
    assert seen - {1}  # the children did get somewhere
    put(tmp_path, 999)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", "step-999"]  # nothing half-written stays


@pytest.mark.parametrize("name", ["index.json", SHARD])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_damage_is_named(tmp_path: Path, name: str, damage: str) -> None:
    put(tmp_path, 7)
    path = tmp_path / name
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
        if name == "index.json":
            assert open_state(tmp_path) is None  # no index: there never was a state
            return
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes({"flip": bytes(data), "cut": bytes(data[:-10]), "empty": b""}[damage])
    with pytest.raises(CheckpointError) as caught:
        open_state(tmp_path)
    assert name in str(caught.value)
    assert f"remove the folder {tmp_path} to start" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_bit_of_the_index_counts(tmp_path: Path) -> None:
    put(tmp_path, 7, {"w": torch.ones(2)})
    good = (tmp_path / "index.json").read_bytes()
    for position in range(len(good)):
        data = bytearray(good)
        data[position] ^= 4
        (tmp_path / "index.json").write_bytes(bytes(data))
        try:
            assert json.loads(bytes(data)) == json.loads(good) or open_state(tmp_path) is None
        except (CheckpointError, ValueError):
            continue


@pytest.mark.parametrize("change", [{"folder": "../step-7"}, {"folder": ".."}, {"files": {"../x": {"bytes": 0, "sha256": ""}}}, {"form": 1}])
def test_an_index_of_another_kind(tmp_path: Path, change: dict[str, Any]) -> None:
    put(tmp_path, 7)
    index = json.loads((tmp_path / "index.json").read_text()) | change
    (tmp_path / "index.json").write_text(json.dumps(index | {"check": checksum(index)}))
    with pytest.raises(CheckpointError, match=r"index.json"):
        open_state(tmp_path)


def test_a_file_too_many(tmp_path: Path) -> None:
    """torch's reader takes every file of the folder, so one that nobody has hashed must not be there."""
    put(tmp_path, 7)
    shutil.copyfile(tmp_path / SHARD, tmp_path / "step-7" / "rank-00009.safetensors")
    with pytest.raises(CheckpointError, match=r"rank-00009.safetensors: is not a part of this state"):
        open_state(tmp_path)


def test_each_rank_checks_its_share_before_weights_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(tmp_path, 1)  # no state
    put(tmp_path, 7)
    check(tmp_path, 1)
    (tmp_path / SHARD).write_bytes((tmp_path / SHARD).read_bytes()[:-1] + b"?")
    monkeypatch.setenv("RANK", "1")
    check(tmp_path, 2)  # the other rank's file
    with pytest.raises(CheckpointError, match="is damaged: its SHA-256"):
        check(tmp_path, 1)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(CheckpointError, match="is damaged: its SHA-256"):
        check(tmp_path, 2)
    assert open_state(tmp_path) is not None  # hashed once, by the first of these checks


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_keeps_the_last_state(tmp_path: Path, background: bool) -> None:
    put(tmp_path, 1)
    saver = Saver(tmp_path, background=background)

    def fill(act: Callable[[], None]) -> str:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))  # a real write error in the middle of the file
        try:
            with pytest.raises(RunError, match=r"cannot write the training state: .*the last good state is kept") as caught:
                act()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        return str(caught.value)

    def save() -> None:
        saver.save(2, tree(2))
        saver.wait()

    assert "\n" not in fill(save)
    assert same(got(tmp_path), tree(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", "step-1"]
    saver.save(3, tree(3))  # there is room again
    saver.close()
    assert same(got(tmp_path), tree(3))


def test_a_failure_after_the_index_keeps_the_new_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old files cannot be removed: the state is the new one by then, and must not go with them."""
    put(tmp_path, 1)

    def stuck(folder: Path, keep: str) -> None:
        if keep == "step-2":
            raise OSError(39, "Directory not empty")
        sweep(folder, keep)

    monkeypatch.setattr(storage, "sweep", stuck)
    with pytest.raises(RunError, match="cannot write the training state: Directory not empty"):
        put(tmp_path, 2)
    assert same(got(tmp_path), tree(2))
    monkeypatch.undo()
    put(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", "step-3"]


@pytest.mark.parametrize("background", [False, True])
def test_a_folder_that_cannot_be_written(tmp_path: Path, background: bool) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write the training state: Not a directory"):
        Saver(tmp_path / "file" / "state", background=background).save(1, tree(1))
