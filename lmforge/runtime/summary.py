"""What a finished run shows: one table over its checkpoints, a sample of text, where the files are, what to try next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lmforge.eval.preference import paired_difference
from lmforge.explain import flatten, gib
from lmforge.plan import Plan, Step
from lmforge.runtime.workspace import Workspace
from lmforge.stage.nodes import Kto, Pairwise

Metrics = Mapping[str, Mapping[str, Any]]
MAIN = ("perplexity", "loss")  # what a sweep minimizes: the last step that has one


def flat(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Only the numbers, by dotted key."""
    return {key: value for key, value in flatten(metrics).items() if isinstance(value, (int, float)) and not isinstance(value, bool)}


def objective(metrics: Metrics) -> float | None:
    """The last step's main figure, for sweepers that look for the best point."""
    for step in reversed(list(metrics.values())):
        for name in MAIN:
            if isinstance(step.get(name), (int, float)):
                return float(step[name])
    return None


def line(step: Step, metrics: Mapping[str, Any]) -> str:
    """The few figures that tell how a step went."""
    shown = {key: value for key, value in flat(metrics).items() if "." not in key}
    return ", ".join(f"{key} {_number(value)}" for key, value in list(shown.items())[:5]) or step.produces


def show(console: Console, plan: Plan, metrics: Metrics, folder: Path, workspace: Workspace) -> None:
    """Print it all."""
    rows = list(evaluations(plan, metrics))
    if rows:
        console.print(table(rows, metrics))
        for note in baselines(rows):
            console.print(note, highlight=False)
    for note in deltas(plan, rows, metrics, workspace):
        console.print(note, highlight=False)
    for name, sample in best_sample(rows):
        console.rule(f"what {name} writes after {sample['prompt'][-32:]!r}")
        console.print(sample["prompt"] + sample["text"], highlight=False, markup=False)
    console.rule("files")
    console.print(f"run       {folder}", highlight=False, soft_wrap=True)
    for step in plan.steps:
        if step.produces in ("checkpoint", "adapter", "reward_model", "samples"):
            console.print(f"{step.name:<9} {workspace.folder(step) / step.produces}", highlight=False, soft_wrap=True)
    for hint in next_steps(plan, folder):
        console.print(f"try       {hint}", highlight=False, markup=False, soft_wrap=True)


def evaluated(plan: Plan) -> Iterator[tuple[str, Step]]:
    """Each evaluation step with the name of the checkpoint it measures."""
    for step in plan.steps:
        if step.group == "eval":
            yield next(one.step for one in step.inputs if one.kind == "checkpoint"), step


