"""Weights decide the model: what is typed beside them is either what they say, or refused with both values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmforge.errors import PlanError
from lmforge.plan import Plan

PlanOf = Callable[..., Plan]


@pytest.fixture
def words(rows: Path) -> tuple[str, ...]:
    return ("stage=sft", "data=text", f"data.path={rows}", "eval=none", "hardware=cpu")


@pytest.fixture
def folder(plan_of: PlanOf, words: tuple[str, ...], tmp_path: Path) -> Path:
    """What model=nano leaves: its config.json, as transformers writes one."""
    return config_json(tmp_path / "weights", plan_of("stage=pretrain", "model=nano", *words[1:]).experiment.model.config())


def config_json(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "5.23.0", "dtype": "bfloat16", "eos_token_id": 0}))
    return folder


def refusal(plan_of: PlanOf, *words: str) -> str:
    with pytest.raises(PlanError) as refused:
        plan_of(*words)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_key_typed_beside_weights_is_refused(plan_of: PlanOf, words: tuple[str, ...], folder: Path) -> None:
    start = f"stage.sft.init_from={folder}"
    said = refusal(plan_of, *words, start, "model=nano", "model.rope_theta=77")
    assert said.endswith("stage.sft.init_from: its config.json says rope_theta=10000.0, model.rope_theta says 77.0; leave model out, the weights decide")
    said = refusal(plan_of, *words, start, "model=nano", "model.max_position_embeddings=1024", "stage.sft.seq_len=64")
    assert "model.max_position_embeddings says 1024" in said
    said = refusal(plan_of, *words, start, "model=nano", "model.rope_theta=77", "model.rms_norm_eps=0.5")
    assert "(and 1 more of the model's keys)" in said
    assert "says model_type='llama', the model's is 'gpt2'" in refusal(plan_of, *words, start, "model=gpt3_175b", "stage.sft.seq_len=64")


def test_what_agrees_is_no_problem(plan_of: PlanOf, words: tuple[str, ...], folder: Path) -> None:
    start = f"stage.sft.init_from={folder}"
    typed, untyped = plan_of(*words, start, "model=nano"), plan_of(*words, start)
    assert typed.step("weights").digest == untyped.step("weights").digest
    assert plan_of(*words, "model=hf", f"model.pretrained={folder}").step("weights").digest == untyped.step("weights").digest


def test_a_later_stages_weights_are_named_as_such(plan_of: PlanOf, words: tuple[str, ...], folder: Path) -> None:
    said = refusal(plan_of, "stage=[pretrain,sft]", *words[1:], f"stage.sft.init_from={folder}", "model=nano", "model.rope_theta=77")
    assert "stage.sft.init_from: its config.json says rope_theta" in said


def test_named_weights_of_another_shape_are_refused(plan_of: PlanOf, words: tuple[str, ...], folder: Path) -> None:
    said = refusal(plan_of, *words, "model=7b", f"model.pretrained={folder}", "model.revision=null", "stage.sft.seq_len=64")
    assert "model.pretrained: its config.json says model_type='llama', the model's is 'olmo2'" in said
    assert f"type model=hf model.pretrained={folder}, the weights decide" in said
    said = refusal(plan_of, *words, "model=nano", "model.tokenizer=own", f"model.pretrained={folder}", "model.rope_theta=77")
    assert "model.pretrained: its config.json says rope_theta=10000.0, model.rope_theta says 77.0" in said


def test_the_shapes_of_olmo_2_agree_with_its_published_config(plan_of: PlanOf, words: tuple[str, ...], tmp_path: Path) -> None:
    """The config.json of allenai/OLMo-2-1124-7B, as transformers 4 wrote it."""
    published = {
        "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 100257, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "olmo2",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pad_token_id": 100277, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False, "torch_dtype": "float32", "use_cache": True, "vocab_size": 100352,
    }  # fmt: skip
    folder = config_json(tmp_path / "olmo", published)
    assert plan_of(*words, "model=7b", f"model.pretrained={folder}", "model.revision=null", until="validate").step("weights")


def test_a_pinned_hub_id_can_be_typed(plan_of: PlanOf, words: tuple[str, ...], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--org--small" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    plans = [
        plan_of(*words, f"stage.sft.init_from=org/small@{commit}"),
        plan_of(*words, "model=hf", f"model.pretrained=org/small@{commit}"),
        plan_of(*words, "model=hf", "model.pretrained=org/small", f"model.revision={commit}"),
    ]
    assert {plan.step("weights").spec.fingerprint for plan in plans} == {f"org/small@{commit}"}  # type: ignore[attr-defined]
    assert len({plan.step("sft").digest for plan in plans}) == 1
