"""PPO and GRPO as objectives: what they learn, that a resumed run is the same, and that nothing depends on how a batch is cut."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_rl
import tiny_run
import torch
from safetensors.torch import load_file

import lmforge
from lmforge.errors import RunError
from lmforge.optimizer.nodes import Sgd
from lmforge.optimizer.schedule import Constant
from lmforge.reward.checked import Checked
from lmforge.training.rl.practice import Schedule

KINDS = ("ppo", "grpo")
SCRIPT = Path(tiny_rl.__file__)
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join((str(Path(lmforge.__file__).parents[1]), str(SCRIPT.parent)))}
EACH_ROLLOUT = {"reward/mean", "reward/std", "response_length", "ended", "kl", "kl_coef", "advantages/std"}
EACH_STEP = {"loss", "grad_norm", "lr", "policy/loss", "entropy", "clip_fraction", "approx_kl"}


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_rl.write_prompts(tmp_path_factory.mktemp("tokens") / "prompt")


def constant(lr: float) -> Any:
    return Sgd(lr=lr, weight_decay=0.0, grad_clip=None, global_batch_tokens=128, schedule=Constant(warmup=0.0), **tiny_run.UNGUARDED)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_rises(kind: str, prompts: Path, tmp_path: Path) -> None:
    """From one token in 61 to most of the answer; the KL grows from 0, and all metrics are there."""
    report = tiny_rl.Tables()
    recipe = {"steps": 60, "log_every": 4, "optimizer": tiny_run.adamw(lr=2e-2, weight_decay=0.0, schedule=Constant(warmup=0.0), **tiny_run.UNGUARDED)}
    metrics, _ = tiny_rl.train(kind, tmp_path, prompts, report=report, rows=16, options={"kl_coef": 0.0} if kind == "ppo" else {}, recipe=recipe)
    first, last = report.logged[0], report.logged[-1]
    assert first["reward/mean"] < 0.1
    assert last["reward/mean"] > 0.5
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)  # the first rollout is the reference's own
    assert last["kl"] > 0.1
    assert last["entropy"] < first["entropy"]
    value = {"reward/kl_penalty", "value/explained_variance", "value/loss"} if kind == "ppo" else {"reward/equal_groups"}
    assert metrics.keys() >= EACH_ROLLOUT | EACH_STEP | value
    assert {"clip_fraction", "approx_kl"} <= {name for one in report.logged for name, number in one.items() if number > 0}


def test_the_value_model_learns_what_an_answer_will_be_worth(prompts: Path, tmp_path: Path) -> None:
    """A reward that the prompt alone decides: values explain its variance, and there is nothing for the policy to learn."""
    report = tiny_rl.Tables()
    by_prompt = Checked("reward=prompt", lambda episodes: [start / 6 for start in episodes.starts])
    recipe = {"steps": 80, "log_every": 4, "optimizer": tiny_run.adamw(lr=1e-2, weight_decay=0.0, schedule=Constant(warmup=0.0), **tiny_run.UNGUARDED)}
    options = {"kl_coef": 0.0, "kl_target": None, "value_clip_range": None, "entropy_coef": 0.0, "gae_lambda": 1.0}
    tiny_rl.train("ppo", tmp_path, prompts, scorer=by_prompt, options=options, report=report, rows=16, recipe=recipe)
    assert report.logged[0]["value/explained_variance"] < 0.2
    assert report.logged[-1]["value/explained_variance"] > 0.7
    assert report.logged[-1]["value/loss"] < 0.2 * report.logged[0]["value/loss"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("micro", [1, 3])
def test_the_gradient_does_not_depend_on_accumulation(kind: str, micro: int, prompts: Path, tmp_path: Path) -> None:
    recipe = {"steps": 1, "optimizer": constant(1.0), "log_every": 1}  # weights move by exactly the gradient
    whole, weights = tiny_rl.train(kind, tmp_path / "whole", prompts, micro=8, recipe=recipe)
    parts, others = tiny_rl.train(kind, tmp_path / "parts", prompts, micro=micro, recipe=recipe)
    assert whole["grad_norm"] > 1e-3
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=0, atol=1e-6)
    for name in EACH_ROLLOUT | EACH_STEP:
        assert parts[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_activations_change_nothing(kind: str, prompts: Path, tmp_path: Path) -> None:
    """In the policy and in the critic; and rollouts keep their cache."""
    recipe = {"steps": 1, "optimizer": constant(1.0), "log_every": 1}
    _, weights = tiny_rl.train(kind, tmp_path / "plain", prompts, recipe=recipe)
    lowered = {**recipe, "parallel": tiny_run.parallel(activation_checkpointing="full")}
    _, others = tiny_rl.train(kind, tmp_path / "full", prompts, recipe=lowered)
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=0, atol=1e-6)


def test_killed_in_a_rollout_and_run_again_ends_in_the_same_weights(prompts: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(SCRIPT), "killed", str(tmp_path), str(prompts)], check=True, timeout=300, env=ENVIRONMENT, capture_output=True)
    for kind in KINDS:
        expected, undisturbed = tiny_rl.train(kind, tmp_path / "undisturbed" / kind, prompts)
        resumed = tiny_run.state_in(tmp_path / kind / "state")
        assert resumed is not None
        assert resumed["step"] in (4, 5)  # the first or second of the four steps of its rollout
        metrics, weights = tiny_rl.train(kind, tmp_path / kind, prompts)
        assert all(torch.equal(weights[name], value) for name, value in undisturbed.items())
        assert {name: metrics[name] for name in EACH_ROLLOUT | EACH_STEP} == {name: expected[name] for name in EACH_ROLLOUT | EACH_STEP}


def test_two_ranks_equal_one(prompts: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(SCRIPT), "ddp", str(tmp_path), str(prompts)]
    subprocess.run(launch, check=True, timeout=500, env=ENVIRONMENT)
    for kind in KINDS:
        report = tiny_rl.Tables()
        recipe = {"optimizer": tiny_run.adamw(eps=1e-5)}
        _, weights = tiny_rl.train(kind, tmp_path / "one" / kind, prompts, report=report, recipe=recipe, sample_every=4)
        theirs = json.loads((tmp_path / f"{kind}.json").read_text())
        for one, other in zip(report.logged, theirs["logged"], strict=True):
            for name in (EACH_ROLLOUT | EACH_STEP) & one.keys():
                assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
        assert theirs["tables"] == json.loads(json.dumps(report.tables))  # the same answers were drawn
        assert theirs["heldout"] == pytest.approx(tiny_rl.heldout(prompts), rel=1e-5)
        for name, value in load_file(tmp_path / kind / "final.safetensors").items():
            torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-5)


def test_which_answers_a_step_trains_on() -> None:
    schedule = Schedule(rows=4, epochs=2, minibatches=3, group_size=6, seed=1)
    assert (schedule.answers, schedule.updates) == (12, 6)
    for rollout in range(2):
        prompts = schedule.prompts(6 * rollout, 5)
        assert len(prompts) == 12
        assert all(len(set(group.tolist())) == 1 for group in prompts.view(2, 6))
        for epoch in range(2):
            parts = [schedule.minibatch(6 * rollout + 3 * epoch + part).tolist() for part in range(3)]
            assert sorted(one for part in parts for one in part) == list(range(12))  # every answer once an epoch
    assert schedule.minibatch(0).tolist() != schedule.minibatch(3).tolist()  # in an order of its own
    seen = torch.cat([Schedule(rows=4, epochs=1, minibatches=1, group_size=2, seed=1).prompts(step, 10) for step in range(5)])
    assert sorted(seen.tolist()) == sorted(2 * list(range(10)))  # every prompt once before one comes again
    with pytest.raises(RunError, match="12 answers of a rollout are no whole number of groups of 5"):
        Schedule(rows=4, epochs=2, minibatches=3, group_size=5, seed=1)


def test_the_adaptive_coefficient_follows_the_kl(prompts: Path, tmp_path: Path) -> None:
    """KL far below a high target: e is clipped to -0.2, so each rollout of 16 answers takes 1 - 0.2 * 16 / 200 of it."""
    report = tiny_rl.Tables()
    tiny_rl.train("ppo", tmp_path, prompts, options={"kl_target": 1e3}, report=report, recipe={"steps": 12, "log_every": 4})
    assert [one["kl_coef"] for one in report.logged] == pytest.approx([0.02 * (1 - 0.016) ** rollout for rollout in range(3)])
    fixed = tiny_rl.Tables()
    tiny_rl.train("ppo", tmp_path / "fixed", prompts, options={"kl_target": None}, report=fixed, recipe={"steps": 8, "log_every": 4})
    assert [one["kl_coef"] for one in fixed.logged] == [0.02, 0.02]


@pytest.mark.parametrize("kind", KINDS)
def test_tables_of_answers_come_at_intervals(kind: str, prompts: Path, tmp_path: Path) -> None:
    report = tiny_rl.Tables()
    tiny_rl.train(kind, tmp_path, prompts, report=report, sample_every=8, recipe={"steps": 20})
    assert [rows[0][0] for _, _, rows in report.tables] == [0, 8, 16]
    title, columns, rows = report.tables[0]
    assert (title, columns) == ("generations", ("step", "prompt", "answer", "reward"))
    assert len(rows) == 8
    for _, prompt, answer, reward in rows:
        assert prompt.startswith("w")
        words = answer.split()
        assert reward == pytest.approx(words.count("w7") / len(words) if words else 0.0) or "<|end|>" not in answer


def test_a_reward_that_is_not_a_number_is_one_line(prompts: Path, tmp_path: Path) -> None:
    def bad(episodes: Any) -> list[float]:
        return [float("nan") if row == 3 else 0.0 for row in range(len(episodes.prompts))]

    with pytest.raises(RunError, match=r"^run error: reward=bad: is nan for row 3, the answer '[^\n]*' to 'w[^\n]*$"):
        tiny_rl.train("grpo", tmp_path, prompts, scorer=Checked("reward=bad", bad))


def test_an_adapter_switched_off_is_the_reference(prompts: Path, tmp_path: Path) -> None:
    """The KL to it is 0 in the first rollout and grows; the base does not move."""
    from peft import LoraConfig, get_peft_model

    from lmforge.training.rl.reference import adapter_off

    base = tiny_run.tiny_llama()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    policy = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_alpha=64))
    objective, model = tiny_rl.parts("grpo", prompts, policy=policy)
    objective.reference = adapter_off(lambda model: model.disable_adapter())
    report = tiny_rl.Tables()
    from lmforge.training.fit import fit

    recipe = tiny_run.recipe(steps=16, log_every=4, optimizer=tiny_run.adamw(lr=5e-2))
    fit(recipe, objective, model, tiny_run.context(tmp_path, report), lambda _: None)
    kl = [one["kl"] for one in report.logged]
    assert kl[0] == pytest.approx(0.0, abs=1e-6)
    assert kl[-1] > 1e-3
    for name, value in model.get_base_model().state_dict().items():
        plain = name.replace("base_layer.", "")
        if plain in before:
            assert torch.equal(value, before[plain])
