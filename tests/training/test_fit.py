"""The loop: gradients, clipping, precision, logging, stopping."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from torch import nn

from lmforge.errors import RunError
from lmforge.optimizer.nodes import Momentum, Muon, Optimizer, Sgd
from lmforge.optimizer.schedule import Constant
from lmforge.training.fit import fit
from lmforge.training.lowering import lower
from lmforge.training.objective import LossParts
from lmforge.training.objectives.causal_lm import CausalLM
from lmforge.training.order import StepData


def sgd(lr: float = 1.0, grad_clip: float | None = None) -> Optimizer:
    """With learning rate 1 and one step, weights move by exactly the gradient."""
    return Sgd(lr=lr, weight_decay=0.0, grad_clip=grad_clip, global_batch_tokens=128, schedule=Constant(warmup=0.0), **tiny_run.UNGUARDED)


def change(weights: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() - weights[name] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("micro", [1, 3, 8])
def test_the_gradient_is_that_of_the_whole_batch(chat: Path, tmp_path: Path, micro: int) -> None:
    model = tiny_run.tiny_model()
    objective = CausalLM(chat, 16)
    batch = StepData(objective, objective.dataset("train"), rows_per_step=8, micro_batch_size=8, seed=3, rank=0, world=1)[0].micro_batches[0]
    counts = (batch["labels"] != -100).sum(1)
    assert counts.min() < counts.max()  # a mean of means would be wrong
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=None, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    loss.backward()
    metrics, weights = tiny_run.train(tmp_path, chat, micro=micro, steps=1, optimizer=sgd())
    for name, moved in change(weights, tiny_run.tiny_model()).items():
        torch.testing.assert_close(moved, dict(model.named_parameters())[name].grad, rtol=0, atol=1e-6)
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)


def test_clipping_bounds_the_global_norm(chat: Path, tmp_path: Path) -> None:
    free, _ = tiny_run.train(tmp_path / "free", chat, steps=1, optimizer=sgd())
    clipped, weights = tiny_run.train(tmp_path / "clipped", chat, steps=1, optimizer=sgd(grad_clip=0.01))
    norm = torch.stack([moved.norm() for moved in change(weights, tiny_run.tiny_model()).values()]).norm()
    assert free["grad_norm"] == pytest.approx(clipped["grad_norm"])
    assert free["grad_norm"] > 0.1
    assert float(norm) == pytest.approx(0.01, rel=1e-3)


def test_it_learns_and_says_so(text: Path, tmp_path: Path) -> None:
    report = tiny_run.Lines()
    recipe = tiny_run.recipe(steps=45, log_every=20)
    metrics, _ = tiny_run.train(tmp_path, text, steps=45, log_every=20, report=report)
    assert [one["step"] for one in report.logged] == [20, 40, 45]
    assert {"loss", "grad_norm", "lr", "tokens_per_s", "tokens", "step"} == report.logged[0].keys()
    assert report.logged[0]["loss"] > report.logged[1]["loss"] > metrics["loss"] == report.logged[-1]["loss"]
    assert [one["lr"] for one in report.logged] == [1e-2 * recipe.optimizer.schedule.factor(step, 45) for step in (19, 39, 44)]
    assert report.logged[-1]["tokens"] == metrics["tokens"] == 45 * 8 * 16
    assert metrics["steps"] == 45
    assert report.bars[-1][:2] == (45, 45)
    assert report.bars[-1][2].startswith("loss ")
    assert report.bars[-1][2].endswith(" tok/s")


def muon() -> Optimizer:
    return Muon(
        lr=0.02, weight_decay=0.1, grad_clip=1.0, global_batch_tokens=128, schedule=Constant(warmup=0.5), momentum=0.95, nesterov=True, ns_steps=5,
        adjust_lr="original", adamw_lr=0.004, beta1=0.9, beta2=0.95, eps=1e-8, **tiny_run.UNGUARDED,
    )  # fmt: skip


def test_muon_and_its_two_learning_rates(text: Path, tmp_path: Path) -> None:
    metrics, _ = tiny_run.train(tmp_path, text, steps=30, optimizer=muon())
    assert metrics["loss"] < 4.0
    assert metrics["lr"] == 0.02


@pytest.mark.parametrize("precision", [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("float32", "float16")])
def test_low_precision_follows_fp32(text: Path, tmp_path: Path, precision: tuple[Any, Any]) -> None:
    expected, _ = tiny_run.train(tmp_path / "fp32", text, steps=10)
    metrics, weights = tiny_run.train(tmp_path / "low", text, steps=10, param_dtype=precision[0], compute_dtype=precision[1])
    assert {value.dtype for value in weights.values()} == {getattr(torch, precision[0])}
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=0.02)
    assert metrics["loss"] != expected["loss"]


def test_loss_scaling_skips_what_overflows(text: Path, tmp_path: Path) -> None:
    low = {"compute_dtype": "float16", "optimizer": sgd(lr=0.1)}
    report = tiny_run.Lines()
    _, skipped = tiny_run.train(tmp_path / "over", text, steps=3, loss_scale=2.0**40, log_every=1, report=report, **low)
    assert [one["loss_scale"] for one in report.logged] == [2.0**39, 2.0**38, 2.0**37]  # halved by each overflow
    assert all(not moved.any() for moved in change(skipped, tiny_run.tiny_model()).values())
    scaled, one = tiny_run.train(tmp_path / "scaled", text, steps=3, loss_scale=2.0**10, **low)
    _, other = tiny_run.train(tmp_path / "plain", text, steps=3, optimizer=sgd(lr=0.1))
    assert scaled["loss_scale"] == 2.0**10
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"param_dtype": "float16", "compute_dtype": "float16"}, "precision.param_dtype"),
        ({"param_dtype": "bfloat16"}, "precision.compute_dtype"),
        ({"loss_scale": 8.0}, "precision.loss_scale"),
    ],
)
def test_dtypes_that_do_not_go_together(changes: dict[str, Any], where: str) -> None:
    with pytest.raises(RunError, match=where):
        tiny_run.recipe(**changes)


@pytest.mark.parametrize("changes", [{"activation_checkpointing": "selective"}, {"activation_checkpointing": "full"}, {"compile": True}])
def test_lowering_does_not_change_gradients(chat: Path, changes: dict[str, Any]) -> None:
    gradients = []
    batch = CausalLM(chat, 16).dataset("train").batch(range(4))
    calls: list[int] = []
    for one in ({}, changes):
        model = tiny_run.tiny_llama(layers=1).train()
        lower(model, tiny_run.recipe(parallel=tiny_run.parallel(**one)))
        model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: calls.append(1))
        CausalLM(chat, 16).loss(model, batch).sum.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-4)
    if "compile" not in changes:
        assert len(calls) == 3  # once plain, and twice where activations are recomputed


@pytest.mark.parametrize(("buffers", "exact"), [("float32", True), ("bfloat16", False)])
def test_rotary_frequencies_have_a_dtype_of_their_own(buffers: str, exact: bool) -> None:
    model = tiny_run.tiny_llama()
    before = model.model.rotary_emb.inv_freq.clone()
    lower(model, tiny_run.recipe(param_dtype="bfloat16", compute_dtype="bfloat16", buffer_dtype=buffers))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == getattr(torch, buffers)
    assert torch.equal(model.model.rotary_emb.inv_freq.float(), before) == exact


class Overflowing(CausalLM):
    """Adds a gradient that overflows to one parameter in its second batch, and nothing to the loss."""

    name = ""
    batches = 0

    def loss(self, model: Any, batch: Any) -> LossParts:
        parts = super().loss(model, batch)
        self.batches += 1
        parameter = dict(model.named_parameters())[self.name]
        return replace(parts, sum=parts.sum + 1e38 * (parameter - parameter.detach()).sum()) if self.batches == 2 else parts


class States(tiny_run.Lines):
    """What the state held when each step was logged: all after the step before."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.states = folder, {}

    def log(self, step: int, metrics: Any) -> None:
        super().log(step, metrics)
        self.states[step - 1] = tiny_run.state_in(self.folder, step - 1)


