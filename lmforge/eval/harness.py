"""lm-evaluation-harness on a checkpoint folder: the real one, quiet, and with nothing from a config reaching an import."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lmforge.errors import ConfigError, RunError, did_you_mean
from lmforge.eval.measure import write_json
from lmforge.eval.taskfolder import problems
from lmforge.inference.checkpoint import open_model, open_tokenizer
from lmforge.step import Context

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from lmforge.eval.nodes import LmEval

OURS = Path(__file__).parent / "tasks"


def evaluate(node: LmEval, context: Context) -> dict[str, Any]:
    """Run the node's tasks; metrics are `task/metric`, with their standard errors and `task/n`, and out/results.json holds all the harness says.

    RunError where the extra is missing, a task is unknown, or its data cannot be had. Names are checked before the model is loaded.
    """
    with tempfile.TemporaryDirectory(dir=context.folder) as scratch, _quiet_harness(context.folder / "harness.log"):
        manager = _tasks(node, context, Path(scratch))
        results = _simple_evaluate(node, context, manager)
    write_json(context.out / "results.json", results)
    metrics = flatten(results)
    write_json(context.out / "metrics.json", metrics)
    return metrics


def check_names(node: LmEval) -> None:
    """RunError for a task that neither we, nor the user's folder, nor the harness has; its index is read only where it is needed."""
    known = {path.stem for path in OURS.glob("*.yaml")}
    if set(node.tasks) <= known:
        return
    from lm_eval.tasks import TaskManager

    with _quiet_harness(None):
        mine = TaskManager(include_path=node.include_path, include_defaults=False) if node.include_path else None
        if mine and set(node.tasks) <= known | set(mine.all_tasks):
            return
        manager = TaskManager(include_path=node.include_path)
    _check_names(tuple(name for name in node.tasks if name not in known), manager)


def _check_names(names: Sequence[str], manager: TaskManager) -> None:
    for name in names:  # an exact name in the index: the harness would also take a path, and import what that file names
        if name not in manager.task_index:
            raise RunError("eval.tasks", f"unknown task {name!r}", _nearest(name, manager))


def _tasks(node: LmEval, context: Context, scratch: Path) -> TaskManager:
    """The task index: our folder and the user's alone where they hold every task asked for (0.05 s), with the harness's own otherwise (9 s)."""
    from lm_eval.tasks import TaskManager

    ours = context.out / "tasks"
    offered = _write_tasks(context.inputs.get("corpus"), ours, scratch)
    folders = [str(ours)]
    if node.include_path is not None:
        if found := list(problems(Path(node.include_path), "eval.include_path")):  # again: the folder may have changed since the config was read
            raise ConfigError.of(found)
        folders.append(node.include_path)
    manager = TaskManager(include_path=folders, include_defaults=False)
    if set(node.tasks) <= set(manager.all_subtasks):
        return manager
    if absent := sorted({path.stem for path in OURS.glob("*.yaml")} & set(node.tasks) - set(offered)):
        here = f"leave it out; what is there suffices for: {', '.join(offered) or 'nothing'}"
        raise RunError("eval.tasks", f"{absent[0]} needs held-out data that this run's corpus does not offer", here)
    manager = TaskManager(include_path=folders)
    _check_names(node.tasks, manager)
    return manager


def _nearest(name: str, manager: TaskManager) -> str:
    """The nearest names; the whole list has thousands."""
    hint = did_you_mean(name, manager.all_tasks)
    return hint if hint.startswith("did you mean") else "`lm-eval ls tasks` lists the installed ones; ours are heldout_code and heldout_pairs"


