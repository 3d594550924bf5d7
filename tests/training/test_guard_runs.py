"""Real runs with poisoned rows: a step is skipped whole, on all ranks, and a run that is stopped and run again ends in the same bits."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from test_processes import ENVIRONMENT

from lmforge.errors import RunError
from lmforge.parallel.layout import ONE
from lmforge.parallel.nodes import Parallel
from lmforge.training.fit import fit
from lmforge.training.objective import LossParts
from lmforge.training.objectives.causal_lm import CausalLM
from lmforge.training.order import RowOrder

NAN, INFINITE = float("nan"), float("inf")
ROWS, SEED = 8, 3  # of tiny_run.recipe


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More rows than a run takes, so that each comes once."""
    return tiny_run.write_tokens(tmp_path_factory.mktemp("guard") / "text", "text", examples=120)


class Poisoned(CausalLM):
    """Multiplies the loss of every batch that holds a poisoned row, in the steps that were asked for."""

    poison: Mapping[int, float] = {}  # row -> factor

    def dataset(self, split: Any) -> Any:
        found, poison = super().dataset(split), self.poison
        plain = found.batch

        def batch(indices: Any) -> Any:
            factors = torch.tensor([poison.get(int(index), 1.0) for index in indices])
            return {**plain(indices), "factor": factors}

        found.batch = batch
        return found

    def loss(self, model: Any, batch: Any) -> LossParts:
        factor = batch["factor"].prod()
        parts = super().loss(model, {name: value for name, value in batch.items() if name != "factor"})
        return replace(parts, sum=parts.sum * factor)


def step_rows(tokens: Path, step: int) -> list[int]:
    """By the order alone, not through the code under test."""
    count = len(CausalLM(tokens, 16).dataset("train"))
    found: list[int] = RowOrder(count, SEED).take(step * ROWS, (step + 1) * ROWS).tolist()
    return found


def only(tokens: Path, step: int, steps: int) -> int:
    """A row that `step` takes, and no other step of the run."""
    taken = [row for one in range(steps) for row in step_rows(tokens, one)]
    assert len(taken) == len(set(taken))
    return step_rows(tokens, step)[3]


class Said(tiny_run.Lines):
    """What was said of skipped steps, apart from the intervals."""

    def __init__(self, at: int = -1, act: Any = None) -> None:
        super().__init__(at, act)
        self.skipped: list[dict[str, Any]] = []

    def log(self, step: int, metrics: Any) -> None:
        if "skipped/step" in metrics:
            self.skipped.append(dict(metrics))
        else:
            super().log(step, metrics)


def guarded(max_skips: int = 4, sigma: float | None = None, window: int = 4) -> Any:
    return tiny_run.adamw(skip_sigma=sigma, skip_window=window, max_skips=max_skips)


def run(folder: Path, tokens: Path, poison: Mapping[int, float], report: Any = None, parallel: Parallel | None = None, devices: int = 1, **changes: Any) -> Any:
    """(metrics, final weights) of a fit on poisoned rows; the weights are rank 0's."""
    objective, made = Poisoned(tokens, 16), dict[str, Any]()
    objective.poison = poison
    told = tiny_run.recipe(**{"parallel": parallel or tiny_run.parallel(), **changes})

    def save(model: Any) -> None:
        made.update({name: value.detach().clone() for name, value in model.named_parameters()})

    context = tiny_run.context(folder, report, micro_batch_size=4, devices=devices)
    if devices > 1:
        context = replace(context, placement=replace(context.placement, mesh={**ONE, "dp_replicate": devices}))
    return fit(told, objective, tiny_run.tiny_model(), context, save), made


@pytest.mark.parametrize("factor", [NAN, INFINITE])
def test_a_poisoned_step_is_skipped_whole(text: Path, tmp_path: Path, factor: float) -> None:
    """The weights after step 2 are those before it, the schedule goes on, and the run is finite."""
    row, report = only(text, 2, 6), Said()
    metrics, weights = run(tmp_path / "guarded", text, {row: factor}, report, optimizer=guarded(), log_every=1)
    [line] = report.skipped
    assert (line["skipped/step"], line["step"], line["skipped/rows"]) == (2, 3, step_rows(text, 2))
    assert row in line["skipped/rows"]
    assert not math.isfinite(line["skipped/loss"])
    assert [one["step"] for one in report.logged] == [1, 2, 4, 5, 6]
    schedule = tiny_run.adamw().schedule
    assert [one["lr"] for one in report.logged] == [1e-2 * schedule.factor(step, 6) for step in (0, 1, 3, 4, 5)]
    assert math.isfinite(metrics["loss"])
    assert all(value.isfinite().all() for value in weights.values())


