"""Building, loading and saving against transformers' own from_pretrained: equal logits, or a refusal in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmforge.errors import CheckpointError, ConfigError
from lmforge.model.build import from_folder, from_scratch, on_meta, save

SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
LLAMA: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES, **ROPE, "tie_word_embeddings": True}
OLMO2: dict[str, Any] = {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], **SIZES, **ROPE}
GPT2: dict[str, Any] = {"model_type": "gpt2", "vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0}
QWEN3_MOE: dict[str, Any] = {"model_type": "qwen3_moe", **SIZES, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2} | {
    "moe_intermediate_size": 16
}

GEMMA2: dict[str, Any] = {"model_type": "gemma2", **SIZES, "num_key_value_heads": 2, "head_dim": 8}


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(40).view(2, 20)).logits


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def saved(tmp_path: Path, tokenizer_folder: Path) -> Path:
    out = tmp_path / "checkpoint"
    save(from_scratch(LLAMA, 0), tokenizer_folder, out)
    return out


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as refused:
        from_folder(folder)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_fresh_weights_depend_on_the_seed_and_on_nothing_else() -> None:
    torch.manual_seed(1)
    first = state(from_scratch(LLAMA, 7))
    torch.manual_seed(2)
    torch.rand(5)
    before = torch.get_rng_state()
    again = from_scratch(LLAMA, 7)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(first, state(again))
    assert not same(first, state(from_scratch(LLAMA, 8)))
    assert again.training
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert again.config._attn_implementation == "sdpa"


def test_the_config_given_is_left_as_it_was() -> None:
    before = json.dumps(LLAMA)
    from_scratch(LLAMA, 0)
    assert json.dumps(LLAMA) == before


def test_on_meta_has_shapes_and_no_memory() -> None:
    large = on_meta({**LLAMA, "hidden_size": 8192, "num_attention_heads": 64, "num_hidden_layers": 80, "intermediate_size": 28672})
    assert {p.device.type for p in large.parameters()} == {"meta"}
    assert sum(p.numel() for p in large.parameters()) > 6e10


@pytest.mark.parametrize("config", [LLAMA, OLMO2, GPT2, QWEN3_MOE, GEMMA2], ids=lambda config: config["model_type"])
def test_a_saved_model_is_the_same_for_transformers_and_for_us(config: dict[str, Any], tmp_path: Path, tokenizer_folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = from_scratch(config, 3)
    wanted = logits(model)
    save(model, tokenizer_folder, tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), wanted)
    ours = from_folder(tmp_path / "out")
    assert ours.training
    assert same(state(ours), state(model))
    assert torch.equal(logits(ours), wanted)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.encode("def f") == AutoTokenizer.from_pretrained(tokenizer_folder).encode("def f")
    assert tokenizer.chat_template


def test_rotary_base_survives_the_round_trip(saved: Path) -> None:
    assert from_folder(saved).config.rope_parameters["rope_theta"] == 500000.0


def test_special_ids_come_from_the_tokenizer(saved: Path, tokenizer_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config, generation = (json.loads((saved / name).read_text()) for name in ("config.json", "generation_config.json"))
    for name in ("bos_token_id", "pad_token_id"):
        assert config[name] == generation[name] == getattr(tokenizer, name)
    assert config["eos_token_id"] == tokenizer.eos_token_id
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert generation["eos_token_id"] == [tokenizer.eos_token_id, end]  # generation stops at the end of a turn too


def test_tokenizer_files_are_copied_byte_for_byte(saved: Path, tokenizer_folder: Path) -> None:
    for path in tokenizer_folder.iterdir():
        assert (saved / path.name).read_bytes() == path.read_bytes()


def test_a_checkpoint_serves_as_tokenizer_folder(saved: Path, tmp_path: Path) -> None:
    save(from_scratch(OLMO2, 0), saved, tmp_path / "next")
    assert json.loads((tmp_path / "next" / "config.json").read_text())["model_type"] == "olmo2"
    assert (tmp_path / "next" / "tokenizer.json").read_bytes() == (saved / "tokenizer.json").read_bytes()


def test_saving_replaces_a_folder_whole(saved: Path, tokenizer_folder: Path) -> None:
    (saved / "left-over").write_text("of an interrupted run")
    model = from_scratch(LLAMA, 9)
    save(model, tokenizer_folder, saved)
    assert not (saved / "left-over").exists()
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint"]
    assert same(state(from_folder(saved)), state(model))


def test_a_failed_save_leaves_what_was_there(saved: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = (saved / "model.safetensors").read_bytes()
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save(from_scratch(LLAMA, 9), tokenizer_folder, saved)
    assert (saved / "model.safetensors").read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint"]


def test_a_tokenizer_bigger_than_the_vocabulary_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="does not fit a model of 100"):
        save(from_scratch({**LLAMA, "vocab_size": 100}, 0), tokenizer_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_dtypes_are_asked_for(saved: Path) -> None:
    assert {p.dtype for p in from_folder(saved, torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("keep", [0, 4, 2000, -1])
def test_a_truncated_file_is_named(saved: Path, keep: int) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    said = refusal(saved)
    assert str(file) in said
    assert "truncated" in said


def test_weights_that_are_not_exactly_the_models_are_refused(saved: Path) -> None:
    file = saved / "model.safetensors"
    weights = load_file(file)
    save_file({name: w for name, w in weights.items() if "layers.1.mlp.up_proj" not in name}, file, {"format": "pt"})
    assert "missing keys: model.layers.1.mlp.up_proj.weight" in refusal(saved)
    save_file({**weights, "model.extra.weight": torch.zeros(2)}, file, {"format": "pt"})
    assert "unexpected keys: model.extra.weight" in refusal(saved)
    save_file({**weights, "model.norm.weight": torch.zeros(33)}, file, {"format": "pt"})
    assert str(saved) in refusal(saved)


def test_pickled_weights_are_never_loaded(saved: Path) -> None:
    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    assert "has no model.safetensors" in refusal(saved)


def test_an_unknown_or_impossible_config_is_refused() -> None:
    with pytest.raises(ConfigError, match="no causal language model of model_type 'phantom'"):
        from_scratch({"model_type": "phantom"}, 0)
    with pytest.raises(ConfigError, match="transformers refuses this config"):
        from_scratch({**LLAMA, "hidden_size": "wide"}, 0)
    with pytest.raises(ConfigError, match="transformers refuses this config"):
        on_meta({**LLAMA, "num_attention_heads": 5})


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({**GPT2, "n_head": 5}, "must be divisible by num_heads"),
        ({**LLAMA, "hidden_act": "tanhish"}, "tanhish"),
        ({**LLAMA, "pad_token_id": 999}, "num_embeddings"),
    ],
    ids=["heads", "activation", "padding"],
)
def test_what_the_models_own_class_refuses_is_one_line(config: dict[str, Any], says: str, saved: Path) -> None:
    with pytest.raises(ConfigError, match="transformers cannot build this config") as refused:
        from_scratch(config, 0)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
    (saved / "config.json").write_text(json.dumps(config))
    assert says in refusal(saved)


def test_loading_says_nothing(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    from_folder(saved)
    assert "".join(capfd.readouterr()) == ""
