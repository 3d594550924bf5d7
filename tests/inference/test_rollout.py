"""Batched answers: against transformers' generate row by row, and against the distribution they say they are drawn from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmforge.inference.rollout import Answers, rollout, uniforms

VOCABULARY, PAD = 53, 0
LENGTHS = (3, 9, 1, 6, 5)


def model_of(kind: str) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=2, attn_pdrop=0.5, initializer_range=0.3, bos_token_id=0, eos_token_id=0
            )
        )
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, initializer_range=0.3, **shape))


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


def sampled(model: Any, asked: list[list[int]], seed: int = 5, **changes: Any) -> Answers:
    options = {"max_new_tokens": 12, "temperature": 1.3, "stop_ids": [4, 9, 30], "pad_id": PAD, **changes}
    return rollout(model, asked, noise=uniforms(seed, len(asked), options["max_new_tokens"]), **options)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_greedy_equals_transformers_generate_row_by_row(kind: str) -> None:
    model = model_of(kind).eval()
    ids = [model.generate(torch.tensor([one]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=PAD)[0, len(one) :] for one in prompts()]
    stops = {int(ids[0][3]), int(ids[3][0])}  # so that two answers end early, one with its first token
    found = rollout(model, prompts(), max_new_tokens=12, temperature=0.0, stop_ids=stops, pad_id=PAD)
    for row, prompt in enumerate(prompts()):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=sorted(stops), pad_token_id=PAD)[0, len(prompt) :]
        assert found.ids[row, : found.lengths[row]].tolist() == expected.tolist()
        assert bool(found.ended[row]) == (int(expected[-1]) in stops)
    assert found.lengths[3] == 1 < found.lengths[0] <= 4 < found.lengths.max()


def test_logprobs_are_those_of_a_plain_forward_on_the_whole() -> None:
    model = model_of("llama")
    found = sampled(model, prompts())
    assert model.training  # as it was
    lengths = found.lengths.tolist()
    assert min(lengths) < max(lengths)
    for row, (prompt, length) in enumerate(zip(prompts(), lengths, strict=True)):
        answer = found.ids[row, :length]
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([[*prompt, *answer.tolist()]])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / 1.3).log_softmax(-1).gather(1, answer[:, None])[:, 0]
        torch.testing.assert_close(found.logprobs[row, :length], expected, rtol=0, atol=1e-5)
        assert not found.logprobs[row, length:].any()
        assert found.ids[row, length:].eq(PAD).all()
        assert bool(found.ended[row]) == (int(answer[-1]) in (4, 9, 30))
        assert not {4, 9, 30} & set(answer[:-1].tolist())


def test_what_is_drawn_depends_on_the_seed_and_the_place_alone() -> None:
    model, asked = model_of("llama").eval(), prompts()
    whole = sampled(model, asked)
    for name in ("ids", "lengths", "ended", "logprobs"):
        torch.testing.assert_close(getattr(sampled(model, asked), name), getattr(whole, name), rtol=0, atol=0)
    assert torch.equal(sampled(model, asked, batch=2).ids, whole.ids)
    part = rollout(model, asked[1:3], max_new_tokens=12, temperature=1.3, stop_ids=[4, 9, 30], pad_id=PAD, noise=uniforms(5, 5, 12)[1:3])
    assert torch.equal(part.ids, whole.ids[1:3])
    assert not torch.equal(sampled(model, asked, seed=6).ids, whole.ids)


def test_tokens_come_as_often_as_the_model_says() -> None:
    """Pearson's chi-square of 20,000 first tokens, beyond which one in 10,000 runs of a right sampler would lie; every token may come."""
    from scipy.stats import chi2

    model = model_of("llama").eval()
    found = rollout(model, [[3, 1, 4]] * 20_000, max_new_tokens=1, temperature=2.0, stop_ids=[], pad_id=PAD, noise=uniforms(0, 20_000, 1), batch=20_000)
    with torch.no_grad():
        expected = 20_000 * (model(input_ids=torch.tensor([[3, 1, 4]])).logits[0, -1] / 2.0).softmax(-1)
    counts = found.ids[:, 0].bincount(minlength=VOCABULARY)
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert statistic < chi2.ppf(1 - 1e-4, VOCABULARY - 1)


def test_a_soft_prompt_stands_before_the_answer_once() -> None:
    """PEFT's own forward over prompt and answer gives the probabilities that the loop drew from."""
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(model_of("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    found = sampled(model, prompts())
    for row, prompt in enumerate(prompts()):
        answer = found.ids[row, : found.lengths[row]]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *answer.tolist()]])).logits[0, 3 + len(prompt) - 1 : -1]
        expected = (logits / 1.3).log_softmax(-1).gather(1, answer[:, None])[:, 0]
        torch.testing.assert_close(found.logprobs[row, : len(answer)], expected, rtol=0, atol=1e-5)
    plain = sampled(model.get_base_model(), prompts())
    assert not torch.equal(plain.ids, found.ids)  # it does something


def test_refusals() -> None:
    model = model_of("llama")
    with pytest.raises(ValueError, match="empty prompt"):
        sampled(model, [[1], []])
    with pytest.raises(ValueError, match="needs noise"):
        rollout(model, [[1]], max_new_tokens=2, temperature=1.0, stop_ids=[], pad_id=PAD)