def test_a_skipped_step_leaves_weights_and_optimizer_as_they_were(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in the module itself, before and after the step; the steps beside it change both."""
    from lmforge.training.module import TrainingModule

    seen: list[tuple[dict[str, Any], Any]] = []
    plain = TrainingModule.training_step

    def training_step(module: Any, batch: Any, index: int) -> None:
        plain(module, batch, index)
        states = [{name: value.clone() for name, value in one.items()} for optimizer in module.torch_optimizers for one in optimizer.state.values()]
        seen.append(({name: value.detach().clone() for name, value in module.model.named_parameters()}, states))
        assert all(parameter.grad is None for parameter in module.model.parameters())

    monkeypatch.setattr(TrainingModule, "training_step", training_step)
    run(tmp_path, text, {only(text, 2, 6): NAN}, optimizer=guarded())
    exact = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(seen[2], seen[1], **exact)
    for one in (1, 3):
        assert any(not torch.equal(seen[one][0][name], seen[one - 1][0][name]) for name in seen[one][0])


def test_a_spike_is_skipped_where_it_is_judged(text: Path, tmp_path: Path) -> None:
    row = only(text, 5, 6)
    for sigma, skipped in ((6.0, [5]), (None, [])):
        report = Said()
        metrics, _ = run(tmp_path / str(sigma), text, {row: 1e4}, report, optimizer=guarded(sigma=sigma), log_every=1)
        assert [line["skipped/step"] for line in report.skipped] == skipped
    assert metrics["loss"] > 1e3


def test_a_guard_with_nothing_to_skip_changes_no_bit(text: Path, tmp_path: Path) -> None:
    plain, report = tiny_run.Lines(), tiny_run.Lines()
    _, expected = run(tmp_path / "plain", text, {}, plain)
    _, weights = run(tmp_path / "guarded", text, {}, report, optimizer=guarded(sigma=50.0))
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    for ours, theirs in zip(report.logged, plain.logged, strict=True):
        assert {**ours, "tokens_per_s": 0} == {**theirs, "tokens_per_s": 0}


def test_the_interval_means_are_of_the_accepted_steps(text: Path, tmp_path: Path) -> None:
    one_by_one, together, poison = Said(), Said(), {only(text, 2, 6): NAN}
    run(tmp_path / "one", text, poison, one_by_one, optimizer=guarded(), log_every=1)
    run(tmp_path / "all", text, poison, together, optimizer=guarded(), log_every=6)
    [line] = together.logged
    assert line["loss"] == pytest.approx(sum(one["loss"] for one in one_by_one.logged) / 5, rel=1e-3)  # steps weigh nearly the same
    assert line["tokens"] == 6 * 8 * 16  # read, all the same


def test_the_cap_stops_with_one_line_and_nothing_saved(text: Path, tmp_path: Path) -> None:
    poison = {only(text, step, 6): NAN for step in (1, 2, 4)}
    report = Said()
    with pytest.raises(RunError) as caught:
        run(tmp_path, text, poison, report, optimizer=guarded(max_skips=2))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("run error: optimizer.max_skips: 3 steps had to be skipped, 2 may be: step 1 (not finite: loss nan, ")
    assert f"look at rows {' '.join(map(str, step_rows(text, 4)))} of the last one" in str(caught.value)
    assert [line["skipped/step"] for line in report.skipped] == [1, 2, 4]


def test_without_skips_the_first_step_that_is_not_finite_stops_as_ever(text: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the loss or its gradient was not finite in step 2;"):
        run(tmp_path, text, {only(text, 2, 6): NAN}, optimizer=guarded(max_skips=0))


def test_a_run_stopped_inside_the_window_ends_in_the_same_bits(text: Path, tmp_path: Path) -> None:
    """A spike before the stop and one after it, which only a window from before the stop can judge; and the count goes on."""
    steps = 7
    poison, changes = {only(text, 1, steps): NAN, only(text, 6, steps): 1e4}, {"steps": steps, "log_every": 1, "optimizer": guarded(sigma=8.0)}
    undisturbed, before, after = Said(), Said(4, lambda: os.kill(os.getpid(), signal.SIGTERM)), Said()
    _, expected = run(tmp_path / "undisturbed", text, poison, undisturbed, **changes)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", text, poison, before, **changes)
    _, weights = run(tmp_path / "stopped", text, poison, after, **changes)
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert [line["skipped/step"] for line in undisturbed.skipped] == [1, 6]
    assert [line["skipped/step"] for line in before.skipped] == [1]
    assert after.skipped == undisturbed.skipped[1:]
    assert after.skipped[0]["skipped/count"] == 2


def test_a_loss_that_is_not_a_number_is_skipped_under_a_loss_scale_too(text: Path, tmp_path: Path) -> None:
    low = {"compute_dtype": "float16", "log_every": 1}
    report = Said()
    run(tmp_path / "nan", text, {only(text, 2, 6): NAN}, report, optimizer=guarded(max_skips=1), loss_scale=2.0**10, **low)
    assert [line["skipped/step"] for line in report.skipped] == [2]
    report = Said()
    run(tmp_path / "over", text, {}, report, optimizer=guarded(max_skips=1), loss_scale=2.0**40, **low)
    assert not report.skipped
    assert [one["loss_scale"] for one in report.logged[:3]] == [2.0**39, 2.0**38, 2.0**37]


def test_two_ranks_skip_together(text: Path, tmp_path: Path) -> None:
    """Only one of them reads the poisoned row."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", __file__, str(tmp_path), str(text)]
    subprocess.run(launch, check=True, timeout=300, env=ENVIRONMENT)
    report = Said()
    _, weights = run(tmp_path / "one", text, {only(text, 2, 6): NAN}, report, optimizer=guarded())
    skipped = json.loads((tmp_path / "skipped.json").read_text())
    assert skipped == [[2, step_rows(text, 2)]] == [[line["skipped/step"], line["skipped/rows"]] for line in report.skipped]
    for name, value in torch.load(tmp_path / "weights.pt", weights_only=True).items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-3)


def main(folder: Path, tokens: Path) -> None:
    report = Said()
    _, weights = run(folder / "two", tokens, {only(tokens, 2, 6): NAN}, report, tiny_run.parallel(2), 2, optimizer=guarded())
    if os.environ["RANK"] == "0":
        torch.save(weights, folder / "weights.pt")
        (folder / "skipped.json").write_text(json.dumps([[line["skipped/step"], line["skipped/rows"]] for line in report.skipped]))
    else:
        assert not report.skipped


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