@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight"])
def test_an_overflow_in_one_optimizers_gradients_skips_the_step_of_all(text: Path, tmp_path: Path, name: str) -> None:
    objective, report = Overflowing(text, 16), States(tmp_path / "state")
    objective.name = name  # the first is AdamW's, the second Muon's
    told = tiny_run.recipe(steps=5, optimizer=muon(), compute_dtype="float16", loss_scale=2.0**14, log_every=1, save_every_s=0.0)
    fit(told, objective, tiny_run.tiny_model(), tiny_run.context(tmp_path, report), lambda _: None)
    assert [one["loss_scale"] for one in report.logged] == [2.0**14, *[2.0**13] * 4]
    first, skipped, third = (report.states[step] for step in (1, 2, 3))
    exact = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(skipped["weights"], first["weights"], **exact)
    torch.testing.assert_close(skipped["optimizer"], first["optimizer"], **exact)
    assert all(not torch.equal(third["weights"][one], first["weights"][one]) for one in (name, "transformer.wte.weight"))


def test_an_overflow_in_the_first_step_leaves_no_state(text: Path, tmp_path: Path) -> None:
    flat = Constant(warmup=0.0)
    momentum = Momentum(lr=0.1, weight_decay=0.0, grad_clip=None, global_batch_tokens=128, schedule=flat, momentum=0.9, nesterov=False, **tiny_run.UNGUARDED)
    report = States(tmp_path / "state")
    tiny_run.train(tmp_path, text, steps=2, optimizer=momentum, compute_dtype="float16", loss_scale=2.0**40, log_every=1, save_every_s=0.0, report=report)
    assert report.states[1]["optimizer"] == {}  # torch's fused SGD would keep a buffer that nobody has filled


