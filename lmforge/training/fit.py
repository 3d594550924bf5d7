"""`fit`: a recipe, an objective and a model become trained weights."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from lmforge.errors import LmforgeError, RunError
from lmforge.model.weights import splits
from lmforge.parallel.layout import ONE, Ranks, Spread, data_degree
from lmforge.step import Context
from lmforge.training import state
from lmforge.training.lowering import lower
from lmforge.training.module import TrainingModule
from lmforge.training.objective import Objective
from lmforge.training.order import StepData
from lmforge.training.recipe import Recipe
from lmforge.training.shares import InShares


def fit(
    recipe: Recipe,
    objective: Objective,
    model: Any,
    context: Context,
    save: Callable[..., None],
    tokenizer: Path | None = None,
    shares: InShares | None = None,
) -> dict[str, Any]:
    """Train `model` (a transformers model) in place, from the state in `context.folder / "state"` where there is one.

    Calls `save(model)` once on rank 0 when all steps are done, and returns the last interval's metrics with `steps`, `tokens`, `train_s`, `measured`.
    Raises KeyboardInterrupt after Ctrl-C or SIGTERM, its state written; one that comes in the last step, or after it, lets the weights be saved and says
    no more, for then all is done (the state is written first, should the time not be enough for that). RunError where the loss is not finite or the state
    cannot be written; CheckpointError where the state cannot be read. The state is left there: it is for the caller to remove, when its step is done. With the
    model's `tokenizer` folder a state can be exported before that.
    A `model` without memory comes with its `shares`; then `save(bones, read)` is called, on all ranks, with that model and a way to read its weights by name.
    """
    world = context.placement.devices
    mesh = context.placement.mesh or ONE
    _refuse(recipe, world, data_degree(mesh))
    folder = context.folder / "state"
    index = state.read_index(folder)
    lower(model, recipe)
    steps = range(index["step"] if index else 0, recipe.steps)
    ranks = Ranks(int(os.environ["RANK"]) if world > 1 else 0, mesh)
    data = StepData(
        objective,
        objective.dataset("train"),
        rows_per_step=recipe.rows_per_step,
        micro_batch_size=context.placement.micro_batch_size or recipe.rows_per_step,
        seed=recipe.seed,
        rank=ranks.data_rank,
        world=ranks.data_degree,
    )
    module = TrainingModule(recipe, objective, model, context.report, folder, tokenizer, data.taken, shares)
    loader = DataLoader(data, batch_size=None, sampler=steps, num_workers=recipe.parallel.data_workers, pin_memory=torch.cuda.is_available())
    try:
        with _quiet():
            _run(_trainer(recipe, context, mesh, model), module, loader)
        if module.done < recipe.steps:
            if module.stopped:
                raise KeyboardInterrupt
            raise RuntimeError(f"Lightning ended after step {module.done} of {recipe.steps}")
        measured = module.gauge.result()  # before the weights are gathered, which no step does
        if shares is not None:
            save(module.engine.skeleton, functools.partial(module.engine.some, module.model))
        elif (trained := module.engine.whole(module.model)) is not None:
            save(trained)
        if dist.is_initialized():
            dist.barrier()  # nobody reads what `save` writes before it is there
    finally:
        module.signals.restore()
    return {**module.last, "steps": recipe.steps, "tokens": module.tokens, "train_s": module.elapsed_s, "measured": measured}


def _refuse(recipe: Recipe, world: int, shares: int) -> None:
    if recipe.rows_per_step % shares:
        raise RunError("optimizer.global_batch_tokens", f"{recipe.rows_per_step} rows a step do not divide over {shares} devices", "a multiple of both")
    if world > 1 and int(os.environ.get("WORLD_SIZE", "1")) != world:
        raise RunError("parallel", f"{world} devices need {world} processes", f"start with torchrun --nproc-per-node {world}")


def _trainer(recipe: Recipe, context: Context, mesh: Mapping[str, int], model: Any) -> Trainer:
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    rows = recipe.rows_per_step // data_degree(mesh)
    micro = context.placement.micro_batch_size or rows
    spread = Spread(
        accelerator=accelerator,
        mesh=mesh,
        compute_dtype=recipe.compute_dtype,
        reduce_dtype=recipe.reduce_dtype,
        gradient_clipping=recipe.optimizer.grad_clip,
        micro_batch_size=micro,
        accumulation=-(-rows // micro),
        splits=_splits(model, mesh),
    )
    strategy: Any = recipe.parallel.engine(spread)
    # barebones: no logger, bar, checkpoint, summary or validation of Lightning's
    shared: dict[str, Any] = {"accelerator": accelerator, "strategy": strategy, "barebones": True, "use_distributed_sampler": False, "max_epochs": 1}
    if context.placement.devices == 1:
        return Trainer(devices=1, plugins=[LightningEnvironment()], default_root_dir=context.folder, **shared)
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    return Trainer(devices=local, num_nodes=context.placement.devices // local, default_root_dir=context.folder, **shared)


def _splits(model: Any, mesh: Mapping[str, int]) -> Mapping[str, str]:
    """How tensor parallel splits the model's matrices, where it does."""
    return splits(model.config.to_dict()) if mesh["tp"] > 1 else {}


def _run(trainer: Trainer, module: TrainingModule, loader: DataLoader[Any]) -> None:
    """Fit; Lightning's ways of ending a process on a signal become KeyboardInterrupt."""
    try:
        trainer.fit(module, train_dataloaders=loader)
    except BaseException as error:
        with contextlib.suppress(LmforgeError):  # of a state that was being written: the first error is the one to tell
            module.saver.close()
        if isinstance(error, (SystemExit, SIGTERMException)):
            raise KeyboardInterrupt from None
        raise
    module.saver.close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's notes on devices, modes and tips: a report is the one voice of a step."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
