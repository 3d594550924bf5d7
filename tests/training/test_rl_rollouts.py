"""What a rollout holds, and the losses over it against plain loops over its answers, one at a time."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_rl
import tiny_run
import torch

from lmforge.errors import DataError
from lmforge.formats.tokens import Tokens
from lmforge.reward.checked import Checked, Weighted
from lmforge.reward.nodes import Episodes, ExactMatch
from lmforge.training.order import StepData
from lmforge.training.rl import grpo
from lmforge.training.rl.actor_critic import Critic
from lmforge.training.rl.heldout import compare
from lmforge.training.rl.reference import frozen
from lmforge.training.rl.rollouts import Rollout, Rollouts, Sampling, seed_of
from lmforge.training.rl.tokens import of_rollout

TEMPERATURE = 0.8


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_rl.write_prompts(tmp_path_factory.mktemp("tokens") / "prompt")


def likely_to_end(model: Any) -> Any:
    """The same model, for whom an answer ends about every seventh token."""
    with torch.no_grad():
        model.lm_head.bias = torch.nn.Parameter(torch.tensor([2.3] + [0.0] * (tiny_run.VOCABULARY - 1)))
    return model


def answers_of(rollout: Rollout) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) ids."""
    rows = zip(rollout.input_ids.tolist(), rollout.starts.tolist(), rollout.lengths.tolist(), strict=True)
    return [(ids[:start], ids[start : start + length]) for ids, start, length in rows]


def test_a_rollout_holds_prompts_answers_and_what_the_reward_says(prompts: Path) -> None:
    seen: list[Episodes] = []

    def first(episodes: Episodes) -> list[float]:
        seen.append(episodes)
        return [float(ids[0]) for ids in episodes.ids]

    scorer = Checked("reward=sum", Weighted({"first": Checked("a", first), "share": Checked("b", tiny_rl.share)}, {"first": 0.5, "share": 2.0}))
    rollouts = Rollouts(prompts, "train", scorer, Sampling(9, 1.0))
    rows = torch.tensor([5, 5, 0, 11, 8, 5])
    found, tokens = rollouts.collect(likely_to_end(tiny_run.tiny_llama()), rows, seed=1), Tokens(prompts, "train")
    [episodes] = seen
    for index, (prompt, answer) in enumerate(answers_of(found)):
        assert prompt == tokens.example(int(rows[index]))[0].tolist()
        assert bool(found.ended[index]) == (answer[-1] == 0)
        assert 0 not in answer[:-1]
        assert len(answer) == 9 or answer[-1] == 0
        assert episodes.ids[index] == prompt + answer
        assert episodes.starts[index] == len(prompt)
        assert episodes.prompts[index] == " ".join(f"w{one}" for one in prompt)
        assert episodes.answers[index] == " ".join(f"w{one}" for one in answer if one)  # without the end token
        assert episodes.references[index] == tokens.answers[int(rows[index])]
        parts = found.components["first"][index], found.components["share"][index]
        assert [float(one) for one in parts] == pytest.approx([prompt[0], answer.count(tiny_rl.WANTED) / len(answer)])
        assert float(found.rewards[index]) == pytest.approx(0.5 * float(parts[0]) + 2 * float(parts[1]))
    assert 0 < found.ended.sum() < 6
    assert found.input_ids[0].tolist() != found.input_ids[1].tolist()  # the same prompt, another answer
    again = rollouts.collect(likely_to_end(tiny_run.tiny_llama()), rows, seed=1)
    assert torch.equal(found.input_ids, again.input_ids)


def test_no_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no prompts"):
        Rollouts(tiny_rl.write_prompts(tmp_path, prompts=0), "train", tiny_rl.share, Sampling(4, 1.0))


def size(answer: list[int]) -> float:
    return sum(answer) / 100


def sizes(episodes: Episodes) -> list[float]:
    return [size(ids[start:]) for ids, start in zip(episodes.ids, episodes.starts, strict=True)]


