"""Batched answers: against transformers' generate row by row, and against the distribution they say they are drawn from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from lmforge.inference.rollout import Answers, nucleus, rollout, uniforms

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


@pytest.mark.parametrize("soft", [False, True], ids=["plain", "soft prompt"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_several_answers_to_a_prompt_are_those_of_the_prompt_repeated(kind: str, soft: bool) -> None:
    from peft import PromptTuningConfig, get_peft_model

    model = model_of(kind)
    if soft:
        model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.3, "stop_ids": [4, 9, 30], "pad_id": PAD, "noise": uniforms(5, 15, 12), "top_p": 0.9}
    repeated = rollout(model, [one for one in prompts() for _ in range(3)], **options)
    for batch in (64, 7, 1):  # all at once, two prompts, one prompt although it has more answers
        found = rollout(model, prompts(), answers=3, batch=batch, **options)
        assert torch.equal(found.ids, repeated.ids)
        assert torch.equal(found.lengths, repeated.lengths)
        assert torch.equal(found.ended, repeated.ended)
        torch.testing.assert_close(found.logprobs, repeated.logprobs, rtol=0, atol=1e-4)


def test_own_logprobs_are_those_at_temperature_1_of_the_whole_distribution() -> None:
    model = model_of("llama").eval()
    drawn = sampled(model, prompts(), top_p=0.8)
    found = sampled(model, prompts(), top_p=0.8, own_logprobs=True)
    assert torch.equal(found.ids, drawn.ids)
    for row, (prompt, length) in enumerate(zip(prompts(), found.lengths.tolist(), strict=True)):
        answer = found.ids[row, :length]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *answer.tolist()]])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]
        torch.testing.assert_close(found.logprobs[row, :length], expected, rtol=0, atol=1e-5)
        assert not found.logprobs[row, length:].any()
        left = TopPLogitsWarper(0.8)(None, TemperatureLogitsWarper(1.3)(None, logits)).log_softmax(-1).gather(1, answer[:, None])[:, 0]
        torch.testing.assert_close(drawn.logprobs[row, :length], left, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8), (1.5, 0.3), (1.0, 1e-6)])
def test_what_is_drawn_from_is_what_transformers_warpers_leave(temperature: float, top_p: float) -> None:
    logits = 2 * torch.randn(50, VOCABULARY, generator=torch.Generator().manual_seed(3))
    wanted = TemperatureLogitsWarper(temperature)(None, logits)
    found = nucleus(wanted.log_softmax(-1), top_p)
    if top_p < 1:
        wanted = TopPLogitsWarper(top_p)(None, wanted)
    torch.testing.assert_close(found.exp(), wanted.softmax(-1), rtol=1e-5, atol=1e-6)
    assert torch.equal(found.isinf(), wanted.isinf())


def test_at_top_p_1_nothing_is_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("sorted")

    monkeypatch.setattr(torch.Tensor, "sort", refuse)
    sampled(model_of("llama"), prompts())
    with pytest.raises(AssertionError, match="sorted"):
        sampled(model_of("llama"), prompts(), top_p=0.9)


def test_refusals() -> None:
    model = model_of("llama")
    with pytest.raises(ValueError, match="empty prompt"):
        sampled(model, [[1], []])
    with pytest.raises(ValueError, match="needs noise"):
        rollout(model, [[1]], max_new_tokens=2, temperature=1.0, stop_ids=[], pad_id=PAD)
