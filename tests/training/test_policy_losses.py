"""PPO's parts against numbers worked out by hand and closed forms; GRPO's against TRL's own code on TRL's batch."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_run
import torch

from lmforge.training.losses import policy, tokens
from lmforge.training.rl.rollouts import Rollout
from lmforge.training.rl.tokens import layout, logprobs

MASK = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]])


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def test_logprobs_and_entropy_are_those_of_the_softened_distribution() -> None:
    logits = torch.tensor([[0.0, math.log(4.0)]])  # at temperature 2: odds 1 to 2
    assert policy.token_logprobs(logits, torch.tensor([1]), 2.0).item() == pytest.approx(math.log(2 / 3))
    assert policy.entropy(logits, 2.0).item() == pytest.approx(-(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3))
    logits, ids = draw(4, 7, 11), torch.randint(11, (4, 7))
    expected = torch.distributions.Categorical(logits=logits / 0.7)
    torch.testing.assert_close(policy.token_logprobs(logits, ids, 0.7), expected.log_prob(ids))
    torch.testing.assert_close(policy.entropy(logits, 0.7), expected.entropy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunks_of_logprobs_and_entropy_are_the_plain_forms(dtype: torch.dtype, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients, with chunks of two tokens of eleven logits; the logits are left as they were."""
    monkeypatch.setitem(tokens.CHUNK_BYTES, "cpu", 2 * 4 * 11)
    logits, ids, weights = draw(5, 11, scale=3.0).to(dtype).requires_grad_(), torch.randint(11, (5,)), draw(5, seed=2)
    before = logits.detach().clone()
    plain = (logits.float() / temperature).log_softmax(-1)
    expected = {"logprobs": plain.gather(1, ids[:, None])[:, 0], "entropy": -(plain.exp() * plain).sum(-1)}
    ours = {"logprobs": policy.token_logprobs(logits, ids, temperature), "entropy": policy.entropy(logits, temperature)}
    for name, one in ours.items():
        torch.testing.assert_close(one, expected[name], rtol=1e-6, atol=1e-6)
        gradient, wanted = (torch.autograd.grad((value * weights).sum(), logits, retain_graph=True)[0] for value in (one, expected[name]))
        assert gradient.dtype == dtype
        assert float(wanted.abs().max()) > 0.1
        torch.testing.assert_close(gradient, wanted, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6 if dtype == torch.float32 else 1e-3)
    torch.testing.assert_close(logits.detach(), before, rtol=0, atol=0)