def prepared(kind: str, prompts: Path, **changes: Any) -> tuple[Any, Any, Any]:
    """(objective, model, the first step's batch), with answers of uneven length and after one that moved the policy."""
    policy = likely_to_end(tiny_run.tiny_llama())
    objective, model = tiny_rl.parts(
        kind, prompts, policy=policy, scorer=Checked("reward=size", sizes), max_new_tokens=9, temperature=TEMPERATURE, missing_eos_penalty=0.4, **changes
    )
    rows = objective.practice.schedule.rows
    data = StepData(objective, objective.dataset("train"), rows_per_step=rows, micro_batch_size=3, seed=0, rank=0, world=1)
    with torch.no_grad():
        batch = objective.prepare(model, data[0])
        for index, parameter in enumerate(model.parameters()):
            parameter += 0.15 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    assert [len(one["input_ids"]) for one in batch.micro_batches] == [3, 3, 2]
    assert int(batch.weight) == rows
    return objective, model, batch


def one_by_one(policy: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Log-probs of an answer's tokens by a forward over it alone."""
    logits = policy(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return (logits / TEMPERATURE).log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def total(objective: Any, model: Any, batch: Any) -> tuple[float, dict[str, float]]:
    """The step's loss and metrics, as the training module means them."""
    parts = [objective.loss(model, one) for one in batch.micro_batches]
    weight = sum(float(one.weight) for one in parts)
    return sum(float(one.sum.detach()) for one in parts) / weight, {name: sum(float(one.metrics[name]) for one in parts) / weight for name in parts[0].metrics}


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_the_loss_of_grpo_by_loops(loss_type: str, prompts: Path) -> None:
    start = likely_to_end(tiny_run.tiny_llama())
    objective, model, batch = prepared("grpo", prompts, options={"loss_type": loss_type})
    rollout = objective.practice.rollout
    answers, chosen = answers_of(rollout), objective.practice.schedule.minibatch(0).tolist()
    scores = [size(answer) - (0.4 if answer[-1] else 0.0) for _, answer in answers]
    by_answer, counts, clipped = [], [], 0.0
    for index in chosen:
        group = torch.tensor(scores[index // 4 * 4 : index // 4 * 4 + 4])
        advantage = (scores[index] - group.mean()) / (group.std() + 1e-4)
        with torch.no_grad():
            now, old = one_by_one(model, *answers[index]), one_by_one(start, *answers[index])
        ratio = (now - old).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
        kl = (old - now).exp() - 1 - (old - now)  # the start is the reference too
        by_answer.append(float((-surrogate + 0.02 * kl).sum()))
        counts.append(len(now))
        clipped += float((((ratio > 1.28) & (advantage > 0)) | ((ratio < 0.8) & (advantage < 0))).sum())
    expected = {
        "grpo": sum(one / count for one, count in zip(by_answer, counts, strict=True)) / 8,
        "dapo": sum(by_answer) / sum(counts),
        "dr_grpo": sum(by_answer) / (8 * 9),
    }[loss_type]
    assert min(counts) < max(counts)
    loss, metrics = total(objective, model, batch)
    assert loss == pytest.approx(expected, rel=1e-4)
    assert 0 < metrics["clip_fraction"] == pytest.approx(clipped / sum(counts))


def test_one_step_a_rollout_needs_no_pass_for_the_policys_own_logprobs(prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient and the metrics are those with the pass; and one pass of the rollout is left, the reference's."""
    found = []
    for told in (None, False):
        policy = likely_to_end(tiny_run.tiny_llama())
        with monkeypatch.context() as patch:
            passes: list[Any] = []
            patch.setattr(grpo, "of_rollout", lambda *args, passes=passes: passes.append(args) or of_rollout(*args))
            scorer = Checked("reward=size", sizes)
            objective, model = tiny_rl.parts("grpo", prompts, policy=policy, scorer=scorer, max_new_tokens=9, epochs=1, minibatches=1)
            objective.reference = frozen(tiny_run.tiny_llama(layers=1))
            assert objective.on_policy
            objective.on_policy = told is None
            data = StepData(objective, objective.dataset("train"), rows_per_step=8, micro_batch_size=3, seed=0, rank=0, world=1)
            with torch.no_grad():
                batch = objective.prepare(model, data[0])
            assert len(passes) == (1 if told is None else 2)
        parts = [objective.loss(model, one) for one in batch.micro_batches]
        gradient = torch.autograd.grad(sum(one.sum for one in parts), list(model.parameters()))
        names = {name for one in parts for name in one.metrics}
        found.append((gradient, {**{name: sum(float(one.metrics[name]) for one in parts) / 8 for name in names}, **objective.figures()}))
    (gradient, metrics), (wanted, others) = found
    assert max(float(one.abs().max()) for one in wanted) > 1e-3
    for one, other in zip(gradient, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert metrics["kl"] > 1e-3
    assert metrics == pytest.approx(others, rel=1e-5, abs=1e-6)


def test_references_are_looked_at_when_the_rollouts_are_set_up(prompts: Path) -> None:
    """Every other prompt here has one."""
    reward = ExactMatch(extract="whole", ignore_case=False).open({})
    with pytest.raises(DataError, match=r"^data error: reward=exact_match: prompt 0 \(from 0\) of heldout has no reference answer; give its row"):
        Rollouts(prompts, "heldout", reward, Sampling(4, 1.0))


def test_the_loss_of_ppo_by_loops(prompts: Path) -> None:
    start = likely_to_end(tiny_run.tiny_llama())
    options = {"whiten_advantages": False, "gamma": 0.9, "gae_lambda": 0.8, "kl_coef": 0.3}
    objective, model, batch = prepared("ppo", prompts, options=options)
    _, untrained = tiny_rl.parts("ppo", prompts)
    objective.reference = None  # the first rollout's KL is 0: policy and reference are the same
    answers, chosen = answers_of(objective.practice.rollout), objective.practice.schedule.minibatch(0).tolist()
    sums, tokens = {"policy/loss": 0.0, "value/loss": 0.0, "entropy": 0.0}, 0
    for index in chosen:
        prompt, answer = answers[index]
        score = size(answer) - (0.4 if answer[-1] else 0.0)
        with torch.no_grad():
            now, old = one_by_one(model.policy, prompt, answer), one_by_one(start, prompt, answer)
            before, after = (values_of(one.critic, prompt, answer) for one in (untrained, model))
            logits = model.policy(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        rewards = [0.0] * (len(answer) - 1) + [score]
        following = [*before[1:].tolist(), 0.0]
        delta = [reward + 0.9 * later - value for reward, later, value in zip(rewards, following, before.tolist(), strict=True)]
        advantages = torch.tensor([sum(0.72**later * delta[t + later] for later in range(len(delta) - t)) for t in range(len(delta))])
        ratio, returns = (now - old).exp(), advantages + before
        sums["policy/loss"] += float(-torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum())
        near = before + (after - before).clamp(-0.2, 0.2)
        sums["value/loss"] += float(0.5 * torch.maximum((after - returns) ** 2, (near - returns) ** 2).sum())
        sums["entropy"] += float(torch.distributions.Categorical(logits=logits).entropy().sum())
        tokens += len(answer)
    loss, metrics = total(objective, model, batch)
    means = {name: value / tokens for name, value in sums.items()}
    assert {name: metrics[name] for name in means} == pytest.approx(means, rel=1e-4)
    assert loss == pytest.approx(means["policy/loss"] + 0.5 * means["value/loss"] - 0.01 * means["entropy"], rel=1e-4)


def values_of(critic: Critic, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """transformers' own score of every prefix, which it gives for its last token."""
    prefixes = [prompt + answer[:length] for length in range(len(answer))]
    return torch.stack([critic.scorer(input_ids=torch.tensor([one])).logits[0, 0] for one in prefixes])


def test_what_lies_after_an_answer_means_nothing(prompts: Path) -> None:
    for kind in ("ppo", "grpo"):
        objective, model, batch = prepared(kind, prompts)
        before, _ = total(objective, model, batch)
        for one in batch.micro_batches:
            last = one["picked"].new_zeros(len(one["input_ids"]))  # each row's last answer token
            kept = len(one["keep"])
            last.scatter_reduce_(0, one["picked"] // kept, one["picked"] % kept + one["keep"][0] + 1, "amax")
            beyond = torch.arange(one["input_ids"].shape[1]) > last[:, None]
            assert beyond.any()
            one["input_ids"][beyond] = 33
        assert total(objective, model, batch)[0] == pytest.approx(before, rel=1e-6)


def test_held_out_prompts_before_and_after(prompts: Path) -> None:
    start, rollouts = likely_to_end(tiny_run.tiny_llama()), Rollouts(prompts, "heldout", Checked("share", tiny_rl.share), Sampling(9, TEMPERATURE))
    same, _ = compare(start, frozen(copy.deepcopy(start)), rollouts, 20, seed=2)
    assert same["heldout_reward_gain"] == same["heldout_reward_gain_standard_error"] == 0.0
    assert same["heldout_kl_per_token"] == pytest.approx(0.0, abs=1e-7)
    trained = copy.deepcopy(start)
    with torch.no_grad():
        trained.lm_head.bias[tiny_rl.WANTED] = 4.0
    found, answers = compare(trained, frozen(copy.deepcopy(start)), rollouts, 20, seed=2)
    before = rollouts.collect(start, torch.arange(20), seed=seed_of(2, "held out"))
    gain = answers.rewards - before.rewards
    assert found["heldout_reward_start"] == pytest.approx(float(before.rewards.mean())) == same["heldout_reward"]
    assert found["heldout_reward"] == pytest.approx(float(answers.rewards.mean()))
    assert found["heldout_reward_gain"] == pytest.approx(float(gain.mean()))
    assert found["heldout_reward_gain"] > 0.2
    assert found["heldout_reward_gain_standard_error"] == pytest.approx(float(gain.std()) / math.sqrt(20))
    kl, tokens = 0.0, 0
    for prompt, answer in answers_of(answers):
        with torch.no_grad():
            logits = [one(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE for one in (trained, start)]
        p, q = (torch.distributions.Categorical(logits=one) for one in logits)
        kl, tokens = kl + float(torch.distributions.kl_divergence(p, q).sum()), tokens + len(answer)
    assert found["heldout_kl_per_token"] == pytest.approx(kl / tokens, rel=1e-4)
    assert found["heldout_response_length"] == pytest.approx(tokens / 20)
    assert found["heldout_prompts"] == 20


@pytest.mark.parametrize("virtual", [0, 3])
def test_the_critic_is_the_reward_model_at_every_token(virtual: int) -> None:
    """Its value in a state is transformers' own score of the text so far, also under a soft prompt."""
    from peft import PromptTuningConfig, get_peft_model
    from transformers import LlamaForSequenceClassification

    config = tiny_run.tiny_llama().config
    config.num_labels = 1
    scorer = LlamaForSequenceClassification(config).eval()
    if virtual:
        scorer = get_peft_model(scorer, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=virtual)).eval()
    critic, ids = Critic(scorer, 0.0, 1.0), torch.randint(1, tiny_run.VOCABULARY, (1, 7))
    batch = {"input_ids": ids, "position_ids": torch.arange(7)[None], "keep": torch.arange(2, 7)}
    with torch.no_grad():
        expected = torch.cat([scorer(input_ids=ids[:, : end + 1]).logits[0] for end in range(2, 7)])
        torch.testing.assert_close(critic(batch), expected, rtol=1e-4, atol=1e-5)
    assert all(parameter.requires_grad for name, parameter in critic.named_parameters() if "score" in name.split("."))