class Poisoned(CausalLM):
    """A loss that is not a number from its fourth batch on."""

    def loss(self, model: Any, batch: Any) -> LossParts:
        parts = super().loss(model, batch)
        calls.append(1)
        return replace(parts, sum=parts.sum * (float("nan") if len(calls) > 3 else 1.0))


calls: list[int] = []


def test_a_loss_that_is_not_finite_names_its_step_and_saves_nothing(text: Path, tmp_path: Path) -> None:
    calls.clear()
    saved: list[Any] = []
    with pytest.raises(RunError, match="not finite in step 3;"):
        fit(tiny_run.recipe(save_every_s=0.0, log_every=6), Poisoned(text, 16), tiny_run.tiny_model(), tiny_run.context(tmp_path), saved.append)
    resumed = tiny_run.state_in(tmp_path / "state")
    assert not saved
    assert resumed is not None
    assert resumed["step"] == 3
    assert all(value.isfinite().all() for value in resumed["weights"].values())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_after_the_step_and_the_rerun_is_bitwise(chat: Path, tmp_path: Path, number: signal.Signals) -> None:
    previous = signal.getsignal(number)
    expected, undisturbed = tiny_run.train(tmp_path / "undisturbed", chat, dropout=0.2)
    report = tiny_run.Lines(2, lambda: os.kill(os.getpid(), number))
    with pytest.raises(KeyboardInterrupt):
        tiny_run.train(tmp_path / "stopped", chat, dropout=0.2, report=report)
    assert signal.getsignal(number) is previous
    resumed = tiny_run.state_in(tmp_path / "stopped" / "state")
    assert resumed is not None
    assert resumed["step"] == 2
    metrics, weights = tiny_run.train(tmp_path / "stopped", chat, dropout=0.2)
    assert all(torch.equal(weights[name], value) for name, value in undisturbed.items())
    assert {name: metrics[name] for name in ("loss", "grad_norm", "tokens", "lr")} == {name: expected[name] for name in ("loss", "grad_norm", "tokens", "lr")}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_last_step_writes_the_state_and_saves_the_weights(chat: Path, tmp_path: Path, number: signal.Signals) -> None:
    previous = signal.getsignal(number)
    expected, undisturbed = tiny_run.train(tmp_path / "undisturbed", chat)
    report = tiny_run.Lines(6, lambda: os.kill(os.getpid(), number))
    metrics, weights = tiny_run.train(tmp_path / "run", chat, report=report)
    assert signal.getsignal(number) is previous
    assert all(torch.equal(weights[name], value) for name, value in undisturbed.items())
    resumed = tiny_run.state_in(tmp_path / "run" / "state")
    assert resumed is not None
    assert resumed["step"] == 6

    (tmp_path / "run/final.safetensors").unlink()  # as where the time was not enough
    report = tiny_run.Lines()
    again, weights = tiny_run.train(tmp_path / "run", chat, report=report)
    assert not report.logged
    here = {"train_s": 0, "measured": {}}
    assert {**again, **here} == {**metrics, **here}  # the state counts its own writing
    assert {name: again[name] for name in ("loss", "grad_norm", "tokens", "lr")} == {name: expected[name] for name in ("loss", "grad_norm", "tokens", "lr")}
    assert all(torch.equal(weights[name], value) for name, value in undisturbed.items())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_does_not_cut_the_saving_short(chat: Path, tmp_path: Path, number: signal.Signals) -> None:
    previous, saved = signal.getsignal(number), []

    def save(model: Any) -> None:
        os.kill(os.getpid(), number)
        saved.append(model)

    metrics = fit(tiny_run.recipe(), CausalLM(chat, 16), tiny_run.tiny_model(), tiny_run.context(tmp_path), save)
    assert (len(saved), metrics["steps"]) == (1, 6)
    assert signal.getsignal(number) is previous


def test_refusals(text: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="8 rows a step do not divide over 3 devices"):
        tiny_run.train(tmp_path, text, devices=3)
    with pytest.raises(RunError, match="torchrun --nproc-per-node 2"):
        tiny_run.train(tmp_path, text, devices=2)


def test_nothing_but_the_state_is_written(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    tiny_run.train(tmp_path / "run", text, save_every_s=0.0)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["final.safetensors", "state"]
    assert not list((tmp_path / "empty").iterdir())
