"""A prompt computed once for both answers gives what two plain rows give, on every architecture it is used for; elsewhere it is not used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch

from lmforge.formats.tokens import Tokens
from lmforge.model import build
from lmforge.training import shared_prompt
from lmforge.training.objective import Batch
from lmforge.training.objectives.preference import PairRows, pair_logprobs
from lmforge.training.objectives.reward import pair_scores

SHAPE = {
    "vocab_size": tiny_run.VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "head_dim": 16, "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
GPT2 = {"vocab_size": tiny_run.VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "eos_token_id": 0, "bos_token_id": 0}


def network(model_type: str, **changes: Any) -> Any:
    """A tiny model whose weights are large enough for attention to matter."""
    model = build.from_scratch({"model_type": model_type, **(GPT2 if model_type == "gpt2" else SHAPE), **changes}, 0).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def pair_batch(folder: Path) -> Batch:
    """Pairs of uneven prompts and answers: long prompts, one without any, one whose answers begin alike."""
    generator = torch.Generator().manual_seed(0)
    ids, masks = [], []
    for prompt, chosen, rejected in ((15, 3, 6), (9, 1, 2), (12, 5, 5), (0, 3, 2), (14, 4, 4)):
        start = torch.randint(1, 60, (prompt,), generator=generator).tolist()
        for answer in (chosen, rejected):
            ids.append([*start, *([7, 8] if prompt == 14 else []), *torch.randint(1, 60, (answer,), generator=generator).tolist(), 0])
            masks.append([0] * prompt + [1] * (len(ids[-1]) - prompt))
    tiny_run.write_split(folder, "train", "preference", ids, masks, seq_len=32)
    rows = PairRows(Tokens(folder, "train"))
    return rows.batch(range(len(rows)))


def both(monkeypatch: pytest.MonkeyPatch, model: Any, batch: Batch, of: Any) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Values [pairs, 2] and the gradients of a sum in which each weighs differently: shared, and in plain rows."""
    found = []
    for worth, shared in ((9.0, True), (0.0, False)):
        monkeypatch.setattr(shared_prompt, "WORTH", worth)
        assert shared_prompt.shares(model, batch) is shared
        model.zero_grad()
        values = of(model, batch)
        (values * torch.linspace(-1, 1, values.numel()).view_as(values)).sum().backward()
        found.append((values.detach(), {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}))
    return found


def same(ours: tuple[torch.Tensor, dict[str, torch.Tensor]], theirs: tuple[torch.Tensor, dict[str, torch.Tensor]]) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name, one in ours[1].items():
        torch.testing.assert_close(one, theirs[1][name], rtol=1e-5, atol=1e-5 * max(1.0, float(theirs[1][name].abs().max())), msg=name)


@pytest.mark.parametrize("model_type", sorted(shared_prompt.EXACT))
def test_logprobs_and_gradients_are_those_of_plain_rows(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same(*both(monkeypatch, network(model_type), pair_batch(tmp_path), lambda model, batch: pair_logprobs(model, batch)[0]))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_kinds_of_attention(attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("llama")
    model.set_attn_implementation(attention)
    same(*both(monkeypatch, model, pair_batch(tmp_path), lambda model, batch: pair_logprobs(model, batch)[0]))


def test_recomputed_activations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("llama").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    same(*both(monkeypatch, model, pair_batch(tmp_path), lambda model, batch: pair_logprobs(model, batch)[0]))


def test_lora_shares_and_a_soft_prompt_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    batch = pair_batch(tmp_path)
    lora = get_peft_model(network("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_lora_weights=False)).eval()
    same(*both(monkeypatch, lora, batch, lambda model, batch: pair_logprobs(model, batch)[0]))
    monkeypatch.setattr(shared_prompt, "WORTH", 9.0)
    soft = get_peft_model(network("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    assert not shared_prompt.shares(soft, batch)
    tokens = Tokens(tmp_path, "train")
    with torch.no_grad():
        found = pair_logprobs(soft, batch)[0].flatten()
        for index, logp in enumerate(found):  # by PEFT itself, which labels the virtual tokens -100
            ids, mask = (torch.tensor(part.tolist())[None] for part in tokens.example(index))
            labels = ids.masked_fill(mask == 0, -100)
            labels[0, 0] = -100  # predicted from the soft prompt there, from nothing here
            assert float(logp) == pytest.approx(-float(soft(input_ids=ids, labels=labels).loss) * int((labels != -100).sum()), rel=1e-4)


def test_scores_of_a_reward_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same(*both(monkeypatch, tiny_run.tiny_reward_model(), pair_batch(tmp_path), pair_scores))


def test_scores_are_at_the_last_token_even_where_it_is_the_padding_token(tmp_path: Path) -> None:
    batch, model = pair_batch(tmp_path), tiny_run.tiny_reward_model().eval()
    tokens = Tokens(tmp_path, "train")
    with torch.no_grad():
        scores = pair_scores(model, batch).flatten()
        for index, score in enumerate(scores):
            ids = torch.tensor(tokens.example(index)[0].tolist())[None]
            hidden = model.model(input_ids=ids).last_hidden_state[0, -1]
            assert float(score) == pytest.approx(float(model.score(hidden)), abs=1e-5)


def test_counts_of_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, model = pair_batch(tmp_path), network("llama")
    tokens = Tokens(tmp_path, "train")
    for worth in (9.0, 0.0):
        monkeypatch.setattr(shared_prompt, "WORTH", worth)
        counts = pair_logprobs(model, batch)[1].flatten().tolist()
        assert counts == [int(tokens.example(index)[1][1:].sum()) for index in range(len(tokens))]


def test_a_short_window_a_stretched_rotation_and_other_architectures_get_plain_rows(tmp_path: Path) -> None:
    longest = int(pair_batch(tmp_path)["unshared"].shape[1])
    assert shared_prompt.exact(network("mistral", sliding_window=longest).config, longest)
    assert not shared_prompt.exact(network("mistral", sliding_window=longest - 1).config, longest)
    stretched = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert not shared_prompt.exact(network("llama", rope_parameters=stretched).config, longest)
    assert shared_prompt.exact(network("llama", rope_parameters={**stretched, "rope_type": "linear"}).config, longest)
    assert not shared_prompt.exact(network("gemma3_text", use_bidirectional_attention=True).config, longest)
    assert not shared_prompt.exact(network("opt", ffn_dim=48, word_embed_proj_dim=32).config, longest)


def test_a_window_shorter_than_the_row_would_not_be_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the comparison above can fail."""
    batch, model = pair_batch(tmp_path), network("mistral", sliding_window=4)
    monkeypatch.setattr(shared_prompt, "exact", lambda config, longest: True)
    shared, plain = both(monkeypatch, model, batch, lambda model, batch: pair_logprobs(model, batch)[0])
    assert float((shared[0] - plain[0]).abs().max()) > 1e-2


def test_sharing_is_used_where_it_saves(tmp_path: Path) -> None:
    model = network("llama")
    for prompt, shared in ((2, False), (30, True)):
        ids = [[1] * prompt + [2] * 9 + [0], [1] * prompt + [3] * 9 + [0]]
        tiny_run.write_split(tmp_path / str(prompt), "train", "preference", ids, [[0] * prompt + [1] * 10] * 2, seq_len=64)
        assert shared_prompt.shares(model, PairRows(Tokens(tmp_path / str(prompt), "train")).batch([0])) is shared
