"""A training step through `fit` (Lightning, our module, clipping, schedule, logging) beside a bare loop of the same steps, in turn in one process."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from lmforge.compiler import compile
from lmforge.compose import App, experiment
from lmforge.formats.tokens import Meta, SplitWriter, write_meta
from lmforge.model import build
from lmforge.stage.nodes import Pretrain
from lmforge.stage.train import recipe
from lmforge.step import Context, Placement, Report
from lmforge.training.fit import fit
from lmforge.training.losses.tokens import IGNORE, token_cross_entropy
from lmforge.training.objectives.causal_lm import CausalLM
from lmforge.training.order import StepData

STEPS, ROWS, ROUNDS = 40, 4, 4


def tokens(folder: Path, vocab_size: int, seq_len: int) -> Path:
    """Random documents: what is in them costs the same as text."""
    rng = np.random.default_rng(0)
    empty: dict[str, int] = {}
    written: dict[str, int] = {}
    for split in ("train", "heldout"):
        with SplitWriter(folder, split, vocab_size) as writer:
            writer.extend([rng.integers(1, vocab_size, size=400).tolist() for _ in range(2 * STEPS * ROWS)], None)
        written[split] = writer.tokens
    write_meta(
        folder,
        Meta(
            view="text", seq_len=seq_len, vocab_size=vocab_size, read=empty, rows=empty, tokens=written, supervised=written, bytes=empty,
            truncated=0, dropped=empty, eos_token_id=0, stop_token_ids=[0],
        ),
    )  # fmt: skip
    return folder


def bare(stage: Pretrain, objective: CausalLM) -> float:
    """Seconds a step of the plainest loop."""
    model = build.from_scratch(stage.model.config(), 0)
    (optimizer,) = stage.optimizer.build(model.named_parameters())
    data = StepData(objective, objective.dataset("train"), rows_per_step=ROWS, micro_batch_size=ROWS, seed=0, rank=0, world=1)
    started = time.perf_counter()
    for step in range(STEPS):
        batch = data[step].micro_batches[0]
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=None, use_cache=False).logits
        (token_cross_entropy(logits, batch["labels"]).sum() / (batch["labels"] != IGNORE).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return (time.perf_counter() - started) / STEPS


class Clock(Report):
    """When each step was logged."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def log(self, step: int, metrics: object) -> None:
        self.times.append(time.perf_counter())


def ours(stage: Pretrain, objective: CausalLM) -> float:
    """Seconds a step of `fit`, logging every step."""
    clock = Clock()
    model = build.from_scratch(stage.model.config(), 0)
    with tempfile.TemporaryDirectory() as folder:
        placement = Placement(devices=1, mesh={}, micro_batch_size=ROWS, accumulation=1)
        context = Context(step="pretrain", folder=Path(folder), out=Path(folder), inputs={}, placement=placement, report=clock)
        fit(recipe(stage), objective, model, context, lambda trained: None)
    return (clock.times[-1] - clock.times[0]) / (len(clock.times) - 1)


def main() -> None:
    """Print both and the ratio of the fastest of each."""
    words = ["stage=pretrain", f"stage.pretrain.budget.steps={STEPS + 1}", f"stage.pretrain.optimizer.global_batch_tokens={ROWS * 256}"]
    plan = compile(experiment(App([*words, "stage.pretrain.log_every=1", "stage.pretrain.save_every_s=1e6", "eval=none"]).compose()))
    stage = plan.step("pretrain").spec
    assert isinstance(stage, Pretrain)
    with tempfile.TemporaryDirectory() as folder:
        objective = CausalLM(tokens(Path(folder), 2048, 256), 256)
        measured = [(bare(stage, objective), ours(stage, objective)) for _ in range(ROUNDS)]
    plain, through = (min(column) for column in zip(*measured, strict=True))
    print(json.dumps({"bare_ms": round(1e3 * plain, 2), "fit_ms": round(1e3 * through, 2), "ratio": round(through / plain, 3), "rounds": ROUNDS}))


if __name__ == "__main__":
    main()
