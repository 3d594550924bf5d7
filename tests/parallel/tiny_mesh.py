"""Tiny models trained under any layout, figures beside those of one rank: for test_meshes, benchmarks/parity.py, and as a script for their ranks.

    tiny_mesh.py FOLDER/CASES.json    under torchrun: every case in turn; a line of JSON a case

What a case leaves is in FOLDER / its name: `figures.jsonl` (a line a step), `final.safetensors`, and `state`, from which another case of the same name, under
any layout and on any number of ranks, goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "training"))  # for tiny_run

import numpy as np
import tiny_run
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from sent import Sent

import lmforge
from lmforge.adapter.nodes import Adapter
from lmforge.codec import decode
from lmforge.compose.catalog import Catalog
from lmforge.formats.tokens import Meta, SplitWriter, write_meta
from lmforge.model import opening
from lmforge.model.build import from_scratch
from lmforge.model.parts import Unread
from lmforge.parallel.layout import data_degree
from lmforge.parallel.nodes import Parallel
from lmforge.step import Context, Placement
from lmforge.training.fit import fit
from lmforge.training.objectives.causal_lm import CausalLM
from lmforge.training.shares import InShares
from lmforge.verbs.list import tree

STEPS, ROWS, SEQ_LEN = 50, 8, 16
TOLERANCE, LINE = 1e-5, '{"name": '
SIZES = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_hidden_layers": 4, "num_key_value_heads": 4},
    "olmo2": {"model_type": "olmo2", "num_hidden_layers": 2, "num_key_value_heads": 2, "initializer_range": 0.1},
    "qwen2": {"model_type": "qwen2", "num_hidden_layers": 2, "num_key_value_heads": 2},
    "qwen3": {"model_type": "qwen3", "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
}


@dataclass(frozen=True)
class Case:
    """A run, or a leg of one: from the state there is, if any, until step `stop` is logged or all steps are done."""

    name: str
    layout: str  # an option of `parallel`
    family: str = "llama"
    vocabulary: int = 64
    steps: int = STEPS
    stop: int = -1
    changes: Mapping[str, Any] = field(default_factory=dict)  # keys of the option
    precision: Mapping[str, str] = field(default_factory=dict)  # dtypes of the recipe
    counts: bool = False  # what is sent in a step goes to sent-RANK.json
    start: str = ""  # what several ranks open a part at a time: "scratch", "folder", or "lora" on what is in that; else `model`, whole

    @property
    def config(self) -> dict[str, Any]:
        return {**SIZES, **FAMILIES[self.family], "vocab_size": self.vocabulary}


@functools.cache
def catalog() -> Catalog:
    return Catalog.of()


def option(name: str, **changes: Any) -> Any:
    """An option of `parallel` as the front end reads it, defaults lists resolved, and some keys changed."""
    return decode(Parallel, tree(catalog(), "parallel", name) | changes, "parallel")


def model(family: str, vocabulary: int) -> Any:
    """About 35k parameters (Llama). Norms and biases are random, so that a rank that takes another's part is seen."""
    made = from_scratch({**SIZES, **FAMILIES[family], "vocab_size": vocabulary}, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return made


def opened(case: Case, folder: Path) -> Unread:
    """The model of a case that has a start, its weights not read yet. A folder of bfloat16 weights in several files is written by the first to ask."""
    if case.start == "scratch":
        return opening.from_scratch(case.config, 0)
    weights = folder / f"weights-{case.family}-{case.vocabulary}"
    if not weights.is_dir():
        model(case.family, case.vocabulary).bfloat16().save_pretrained(weights, max_shard_size="20KB")
        assert len(list(weights.glob("*.safetensors"))) > 1
    found = opening.from_folder(weights)
    assert found is not None
    return found.under(lambda base: lora().attach(base, 5)) if case.start == "lora" else found


@functools.cache
def lora() -> Any:
    return decode(Adapter, tree(catalog(), "adapter", "lora") | {"r": 4, "dropout": 0.0}, "adapter")


def tokens(folder: Path, vocabulary: int) -> Path:
    """Chats over the whole vocabulary, of uneven prompts: no two rows have as many supervised tokens, so that a mean of ranks' means would be wrong."""
    if (folder / "meta.json").is_file():
        return folder
    rng, counts = np.random.default_rng(0), dict[str, int]()
    for split in ("train", "heldout"):
        ids = [rng.integers(1, vocabulary, size=size).tolist() for size in rng.integers(3, SEQ_LEN + 1, size=160)]
        with SplitWriter(folder, split, vocabulary) as writer:
            writer.extend(ids, [[int(at >= len(one) // 3) for at in range(len(one))] for one in ids])
        counts[split] = writer.tokens
    meta = Meta(
        view="chat", seq_len=SEQ_LEN, vocab_size=vocabulary, read={}, rows={}, tokens=counts, supervised={}, bytes={}, truncated=0, dropped={},
        eos_token_id=0, stop_token_ids=[0],
    )  # fmt: skip
    write_meta(folder, meta)
    return folder


def run(case: Case, folder: Path) -> dict[str, Any]:
    """Train on this process's rank; returns what its line says. Ranks end it together."""
    world, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
    node, home = option(case.layout, **case.changes), folder / case.name
    mesh = node.mesh(world)
    home.mkdir(parents=True, exist_ok=True)
    read = tokens(folder / f"tokens-{case.vocabulary}-{world}-{rank}", case.vocabulary)
    share = ROWS // data_degree(mesh)
    micro = max(1, share // (2 * mesh["pp"]))  # accumulation where there are the rows for it, and a pipeline that is full for a while
    report = tiny_run.Lines(case.stop, lambda: os.kill(os.getpid(), signal.SIGTERM))
    placement = Placement(devices=world, mesh=mesh, micro_batch_size=micro, accumulation=share // micro)
    context = Context(step="pretrain", folder=home, out=home / "checkpoint", inputs={}, placement=placement, report=report)
    # A large eps: where a gradient is but rounding, Adam would blow it up to a step.
    optimizer = tiny_run.adamw(lr=3e-3, eps=1e-5, grad_clip=1.1)
    told = tiny_run.recipe(parallel=node, steps=case.steps, log_every=1, optimizer=optimizer, **case.precision)
    started, interrupted = time.monotonic(), False
    unread, sent = opened(case, folder) if case.start else None, Sent()
    watching = contextlib.ExitStack()
    if case.counts:
        watching.enter_context(sent.of_steps())
    try:
        if unread is None or world == 1:
            fit(told, CausalLM(read, SEQ_LEN), unread.read() if unread else model(case.family, case.vocabulary), context, functools.partial(_save, home))
        else:
            shares = InShares(unread.parts, lambda model, device: 0.0)
            fit(told, CausalLM(read, SEQ_LEN), unread.model, context, functools.partial(_save_in_turn, home), None, shares)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        watching.close()
    if case.counts:
        (home / f"sent-{rank}.json").write_text(json.dumps({kind: size / (case.steps - 1) for kind, size in sent.bytes.items()}))
    assert interrupted == (case.stop > 0), case
    if rank == 0:
        with (home / "figures.jsonl").open("a") as file:
            file.writelines(json.dumps({key: line[key] for key in ("step", "loss", "grad_norm", "tokens")}) + "\n" for line in report.logged)
    assert rank == 0 or not report.logged
    if dist.is_initialized():
        dist.barrier()  # nobody goes on from a state that another has not ended
    return {"name": case.name, "layout": case.layout, "ranks": world, "mesh": mesh, "seconds": time.monotonic() - started}


def _save(home: Path, trained: Any) -> None:
    save_file({name: value.detach().clone() for name, value in trained.named_parameters()}, home / "final.safetensors")


def _save_in_turn(home: Path, bones: Any, read: Any) -> None:
    assert not any(one.device.type == "cpu" for one in bones.parameters())
    if found := read([name for name, _ in bones.named_parameters()]):
        save_file(found, home / "final.safetensors")


@dataclass(frozen=True)
class Apart:
    """The largest absolute differences from one rank's run, over all steps and all weights."""

    loss: float
    grad_norm: float
    weights: float

    def worst(self) -> float:
        return max(dataclasses.astuple(self))


def figures(home: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (home / "figures.jsonl").read_text().splitlines()]


def apart(ours: Path, theirs: Path) -> Apart:
    """Two runs of the same model and steps. ValueError where they are not."""
    pairs = list(zip(figures(ours), figures(theirs), strict=True))
    for one, other in pairs:
        if (one["step"], one["tokens"]) != (other["step"], other["tokens"]):
            raise ValueError(f"{one} is not of the step of {other}")
    mine, whole = load_file(ours / "final.safetensors"), load_file(theirs / "final.safetensors")
    if {name: value.shape for name, value in mine.items()} != {name: value.shape for name, value in whole.items()}:
        raise ValueError(f"{ours} and {theirs} are other models")
    loss, norm = (max(abs(one[key] - other[key]) for one, other in pairs) for key in ("loss", "grad_norm"))
    return Apart(loss, norm, max(float((mine[name] - value).abs().max()) for name, value in whole.items()))


def launch(folder: Path, cases: list[Case], ranks: int, timeout: float = 700) -> list[dict[str, Any]]:
    """Run cases on so many ranks, all in one spawn; returns their lines. RuntimeError with what the ranks said where one fails."""
    given = folder / f"cases-{ranks}.json"
    given.write_text(json.dumps([dataclasses.asdict(case) for case in cases]))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), __file__, str(given)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(lmforge.__file__).parents[1])}
    done = subprocess.run(start, capture_output=True, text=True, timeout=timeout, env=environment)
    if done.returncode:
        raise RuntimeError(f"{ranks} ranks failed:\n{done.stdout[-1000:]}\n{done.stderr[-6000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(LINE)]


def main(given: Path) -> None:
    for case in json.loads(given.read_text()):
        done = run(Case(**case), given.parent)
        if os.environ["RANK"] == "0":
            print(json.dumps(done), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