def evaluations(plan: Plan, metrics: Metrics) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each measured checkpoint with its figures."""
    for name, step in evaluated(plan):
        yield name, metrics[step.name]


def table(rows: Sequence[tuple[str, Mapping[str, Any]]], metrics: Metrics) -> Table:
    """A row per checkpoint; columns for what was measured."""
    if not any({"perplexity", "answer_perplexity", "preference_accuracy"} & one.keys() for _, one in rows):
        return scores(rows)
    shown = Table("checkpoint", "held-out perplexity", "bits per byte", "answer perplexity", "preference accuracy", "size on disk")
    untrained = next((one["untrained_perplexity"] for _, one in rows if "untrained_perplexity" in one), None)
    if untrained is not None:
        shown.add_row("untrained", _number(untrained), "", "", "", "")
    for name, one in rows:
        size = metrics.get(name, {}).get("bytes_after")
        shown.add_row(
            name,
            _with_error(one.get("perplexity"), one.get("perplexity_standard_error")),
            _number(one.get("bits_per_byte")),
            _with_error(one.get("answer_perplexity"), one.get("answer_perplexity_standard_error")),
            _with_error(one.get("preference_accuracy"), one.get("preference_accuracy_standard_error")),
            gib(size) if size else "",
        )
    return shown


def scores(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """A row per metric and a column per checkpoint: what a harness of many tasks reports."""
    shown = Table("task/metric", *[name for name, _ in rows])
    for key in dict.fromkeys(key for _, one in rows for key in flat(one)):
        if not key.endswith(("_stderr", "/n")):
            shown.add_row(key, *[_with_error(one.get(key), one.get(f"{key}_stderr")) for _, one in rows])
    return shown


def baselines(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[str]:
    """The bigram model beside the pretrained one, on the same tokens."""
    for name, one in rows:
        if "bigram_perplexity" in one:
            verdict = "below" if one["perplexity"] < one["bigram_perplexity"] else "NOT below"
            yield f"{name}'s perplexity {one['perplexity']:.1f} is {verdict} an interpolated bigram model's {one['bigram_perplexity']:.1f} on the same tokens"


def best_sample(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[tuple[str, Mapping[str, str]]]:
    """The text of the checkpoint that predicts held-out text best, where one was drawn."""
    drawn = [(one.get("perplexity", 0.0), name, one["sample"]) for name, one in rows if "sample" in one]
    if drawn:
        _, name, sample = min(drawn, key=lambda one: one[0])
        yield name, sample


def deltas(plan: Plan, rows: Sequence[tuple[str, Mapping[str, Any]]], metrics: Metrics, workspace: Workspace) -> Iterator[str]:
    """What post-training gained, and what quantization cost. A gain is over the same pairs or prompts, so its error is the paired one."""
    measured = dict(rows)
    pairs = {name: workspace.folder(step) / step.produces / "preference.jsonl" for name, step in evaluated(plan)}
    for step in plan.steps:
        yield from learned(step, metrics[step.name])
        after = f"{step.name}.merge" if f"{step.name}.merge" in measured else step.name
        before = next((one.step for one in step.inputs if one.kind == "checkpoint"), None)
        if after not in measured or before not in measured or step.stage == "merge":
            continue
        here, there = measured[after], measured[before]
        if isinstance(step.spec, (Pairwise, Kto)) and "preference_accuracy" in here:
            gain = paired_difference(pairs[before], pairs[after])
            points, error = 100 * gain["difference"], 100 * gain["standard_error"]
            over = f"over {before} (paired standard error {error:.1f}, {gain['pairs']:,} held-out pairs)"
            yield f"{step.name} moves preference accuracy by {points:+.1f} points {over}"
        if step.group == "quantize" and "perplexity" in here:
            made = metrics[step.name]
            change = 100 * (here["perplexity"] / there["perplexity"] - 1)
            yield f"{step.stage}: {gib(made['bytes_before'])} -> {gib(made['bytes_after'])} on disk, perplexity {change:+.2f} %"


def learned(step: Step, made: Mapping[str, Any]) -> Iterator[str]:
    """What a stage measured on held-out data by itself: a reward model's accuracy, the reward that RL gained and the KL it cost."""
    if "heldout_accuracy" in made:
        accuracy = _with_error(made["heldout_accuracy"], made["heldout_accuracy_standard_error"])
        yield f"{step.name}: {accuracy} of {made['heldout_pairs']:,} held-out pairs in the right order, mean margin {made['heldout_margin']:.3g}"
    if "heldout_reward" in made:
        change = f"{made['heldout_reward_start']:.4g} -> {made['heldout_reward']:.4g}"
        error = made["heldout_reward_gain_standard_error"]
        yield (
            f"{step.name} moves the held-out reward {change}: {made['heldout_reward_gain']:+.4g} (paired standard error {error:.2g}), "
            f"KL {made['heldout_kl_per_token']:.3g} nats a token to where it started"
        )


def next_steps(plan: Plan, folder: Path) -> Iterator[str]:
    """Lines to type."""
    yield f'python -m lmforge generate {folder.name} "def "'
    for step in plan.steps:
        if step.stage == "sample":
            yield f"python -m lmforge rank {step.name}-{step.digest}    # rank the answers in a browser"
        if step.stage == "dpo":
            yield f"python -m lmforge stage.{step.name}.beta=0.2       # reruns {step.name} and what follows, nothing before"
    yield "python -m lmforge compare                  # the latest runs side by side"


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _with_error(value: Any, error: Any) -> str:
    return "" if value is None else f"{value:.4g}" + (f" ± {error:.2g}" if error is not None else "")