def test_no_copy_of_all_logits_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved for the backward pass is the logits themselves, and one number a token."""
    logits, ids, kept = draw(40, 50).bfloat16().requires_grad_(), torch.randint(50, (40,)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        policy.token_logprobs(logits, ids, 0.7)
        policy.entropy(logits, 0.7)
    assert all(one.data_ptr() == logits.data_ptr() or one.numel() <= 40 for one in kept)


def test_kl_estimators_by_hand_and_in_expectation() -> None:
    logp, reference = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert policy.kl_estimate(logp, reference, "k1").item() == pytest.approx(math.log(2))  # -log(1/2)
    assert policy.kl_estimate(logp, reference, "k2").item() == pytest.approx(math.log(2) ** 2 / 2)
    assert policy.kl_estimate(logp, reference, "k3").item() == pytest.approx(0.5 - 1 + math.log(2))
    p, q = draw(9).log_softmax(-1), draw(9, seed=1).log_softmax(-1)
    exact = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q))
    for name in ("k1", "k3"):  # unbiased: the mean over the policy's own distribution is the KL
        torch.testing.assert_close((p.exp() * policy.kl_estimate(p, q, name)).sum(), exact)
    assert (policy.kl_estimate(p, q, "k3") >= 0).all()
    torch.testing.assert_close(policy.exact_kl(p * 0.7, q * 0.7, 0.7), exact)


def test_the_score_lands_on_the_last_token_and_the_kl_on_each() -> None:
    kl = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [1.0, -1.0, 9.0, 9.0, 9.0], [2.0, 9.0, 9.0, 9.0, 9.0]])
    rewards = policy.penalized_rewards(torch.tensor([10.0, 20.0, 30.0]), kl, MASK, 0.1)
    expected = [[-0.1, -0.2, -0.3, -0.4, 9.5], [-0.1, 20.1, 0.0, 0.0, 0.0], [29.8, 0.0, 0.0, 0.0, 0.0]]
    torch.testing.assert_close(rewards, torch.tensor(expected))


def test_whitening_looks_at_tokens_only() -> None:
    values = draw(3, 5) * 3 + 2
    inside = values[MASK.bool()]
    expected = (inside - inside.mean()) / (inside.var() + 1e-8).sqrt()
    torch.testing.assert_close(policy.whiten(values, MASK)[MASK.bool()], expected)
    torch.testing.assert_close(policy.whiten(values, MASK, shift_mean=False)[MASK.bool()], expected + inside.mean())
    assert not policy.whiten(values, MASK, shift_mean=False)[~MASK.bool()].any()


@pytest.mark.parametrize(("gamma", "lambda_"), [(1.0, 0.95), (0.9, 0.8), (0.99, 0.0), (1.0, 1.0)])
def test_gae_is_the_discounted_sum_of_deltas(gamma: float, lambda_: float) -> None:
    rewards, values = draw(3, 5), draw(3, 5, seed=1)
    advantages, returns = policy.gae(rewards, values, MASK, gamma=gamma, lambda_=lambda_)
    for row, length in enumerate(MASK.sum(1).int().tolist()):
        v = [*values[row, :length].tolist(), 0.0]
        delta = [float(rewards[row, t]) + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lambda_) ** later * delta[t + later] for later in range(length - t))
            assert float(advantages[row, t]) == pytest.approx(expected, abs=1e-6)
            assert float(returns[row, t]) == pytest.approx(expected + v[t], abs=1e-6)
    assert not advantages[~MASK.bool()].any()
    assert not returns[~MASK.bool()].any()


def test_gae_with_lambda_1_is_monte_carlo_and_with_0_one_step() -> None:
    rewards, values = draw(3, 5), draw(3, 5, seed=1)
    _, returns = policy.gae(rewards, values, MASK, gamma=0.9, lambda_=1.0)
    for row, length in enumerate(MASK.sum(1).int().tolist()):
        for t in range(length):  # the returns do not depend on the values
            expected = sum(0.9 ** (later - t) * float(rewards[row, later]) for later in range(t, length))
            assert float(returns[row, t]) == pytest.approx(expected, abs=1e-6)
    advantages, _ = policy.gae(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 0.25]]), torch.ones(1, 2), gamma=0.8, lambda_=0.0)
    torch.testing.assert_close(advantages, torch.tensor([[1 + 0.8 * 0.25 - 0.5, 2 - 0.25]]))


def test_the_surrogate_by_hand() -> None:
    """Ratios 2, 2, 1/2, 1/2, 1.1 with advantages +1, -1, +1, -1, +3, clipped to [0.8, 1.2]."""
    old = torch.tensor([0.1, 0.1, 0.4, 0.4, 0.2]).log()
    logps = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.22]).log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 3.0])
    parts = policy.policy_loss(logps, old, advantages, clip_low=0.2, clip_high=0.2)
    torch.testing.assert_close(parts.loss.detach(), torch.tensor([-1.2, 2.0, -0.5, 0.8, -3.3]))
    parts.loss.sum().backward()
    # The gradient of -ratio A by log p is -ratio A, and 0 where the clip holds.
    torch.testing.assert_close(logps.grad, torch.tensor([0.0, 2.0, -0.5, 0.0, -3.3]))
    assert parts.clipped.tolist() == [1, 0, 0, 1, 0]
    k3 = [ratio - 1 - math.log(ratio) for ratio in (2, 2, 0.5, 0.5, 1.1)]
    torch.testing.assert_close(parts.approx_kl, torch.tensor(k3))
    wider = policy.policy_loss(logps, old, advantages, clip_low=0.2, clip_high=0.28)
    torch.testing.assert_close(wider.loss.detach(), torch.tensor([-1.28, 2.0, -0.5, 0.8, -3.3]))  # clip-higher moves the first only


def test_the_value_loss_by_hand() -> None:
    """Values 1, 1, 3 (rollout's 0.5, 0.9, 0) with returns 0, 2, 1, clipped to 0.2 around the rollout's: 0.7, 1, 0.2."""
    values = torch.tensor([1.0, 1.0, 3.0], requires_grad=True)
    old, returns = torch.tensor([0.5, 0.9, 0.0]), torch.tensor([0.0, 2.0, 1.0])
    torch.testing.assert_close(policy.value_loss(values, old, returns, clip_range=None).detach(), torch.tensor([0.5, 0.5, 2.0]))
    loss = policy.value_loss(values, old, returns, clip_range=0.2)
    torch.testing.assert_close(loss.detach(), torch.tensor([max(1.0, 0.49) / 2, 0.5, max(4.0, 0.64) / 2]))
    other = policy.value_loss(torch.tensor([0.2]), torch.tensor([1.0]), torch.tensor([0.0]), clip_range=0.2)
    assert other.item() == pytest.approx(0.8**2 / 2)  # here the clipped one is the larger
    loss.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([1.0, -1.0, 2.0]))


def test_explained_variance() -> None:
    returns = draw(3, 5)
    inside = returns[MASK.bool()]
    assert policy.explained_variance(returns + 5, returns, MASK).item() == pytest.approx(1.0, abs=1e-6)
    assert policy.explained_variance(torch.full_like(returns, 0.3), returns, MASK).item() == pytest.approx(0.0, abs=1e-6)
    values = draw(3, 5, seed=1)
    expected = 1 - (inside - values[MASK.bool()]).var() / inside.var()
    assert policy.explained_variance(values, returns, MASK).item() == pytest.approx(expected.item(), abs=1e-5)
    assert policy.explained_variance(values, torch.ones(3, 5), MASK).item() == 0.0


def test_the_adaptive_controller_by_hand() -> None:
    adapted = {kl: policy.adapted_kl_coef(0.2, kl, target=6.0, horizon=10_000, answers=64) for kl in (6.6, 12.0, 6.0, 0.0)}
    assert adapted[6.6] == pytest.approx(0.2 * (1 + 0.1 * 64 / 10_000))
    assert adapted[12.0] == pytest.approx(0.2 * (1 + 0.2 * 64 / 10_000))  # the error is clipped to 20 %
    assert adapted[6.0] == 0.2
    assert adapted[0.0] == pytest.approx(0.2 * (1 - 0.2 * 64 / 10_000))


# GRPO against TRL


def trainer(loss_type: str, beta: float, model: Any, max_tokens: int) -> Any:
    """TRL's GRPOTrainer with what `_compute_loss` reads, and without its __init__, which wants data and a run."""
    from accelerate import Accelerator
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, temperature=0.9, outputs=("log_probs", "entropy"))
    one = GRPOTrainer.__new__(GRPOTrainer)
    one.args = GRPOConfig(output_dir="unused", report_to=[], bf16=False, use_cpu=True, steps_per_generation=1, per_device_train_batch_size=6, num_generations=3)
    one.model, one.accelerator = model, Accelerator(cpu=True)
    one.loss_type, one.beta, one.epsilon_low, one.epsilon_high, one.temperature = loss_type, beta, 0.2, 0.28, 0.9
    one.importance_sampling_level, one.top_entropy_quantile, one.off_policy_mask_threshold = "token", 1.0, None
    one.use_vllm = one.aux_loss_enabled = one._entropy_bonus_enabled = one.use_adaptive_entropy = False
    one.max_completion_length, one.current_gradient_accumulation_steps = max_tokens, 1
    one.model_kwarg_keys = {"logits_to_keep"}
    one._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    return one


