"""Real training steps, through the compiler and `fit`, with a clock: what a calibration's residual is taken from, and what predictions are held against."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lmforge.compiler import compile
from lmforge.compose import App, experiment
from lmforge.formats.tokens import Meta, SplitWriter, write_meta
from lmforge.predict.job import Job
from lmforge.stage.nodes import Pretrain
from lmforge.step import Context, Placement, Report

DOCUMENT = 400  # tokens


@dataclass(frozen=True)
class Model:
    """A Llama for a clock; a head's width is hidden / heads."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocab: int
    rows: int
    length: int

    def words(self, steps: int, precision: str) -> list[str]:
        """What is typed for `steps` steps of it."""
        sizes = {
            "vocab_size": self.vocab, "hidden_size": self.hidden, "intermediate_size": self.intermediate, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "max_position_embeddings": self.length, "tie_word_embeddings": "false",
        }  # fmt: skip
        stage = {"budget.steps": steps, "optimizer.global_batch_tokens": self.rows * self.length, "log_every": 1, "save_every_s": 1e6}
        return [
            "stage=pretrain", "eval=none", "model=nano", "hardware=here", "parallel=single", f"precision={precision}", f"parallel.micro_batch_size={self.rows}",
            *(f"model.{key}={value}" for key, value in sizes.items()), *(f"stage.pretrain.{key}={value}" for key, value in stage.items()),
        ]  # fmt: skip


class Clock(Report):
    """When each step was logged, by a clock."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.times: list[float] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.times.append(self.clock())


def job(model: Model, steps: int, precision: str) -> Job:
    """The stage as it is planned."""
    plan = compile(experiment(App(model.words(steps, precision)).compose()), until="place")
    step = plan.step("pretrain")
    assert isinstance(step.spec, Pretrain)
    return Job(plan.experiment.model.config(), step.spec, step.placement)


def run(job: Job, tokens: Path) -> list[float]:
    """Seconds of each step after the first two."""
    from lmforge.model import build
    from lmforge.runtime.measure import clock
    from lmforge.stage.train import recipe
    from lmforge.training.fit import fit
    from lmforge.training.objectives.causal_lm import CausalLM

    stage, watch = job.stage, Clock(clock)
    assert stage.seq_len is not None
    with tempfile.TemporaryDirectory(prefix="lmforge-calibrate-") as folder:
        placement = Placement(devices=1, mesh={}, micro_batch_size=job.rows, accumulation=1)
        context = Context(step="pretrain", folder=Path(folder), out=Path(folder), inputs={}, placement=placement, report=watch)
        fit(recipe(stage), CausalLM(tokens, stage.seq_len), build.from_scratch(job.config, 0), context, lambda trained: None)
    return [later - sooner for sooner, later in zip(watch.times[1:], watch.times[2:], strict=False)]


def write_tokens(folder: Path, vocab: int, length: int, count: int) -> Path:
    """Random documents of about `count` tokens: what is in them costs the same as text."""
    rng = np.random.default_rng(0)
    empty: dict[str, int] = {}
    written: dict[str, int] = {}
    for split in ("train", "heldout"):
        with SplitWriter(folder, split, vocab) as writer:
            writer.extend([rng.integers(1, vocab, size=DOCUMENT).tolist() for _ in range(count // DOCUMENT + 2)], None)
        written[split] = writer.tokens
    write_meta(
        folder,
        Meta(
            view="text", seq_len=length, vocab_size=vocab, read=empty, rows=empty, tokens=written, supervised=written, bytes=empty, truncated=0, dropped=empty,
            eos_token_id=0, stop_token_ids=[0],
        ),
    )  # fmt: skip
    return folder


def spread(seconds: Sequence[float]) -> float:
    """Noise of a measurement: (most - least) / median of its inner half."""
    ordered = sorted(seconds)
    quarter = len(ordered) // 4
    return (ordered[-1 - quarter] - ordered[quarter]) / ordered[len(ordered) // 2]