def _write_tasks(corpus: Path | None, into: Path, scratch: Path) -> list[str]:
    """Copies of our task files with the corpus's paths in them, for the views that the corpus offers; their names."""
    into.mkdir(parents=True, exist_ok=True)
    offered = []
    for path in sorted(OURS.glob("*.yaml")) if corpus is not None else ():
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
        files = {split: (corpus / name).resolve() for split, name in task["dataset_kwargs"]["data_files"].items()}
        if all(file.is_file() and file.stat().st_size for file in files.values()):
            task["dataset_kwargs"] = {"data_files": {split: str(file) for split, file in files.items()}, "cache_dir": str(scratch)}
            (into / path.name).write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
            offered.append(task["task"])
    return offered


def _simple_evaluate(node: LmEval, context: Context, manager: TaskManager) -> dict[str, Any]:
    import lm_eval
    from jinja2 import TemplateError

    checkpoint = context.inputs["checkpoint"]
    tokenizer = open_tokenizer(checkpoint)
    if node.apply_chat_template and not tokenizer.chat_template:
        raise RunError("eval.apply_chat_template", "the checkpoint has no chat template", "false, or a checkpoint after sft")
    model = _harness_model(open_model(checkpoint), tokenizer, node.batch_size)
    context.report.progress(0, len(node.tasks), "lm_eval")
    try:
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=list(node.tasks),
            num_fewshot=node.num_fewshot,
            limit=node.limit,
            task_manager=manager,
            apply_chat_template=node.apply_chat_template,
            bootstrap_iters=100,  # for the metrics whose standard error has no formula, such as word_perplexity
            log_samples=False,
        )
    except (ValueError, KeyError, OSError, TemplateError) as error:  # a task's own refusal, or data that is neither here nor to be had
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise RunError("eval.tasks", first, "name other tasks, or run it once with a network") from error
    context.report.progress(len(node.tasks), len(node.tasks), "lm_eval")
    return dict(results)


def _harness_model(model: Any, tokenizer: Any, batch_size: int | str) -> Any:
    from lm_eval.models.huggingface import HFLM

    class QuietHFLM(HFLM):  # type: ignore[misc]  # untyped
        """HFLM without its own progress bars."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

    return QuietHFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def flatten(results: dict[str, Any]) -> dict[str, Any]:
    """`task/metric` -> value, `task/metric_stderr`, `task/n`; a filter other than none is the last part of the name."""
    flat: dict[str, Any] = {}
    for task, values in sorted(results["results"].items()):
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if kind and not isinstance(value, str):  # "N/A" where the harness has no standard error
                flat[f"{task}/{metric}" + ("" if kind == "none" else f"/{kind}")] = float(value)
        if task in results.get("n-samples", {}):
            flat[f"{task}/n"] = int(results["n-samples"][task]["effective"])
    return flat


@contextmanager
def _quiet_harness(log: Path | None) -> Iterator[None]:
    """The harness with its log at errors, no bars, no telemetry, and templates in Jinja's sandbox; all of it put back afterwards.

    What it and the programs it calls still write to standard error goes to the file `log`.
    """
    import datasets
    import lm_eval.utils
    from jinja2.sandbox import SandboxedEnvironment

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    loggers = {name: logging.getLogger(name) for name in ("lm_eval", "datasets")}
    levels = {name: logger.level for name, logger in loggers.items()}
    bars, plain = datasets.are_progress_bars_disabled(), lm_eval.utils.env
    boxed = SandboxedEnvironment(loader=plain.loader, undefined=plain.undefined, keep_trailing_newline=plain.keep_trailing_newline)
    boxed.filters.update(plain.filters)
    lm_eval.utils.env = boxed  # a task's YAML may come from anywhere, and its templates would run Python
    for logger in loggers.values():
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with _errors_to(log):
            yield
    finally:
        lm_eval.utils.env = plain
        for name, logger in loggers.items():
            logger.setLevel(levels[name])
        if not bars:
            datasets.enable_progress_bars()


@contextmanager
def _errors_to(log: Path | None) -> Iterator[None]:
    """Standard error into a file, by its descriptor: the harness starts git, whose words sys.stderr never sees."""
    if log is None:
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