def trl_batch() -> dict[str, Any]:
    """Six answers of at most 8 tokens to prompts of 5, padded on the left."""
    generator = torch.Generator().manual_seed(4)
    lengths = torch.tensor([8, 3, 1, 6, 8, 2])
    prompt_mask = torch.ones(6, 5, dtype=torch.long)
    prompt_mask[1, :2] = prompt_mask[4, :1] = 0
    return {
        "prompt_ids": torch.randint(1, tiny_run.VOCABULARY, (6, 5), generator=generator),
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(1, tiny_run.VOCABULARY, (6, 8), generator=generator),
        "completion_mask": (torch.arange(8) < lengths[:, None]).long(),
        "advantages": draw(6),
        "num_items_in_batch": lengths.sum().float(),
    }


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize(("beta", "unbiased"), [(0.0, False), (0.3, False), (0.3, True)])
def test_grpo_equals_trl_in_value_and_gradient(loss_type: Any, beta: float, unbiased: bool) -> None:
    model = tiny_run.tiny_llama(layers=1).train()
    theirs, batch = trainer(loss_type, beta, copy.deepcopy(model), 8), trl_batch()
    theirs.args.use_bias_correction_kl = unbiased  # TRL 1.16 has it on; the paper (Shao et al. 2024, eq. 4) does not know it
    ids, attention = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1), torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)

    with torch.no_grad():
        logps, _, _ = theirs._get_per_token_logps_and_entropies(theirs.model, ids, attention, 8)
    batch["old_per_token_logps"] = logps + draw(6, 8, seed=2, scale=0.3)  # ratios on both sides of the clip
    batch["ref_per_token_logps"] = logps + draw(6, 8, seed=3, scale=0.5)
    expected = theirs._compute_loss(theirs.model, batch)
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.model.named_parameters()}
    ours, clipped = own_loss(model, batch, loss_type, {"kl_coef": beta, "unbiased_kl": unbiased})
    ours.backward()
    assert ours.item() == pytest.approx(expected.item(), abs=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=1e-6)
    assert 0 < clipped == pytest.approx(theirs._metrics["train"]["clip_ratio/region_mean"][0])


