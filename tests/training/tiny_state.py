"""What two ranks check of a state; run by test_state_ranks.

`one` in the folder is a state that one process wrote, `one.safetensors` what is in it. Left behind: `two`, written under FSDP2, with `two.safetensors`
(its whole tensors), and `last`, whose second save ended in a SIGKILL.
"""

from __future__ import annotations

import functools
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_run
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lmforge.errors import LmforgeError
from lmforge.training.state import Saver, open_state, tensors

COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROWS = ("self_attn.o_proj", "mlp.down_proj")


def model(seed: int) -> Any:
    """A Llama of an odd vocabulary, and a parameter of one row, which leaves a rank without any."""
    made = tiny_run.tiny_llama()
    made.single = nn.Parameter(torch.randn(1, 3))
    torch.manual_seed(seed)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def trained(made: Any) -> Any:
    """AdamW after a step of it."""
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    (made(input_ids=torch.arange(8).view(1, 8), labels=torch.arange(8).view(1, 8)).loss + made.single.sum()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def tree(made: Any, optimizer: Any, step: int = 1) -> dict[str, Any]:
    return {"weights": dict(made.named_parameters()), "optimizer": get_optimizer_state_dict(made, optimizer), "step": step, "sums": torch.tensor(0.1)}


def whole(given: Any) -> dict[str, Tensor]:
    """Every tensor of the tree, whole, by its path as text."""
    found = {"|".join(map(str, path)): value for path, value in tensors(given).items()}
    return {name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone() for name, value in found.items()}


def sharded(seed: int, kind: str) -> Any:
    made = model(seed)
    if kind == "fsdp":
        for layer in made.model.layers:
            fully_shard(layer)
        return fully_shard(made)
    plan = {f"*.{name}": ColwiseParallel() for name in COLUMNS} | {f"*.{name}": RowwiseParallel() for name in ROWS}
    parallelize_module(made.model.layers, init_device_mesh("cpu", (2,)), plan)
    assert [made.get_parameter(f"model.layers.1.self_attn.{name}.weight").placements[0].dim for name in ("q_proj", "o_proj")] == [0, 1]
    return made


def reads(folder: Path, expected: Path, kind: str) -> None:
    """A fresh model and optimizer of that layout take the state, and are what was saved."""
    made = sharded(5, kind)
    optimizer = torch.optim.AdamW(made.parameters(), lr=1.0)
    target = tree(made, optimizer)
    saved = open_state(folder)
    assert saved is not None
    read = saved.tree(into=tensors(target))
    set_optimizer_state_dict(made, optimizer, read["optimizer"])
    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert all(read["weights"][name] is value for name, value in made.named_parameters())
    equal(whole(tree(made, optimizer, read["step"]) | {"sums": read["sums"]}), load_file(expected))


def alike(folder: Path, kind: str) -> None:
    """A rank's weights in place, and what an optimizer keeps of each element laid out like them; the weights of all ranks must be all there are."""
    made = sharded(5, kind)
    weights = dict(made.named_parameters())
    saved = open_state(folder)
    assert saved is not None
    read = saved.like(weights)
    assert all(read["weights"][name] is value for name, value in weights.items())
    for name, kept in read["optimizer"].items():
        mine = kept.pop("step"), kept.pop("row"), kept.pop("momentum")
        assert mine[0] == 1.0
        assert type(mine[1]) is Tensor  # of another shape: whole
        assert (type(mine[2]) is DTensor) == isinstance(weights[name], DTensor)
        assert not mine[2].requires_grad
        assert getattr(mine[2], "placements", None) == getattr(weights[name], "placements", None)
        whole_weight = (whole({"": weights[name]})[""]).double()
        assert torch.equal(whole({"": mine[2]})[""], whole_weight * 2)
        assert mine[1].item() == whole_weight.sum().item()
    less = {name: value for name, value in weights.items() if name != "single"}
    said(lambda: saved.like(less), "was made by another model: weights.single is (1, 3), not None")
    more = weights | ({"more": torch.zeros(2)} if dist.get_rank() else {})
    said(lambda: saved.like(more), "was made by another model: weights.more is None, not (2,)")


def kept(folder: Path, made: Any) -> None:
    """A state in the form of the engines, with a moment in another dtype and one of another shape."""
    weights = dict(made.named_parameters())
    wholes = whole(weights)
    moments = {name: {"step": 1.0, "momentum": value.detach().double() * 2, "row": wholes[name].double().sum().view(1, 1)} for name, value in weights.items()}
    saver = Saver(folder, background=False)
    saver.save(1, {"weights": weights, "optimizer": moments})
    saver.close()


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) and value.dtype == theirs[name].dtype for name, value in ours.items())


