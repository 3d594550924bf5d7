"""Training stages with all lengths known, and what is predicted of them: for the tests here and benchmarks/memory.py."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from lmforge.adapter.nodes import Adapter
from lmforge.codec import decode
from lmforge.compose.catalog import Catalog
from lmforge.optimizer.nodes import Optimizer
from lmforge.parallel.layout import data_degree
from lmforge.parallel.nodes import Parallel
from lmforge.precision.nodes import Precision
from lmforge.predict.job import Job
from lmforge.predict.memory import HELD_OUT, Peak, peaks
from lmforge.registry import lookup
from lmforge.reward.nodes import Reward
from lmforge.stage.base import Budget, TrainingStage
from lmforge.stage.workload import Pass
from lmforge.step import Placement
from lmforge.verbs.list import tree

STEPS = 2


@dataclass(frozen=True)
class Cell:
    """A training stage with all lengths known. `changes` are keys of the options by name: {"parallel": {"tp": 2}}."""

    config: Mapping[str, Any]
    stage: str
    seq_len: int
    rows: int  # of a micro-batch
    adapter: str = "none"
    layout: str = "single"
    checkpointing: str = "none"
    devices: int = 1
    accumulation: int = 1
    documents: int = 1  # in a row
    prompt: int | None = None  # tokens of a pair's or of an answer's prompt; None: half
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    reduce_dtype: str = "float32"
    optimizer: str = "adamw"
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def prompted(self) -> int:
        return self.seq_len // 2 if self.prompt is None else self.prompt

    def said(self) -> str:
        """For a table."""
        shown = {"param_dtype": "float32", "compute_dtype": "float32", "reduce_dtype": "float32", "config": self.config}
        defaults = {one.name: one.default for one in dataclasses.fields(self)} | shown
        changed = {name: value for name, value in vars(self).items() if value != defaults[name] and value != {}}
        model = f"{self.config['model_type']} {self.config.get('hidden_size') or self.config.get('n_embd')}"
        return f"{model} {' '.join(str(value) if name in ('stage', 'adapter', 'layout') else f'{name}={value}' for name, value in changed.items())}"


@functools.cache
def catalog() -> Catalog:
    return Catalog.of()


def option(kind: Any, group: str, name: str, changes: Mapping[str, Any]) -> Any:
    """An option of a group as the front end reads it, some keys changed."""
    return decode(kind, tree(catalog(), group, name) | changes, group)


def stage_of(cell: Cell) -> TrainingStage:
    """The stage as a resolved plan has it."""
    cls, own = lookup("stage", cell.stage, "stage"), cell.changes.get("stage", {})
    change: Callable[[str], Mapping[str, Any]] = lambda group: cell.changes.get(group, {})  # noqa: E731
    names = {one.name for one in dataclasses.fields(cls)}
    keys = {name: value for name, value in {**tree(catalog(), "stage", cell.stage), **own}.items() if name in names}
    parts: dict[str, Any] = {
        "seed": 0, "init_from": None, "seq_len": cell.seq_len, "budget": Budget(tokens=None, steps=STEPS, flops=None, tokens_per_parameter=None), "data": None,
        "model": None, "log_every": STEPS, "save_every_s": 1e9,
        "optimizer": option(Optimizer, "optimizer", cell.optimizer, {"global_batch_tokens": None, **change("optimizer")}),
        "precision": option(
            Precision, "precision", "fp32", {"param_dtype": cell.param_dtype, "compute_dtype": cell.compute_dtype, "reduce_dtype": cell.reduce_dtype}
        ),
        "parallel": option(
            Parallel, "parallel", cell.layout, {"activation_checkpointing": cell.checkpointing, "data_workers": 0, **change("parallel")}
        ),
        "adapter": option(Adapter, "adapter", cell.adapter, change("adapter")),
    }  # fmt: skip
    if "reward" in names:
        parts["reward"] = option(Reward, "reward", "length", change("reward"))
        parts |= {"reward_from": None, "sample_every": None, "max_new_tokens": cell.seq_len - cell.prompted}
    made = {**keys, **{name: value for name, value in parts.items() if name in names}}
    return cls(**made)


def placement(cell: Cell) -> Placement:
    mesh = stage_of(cell).parallel.mesh(cell.devices)
    return Placement(devices=cell.devices, mesh=mesh, micro_batch_size=cell.rows, accumulation=cell.accumulation)


def job(cell: Cell) -> Job:
    """With the lengths that the cell's data have."""
    made = Job(cell.config, stage_of(cell), placement(cell))
    known = made.workload

    def told(one: Pass) -> Pass:
        return dataclasses.replace(one, packed=one.packed and cell.documents > 1, prompt=cell.prompted if one.pairs or cell.stage == "kto" else None)

    return dataclasses.replace(made, given=dataclasses.replace(known, passes=tuple(told(one) for one in known.passes)))


def predicted(cell: Cell, accelerator: str = "cpu") -> Peak:
    """Of a training step, without what comes after the last."""
    machine: Any = SimpleNamespace(accelerator=accelerator, name="here")
    return max((one for one in peaks(job(cell), machine) if one.moment != HELD_OUT), key=lambda one: one.total)


def steps(cell: Cell) -> int:
    """So many that the last one makes answers, where a stage does; on several ranks some more."""
    return getattr(stage_of(cell), "updates", STEPS - 1 if cell.devices == 1 else 5) + 1


def rows_per_step(cell: Cell) -> int:
    return cell.rows * cell.accumulation * data_degree(placement(cell).mesh)


def with_batch(stage: TrainingStage, cell: Cell) -> TrainingStage:
    """The stage with its global batch, as a resolved plan has it."""
    tokens = stage.row_tokens * rows_per_step(cell)
    return dataclasses.replace(stage, optimizer=dataclasses.replace(stage.optimizer, global_batch_tokens=tokens))