def own_loss(model: Any, batch: dict[str, Any], loss_type: Any, kl: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """(loss, clip fraction) by our layout, padded on the right and flat, of TRL's batch."""
    mask, starts = batch["completion_mask"].float(), batch["prompt_mask"].sum(1)
    rows = [
        torch.cat([prompt[seen.bool()], answer])
        for prompt, seen, answer in zip(*(batch[name] for name in ("prompt_ids", "prompt_mask", "completion_ids")), strict=True)
    ]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    none = torch.zeros(6)
    rollout = Rollout(none.long(), input_ids, starts, mask.sum(1).long(), none.long(), none, {})
    beside = {"old": batch["old_per_token_logps"], "reference": batch["ref_per_token_logps"], "advantages": batch["advantages"][:, None].expand(6, 8)}
    flat = layout(rollout, torch.arange(6), {**beside, "weights": policy.token_weights(mask, loss_type, 8)}, 8)
    reference = flat["reference"] if kl["kl_coef"] else None
    parts = policy.grpo_loss(logprobs(model, flat, 0.9), flat["old"], reference, flat["advantages"], clip_low=0.2, clip_high=0.28, **kl)
    return (parts.loss * flat["weights"]).sum(), float(parts.clipped.mean())


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages_equal_trls(scale: Any) -> None:
    scores = torch.cat([draw(9), torch.full((3,), 0.5)])  # the last group has nothing to tell apart
    ours = policy.group_advantages(scores, 3, scale)
    torch.testing.assert_close(ours, trl_advantages(scores, 3, scale), rtol=0, atol=1e-6)
    assert not ours[9:].any()


def trl_advantages(scores: torch.Tensor, group: int, scale: str) -> torch.Tensor:
    """The lines of TRL's `_generate_and_score_completions` that turn rewards into advantages, as they stand in its source."""
    import inspect
    import textwrap

    import trl.trainer.grpo_trainer as source

    text = inspect.getsource(source.GRPOTrainer._generate_and_score_completions)
    start = text.index("            mean_grouped_rewards = ")
    end = text.index("is_std_zero", start)
    lines = textwrap.dedent(text[start:end])
    place = {**vars(source), "self": SimpleNamespace(scale_rewards=scale), "rewards": scores, "num_generations": group}
    exec(compile(lines, "grpo_trainer.py", "exec"), place)
    found: torch.Tensor = place["advantages"]
    return found


def test_how_tokens_are_averaged() -> None:
    losses = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [6.0, 8.0, 0.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0, 0.0]])
    means = {name: (losses * policy.token_weights(MASK, name, 5)).sum().item() for name in ("grpo", "dapo", "dr_grpo")}  # type: ignore[arg-type]
    assert means == pytest.approx({"grpo": (3 + 7 + 9) / 3, "dapo": 38 / 8, "dr_grpo": 38 / 15})