def said(act: Callable[[], Any], part: str) -> str:
    """The one line that both ranks refuse with."""
    try:
        act()
    except LmforgeError as error:
        lines: list[str] = ["", ""]
        dist.all_gather_object(lines, str(error))
        assert lines[0] == lines[1]
        assert part in lines[0]
        assert "\n" not in lines[0]
        return lines[0]
    raise AssertionError(f"not refused: {part}")


def damaged(folder: Path, rank: int) -> None:
    """A shard that is gone, cut, changed, swapped with the other, or one too many."""
    names = [f"rank-0000{one}.safetensors" for one in range(2)]

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-1])

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    def swap(path: Path) -> None:
        other = path.with_name(names[1 - names.index(path.name)])
        path.rename(path.with_suffix(".x"))
        other.rename(path)
        path.with_suffix(".x").rename(other)

    ways: list[tuple[Callable[[Path], Any], str]] = [(Path.unlink, "No such file"), (cut, "bytes of"), (flip, "SHA-256"), (swap, "")]
    for way, says in ways:
        for name in names:
            copy = folder.with_name("damaged")
            if rank == 0:
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(folder, copy)
                way(copy / "step-1" / name)
            dist.barrier()
            line = said(functools.partial(open_state, copy), says)
            assert name in line or (way is swap and names[1 - names.index(name)] in line)
            dist.barrier()


def parts(folder: Path, rank: int) -> None:
    """Stages of a pipeline hold layers of their own, and replicas are written once."""
    same, mine = torch.arange(30_000.0), torch.full((5_000,), float(rank))
    saver = Saver(folder, background=False)
    saver.save(3, {"weights": {"all": same, f"layer.{rank}": mine}, "said": {rank: f"by {rank}", "both": rank}, "list": [1.0]})
    saver.close()
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) < 175_000
    saved = open_state(folder)
    assert saved is not None
    target = torch.empty(5_000)
    read = saved.tree(into={("weights", f"layer.{1 - rank}"): target}, only=[])  # what the other one had
    assert read["said"] == {0: "by 0", 1: "by 1", "both": 0}
    assert read["weights"].keys() == {f"layer.{1 - rank}"}
    assert torch.equal(target, torch.full((5_000,), 1.0 - rank))
    assert torch.equal(saved.tree()["weights"]["all"], same)
    part = saved.like({"all": torch.zeros(30_000), f"layer.{rank}": torch.zeros(5_000)})  # as a stage of the same pipeline asks
    assert part["weights"].keys() == {"all", f"layer.{rank}"}
    assert torch.equal(part["weights"][f"layer.{rank}"], mine)
    wrong = {("weights", "all"): torch.zeros(2)} if rank else {}
    said(lambda: saved.tree(into=wrong), "weights.all is (30000,), not (2,)")  # one rank's error is that of all


def full(folder: Path, rank: int, background: bool) -> None:
    """The disk of one rank is full."""
    saver = Saver(folder, background=background)

    def save(step: int) -> None:
        saver.save(step, {"w": torch.full((20_000,), float(step)), f"own.{rank}": torch.full((20_000,), float(step))})
        saver.wait()

    save(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000 if rank else soft, hard))
    try:
        said(lambda: save(2), "cannot write the training state: File too large; the last good state is kept")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    saved = open_state(folder)
    assert saved is not None
    assert saved.step == 1
    assert torch.equal(saved.tree()["own.1"], torch.full((20_000,), 1.0))
    assert sorted(path.name for path in folder.iterdir()) == ["index.json", "step-1"]
    save(3)
    saver.close()


def killed(folder: Path, rank: int) -> None:
    """One rank dies while both write."""
    saver = Saver(folder, background=True)
    for step in (1, 2):
        saver.save(step, {f"own.{rank}": torch.full((3_000_000,), float(step))})
        if step == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        saver.wait()


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    made = sharded(1, "fsdp")
    optimizer = trained(made)
    given = tree(made, optimizer)
    expected = whole(given)
    inline, background = Saver(folder / "inline", background=False), Saver(folder / "two", background=True)
    inline.save(1, given)
    background.save(1, given)
    with torch.no_grad():
        for value in tensors(given).values():
            value.add_(1)  # the copies are what is saved
    inline.close()
    background.close()
    if rank == 0:
        save_file(expected, folder / "two.safetensors")
        assert all(
            path.read_bytes() == (folder / "inline" / path.relative_to(folder / "two")).read_bytes() for path in (folder / "two").rglob("*") if path.is_file()
        )
    dist.barrier()
    for kind in ("fsdp", "tp"):
        for name in ("one", "two"):
            reads(folder / name, folder / f"{name}.safetensors", kind)
    kept(folder / "kept", made)
    for kind in ("fsdp", "tp"):
        alike(folder / "kept", kind)
    damaged(folder / "two", rank)
    parts(folder / "parts", rank)
    for background_too in (False, True):
        full(folder / f"full-{background_too}", rank, background_too)
    if rank == 0:
        (folder / "passed").touch()
    dist.barrier()
    killed(folder / "last", rank)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
