"""Tensor bytes of real training steps: for the tests here, benchmarks/memory.py, and as a script for a mesh's ranks.

tracked_steps.py FOLDER/cells.json    under torchrun: every cell in turn; a line of JSON a cell in FOLDER/rank<N>.jsonl
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))

import numpy as np
import torch
from live_bytes import Live
from memory_cells import Cell, placement, predicted, rows_per_step, stage_of, steps, with_batch

import lmforge
from lmforge.formats.tokens import Meta, SplitWriter, write_meta
from lmforge.stage.base import TrainingStage
from lmforge.step import Context, Report

END = 0
VIEWS = {"pretrain": "text", "sft": "chat", "kto": "feedback", "ppo": "prompt", "grpo": "prompt"}  # else preference


def write(cell: Cell, folder: Path, examples: int) -> Context:
    """Artifacts that the stage takes, all examples of one length, and the context of its step."""
    view, vocabulary = VIEWS.get(cell.stage, "preference"), cell.config["vocab_size"]
    tokens, rng, each = folder / "tokens", np.random.default_rng(0), cell.seq_len // cell.documents
    meta = Meta(
        view=view, seq_len=cell.seq_len, vocab_size=vocabulary, read={}, rows={}, tokens={}, supervised={}, bytes={}, truncated=0, dropped={},
        eos_token_id=END, stop_token_ids=[END],
    )  # fmt: skip
    beside = {"feedback": ["labels"], "prompt": ["answers"]}.get(view, [])
    for split in ("train", "heldout"):
        rows, mask = _examples(cell, view, rng.integers(1, vocabulary, (examples, each)))
        with SplitWriter(tokens, split, vocabulary, beside) as writer:
            writer.extend(rows, None if view == "text" else [mask[: len(one)] for one in rows])
            for index in range(examples):
                if view == "feedback":
                    writer.label(index % 2 == 0)
                if view == "prompt":
                    writer.answer(None)
        meta["tokens"][split], meta["supervised"][split] = writer.tokens, writer.supervised
        for name in ("reference", "feedback_reference"):
            (folder / name).mkdir(exist_ok=True)
            for suffix in ("", "_kl"):
                np.save(folder / name / f"{split}{suffix}.npy", np.zeros(examples, np.float32))
    write_meta(tokens, meta)
    if view == "prompt":
        _tokenizer(tokens / "tokenizer", vocabulary)
    inputs = {
        f"tokens:{view}": tokens,
        "reference": folder / "reference",
        "feedback_reference": folder / "feedback_reference",
        "checkpoint": folder / "checkpoint",
    }
    return Context(step=cell.stage, folder=folder, out=folder / "out", inputs=inputs, placement=placement(cell), report=Report())


def _examples(cell: Cell, view: str, ids: Any) -> tuple[list[list[int]], list[int]]:
    """Rows of ids, and which of their tokens have labels."""
    length, prompt = ids.shape[1], cell.prompted
    if view == "preference":  # pairs share their prompt, and nothing after it
        ids[1::2, :prompt], ids[::2, prompt], ids[1::2, prompt] = ids[::2, :prompt], 1, 2
    if view == "prompt":  # of uneven lengths, which take a mask
        return [one[: prompt - index % 2] for index, one in enumerate(ids.tolist())], [0] * length
    return ids.tolist(), [int(view == "chat" or at >= prompt) for at in range(length)]


def _tokenizer(folder: Path, vocabulary: int) -> None:
    """A word a token; id 0 ends."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<|end|>": END, **{f"w{one}": one for one in range(1, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|end|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)


def made(cell: Cell, stage: TrainingStage, context: Context) -> tuple[Any, Any]:
    """The objective and the module that the stage trains, from fresh weights."""
    from lmforge.model import build

    adapter = getattr(stage, "adapter", None)

    def attached(model: Any) -> Any:
        return model if adapter is None or adapter.trains_all else adapter.attach(model, 0)

    model: Any = build.from_scratch(cell.config, 0)
    if cell.stage in ("ppo", "grpo"):
        return _practising(cell, stage, context, model, attached)
    if cell.stage == "reward":
        model = _scorer(model)
    return stage.objective(context), attached(model)


def _scorer(model: Any) -> Any:
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(model.config)
    config.num_labels = 1
    maker: Any = AutoModelForSequenceClassification
    return maker.from_config(config, dtype=torch.float32, attn_implementation=config._attn_implementation)


def _practising(cell: Cell, stage: Any, context: Context, model: Any, attached: Callable[[Any], Any]) -> tuple[Any, Any]:
    """As stage/rl.py puts them together, without folders of weights."""
    from lmforge.stage import rl
    from lmforge.stage.train import recipe
    from lmforge.training.rl.actor_critic import ActorCritic, Critic
    from lmforge.training.rl.grpo import Grpo
    from lmforge.training.rl.ppo import Ppo
    from lmforge.training.rl.practice import Practice
    from lmforge.training.rl.reference import adapter_off, frozen
    from lmforge.training.rl.rollouts import Rollouts, Sampling

    told = recipe(with_batch(stage, cell))
    start = frozen(copy.deepcopy(model).to(getattr(torch, cell.param_dtype))) if stage.adapter.trains_all else adapter_off(stage.adapter.off)
    scorer, sampling = stage.reward.open({}), Sampling(stage.max_new_tokens, stage.temperature)
    practice = Practice(rl._schedule(stage, told), Rollouts(context.inputs["tokens:prompt"], "train", scorer, sampling), None, context.report, None)
    critic = attached(_scorer(model)) if cell.stage == "ppo" else None
    policy = attached(model)
    if critic is not None:
        return Ppo(rl._ppo_options(stage), practice, start), ActorCritic(policy, Critic(critic, 0.0, 1.0))
    reference = start if stage.kl_coef or not stage.adapter.trains_all else None
    return Grpo(rl._grpo_options(stage), practice, reference), policy


def measured(cell: Cell, folder: Path) -> tuple[int, str]:
    """(peak of live tensor bytes in a step, the operation that it was at).

    Of the last step; on several ranks of the least of all but the first, for gloo lets go of what it sends when it pleases.
    """
    from lmforge.stage.train import recipe
    from lmforge.training.fit import fit
    from lmforge.training.module import TrainingModule

    folder.mkdir(parents=True, exist_ok=True)
    stage = with_batch(stage_of(cell), cell)
    context = write(cell, folder, examples=8 * max(2, rows_per_step(cell)) * (1 if cell.documents == 1 else cell.documents))
    live, real = Live(), TrainingModule.training_step
    found: list[tuple[int, str]] = []

    def watched(module: TrainingModule, batch: Any, index: int) -> None:
        live.peak = live.now
        real(module, batch, index)
        found.append((live.peak, live.made))

    TrainingModule.training_step = watched  # type: ignore[method-assign]
    try:
        with live, live.resizing():
            objective, model = made(cell, stage, context)
            fit(dataclasses.replace(recipe(stage), steps=steps(cell)), objective, model, context, lambda trained: None)
    finally:
        TrainingModule.training_step = real  # type: ignore[method-assign]
    return found[-1] if cell.devices == 1 or hasattr(stage, "updates") else min(found[1:])


def compared(cell: Cell, folder: Path) -> dict[str, Any]:
    """A line of a table."""
    bytes_, operation = measured(cell, folder)
    said = predicted(cell)
    return {
        "cell": cell.said(), "measured": bytes_, "predicted": said.tensors, "error": said.tensors / bytes_ - 1, "moment": said.moment, "operation": operation,
        "parts": {name: size for name, size in said.parts.items() if size},
    }  # fmt: skip


def on_ranks(cells: Sequence[Cell], folder: Path, ranks: int, timeout: float = 500) -> list[dict[str, Any]]:
    """A line for each cell: of the rank that held most."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cells.json").write_text(json.dumps([dataclasses.asdict(cell) for cell in cells]))
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", f"--nproc-per-node={ranks}"]
    command = [sys.executable, "-m", "torch.distributed.run", *rendezvous, __file__, str(folder / "cells.json")]
    # The ranks run this file's lmforge.
    home = str(Path(lmforge.__file__).parents[1])
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": home}, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for rank in range(ranks) for line in (folder / f"rank{rank}.jsonl").read_text().splitlines()]
    return [max((one for one in lines if one["number"] == number), key=lambda one: one["measured"]) for number in range(len(cells))]


if __name__ == "__main__":
    torch.set_num_threads(1)
    given, rank = Path(sys.argv[1]), os.environ["RANK"]
    with (given.parent / f"rank{rank}.jsonl").open("w") as file:
        for number, plain in enumerate(json.loads(given.read_text())):
            line = compared(Cell(**plain), given.parent / f"{number}-{rank}")
            file.write(json.dumps({"number": number, "rank": int(rank), **line}) + "\n")
            file.flush()
