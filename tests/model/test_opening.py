"""Models opened without their weights: what is read in parts is what is read whole, and what is refused is refused alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmforge.errors import CheckpointError, ConfigError
from lmforge.model import build, opening, writing
from lmforge.model.construct import configured
from tests.model.test_build import GEMMA2, GPT2, LLAMA, OLMO2, QWEN3_MOE, logits, same, state

CONFIGS = [LLAMA, OLMO2, GPT2, QWEN3_MOE, GEMMA2]
BIAS = {"model_type": "qwen2", **{key: LLAMA[key] for key in LLAMA if key not in ("model_type", "architectures")}, "tie_word_embeddings": False}


def kinds(config: dict[str, Any]) -> str:
    return str(config["model_type"])


def saved(config: dict[str, Any], folder: Path, tokenizer: Path, dtype: torch.dtype = torch.float32, size: str = "20KB") -> Path:
    """A folder of several files."""
    build.save(build.from_scratch(config, 3).to(dtype), tokenizer, folder)
    model = build.from_folder(folder, dtype)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size=size)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def quarter(shape: torch.Size) -> tuple[slice, ...]:
    """A part that is no tensor's first rows alone."""
    return tuple(slice(size // 4, size // 2 + 1) for size in shape)


def refusals(folder: Path, **scores: bool) -> tuple[str, str]:
    with pytest.raises(CheckpointError) as unread:
        opening.from_folder(folder, **scores)
    with pytest.raises(CheckpointError) as whole:
        (build.scorer_from_folder if scores else build.from_folder)(folder)
    return str(unread.value), str(whole.value)


@pytest.mark.parametrize("text", ["{", '{"max_new_tokens": -3}'])
def test_a_generation_config_that_is_none_is_a_line(text: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = saved(CONFIGS[0], tmp_path / "model", tokenizer_folder, torch.float32)
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        opening.from_folder(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=kinds)
def test_a_folder_is_read_in_parts_as_it_is_whole(config: dict[str, Any], dtype: torch.dtype, tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = saved(config, tmp_path / "model", tokenizer_folder, dtype)
    whole, unread = build.from_folder(folder), opening.from_folder(folder)
    assert unread is not None
    assert {one.device.type for one in unread.model.parameters()} == {"meta"}
    assert {one.device.type for one in unread.model.buffers()} <= {"cpu"}
    for name, value in whole.named_parameters():
        assert torch.equal(unread.parts[name](quarter(value.shape)).float(), value[quarter(value.shape)]), name
    assert unread.model.generation_config.to_dict() == whole.generation_config.to_dict()
    read = unread.read()
    assert same(state(read), state(whole))
    assert read.training
    assert torch.equal(logits(read), logits(whole))


def test_a_causal_model_is_read_as_a_scorer_with_a_head_of_zeros(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = saved(OLMO2, tmp_path / "model", tokenizer_folder)
    whole, unread = build.scorer_from_folder(folder), opening.from_folder(folder, scores=True)
    assert unread is not None
    assert same(state(unread.read()), state(whole))
    torch.nn.init.ones_(whole.score.weight)
    build.save(whole, tokenizer_folder, tmp_path / "scorer")
    again = opening.from_folder(tmp_path / "scorer", scores=True)
    assert again is not None
    assert same(state(again.read()), state(whole))


@pytest.mark.parametrize("config", [LLAMA, QWEN3_MOE], ids=kinds)
def test_what_does_not_fit_is_refused_as_it_is_whole(config: dict[str, Any], tmp_path: Path, tokenizer_folder: Path) -> None:
    build.save(build.from_scratch(config, 3), tokenizer_folder, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    save_file({name: value for name, value in weights.items() if "layers.1.self_attn.k_proj" not in name}, file, {"format": "pt"})
    unread, whole = refusals(tmp_path / "model")
    assert unread == whole
    assert "missing keys: model.layers.1.self_attn.k_proj.weight" in unread
    save_file({**weights, "model.extra.weight": torch.zeros(2)}, file, {"format": "pt"})
    unread, whole = refusals(tmp_path / "model")
    assert unread == whole
    assert "unexpected keys: model.extra.weight" in unread
    save_file({**weights, "model.norm.weight": torch.zeros(33)}, file, {"format": "pt"})
    assert "mismatched keys: model.norm.weight" in refusals(tmp_path / "model")[0]
    file.write_bytes(file.read_bytes()[:-100])
    unread, whole = refusals(tmp_path / "model")
    assert unread == whole
    assert "truncated" in unread


def test_experts_that_are_not_all_there_are_refused_when_they_are_read(tmp_path: Path, tokenizer_folder: Path) -> None:
    build.save(build.from_scratch(QWEN3_MOE, 3), tokenizer_folder, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    save_file({name: value for name, value in weights.items() if "layers.1.mlp.experts.2.up_proj" not in name}, file, {"format": "pt"})
    unread = opening.from_folder(tmp_path / "model")
    assert unread is not None
    with pytest.raises(CheckpointError, match=r"do not make model\.layers\.1\.mlp.experts.gate_up_proj"):
        unread.read()


def test_what_transformers_opens_in_its_own_way_is_left_to_it(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Weights that the config ties and the files have apart; the same ones twice are no such thing."""
    build.save(build.from_scratch(LLAMA, 3), tokenizer_folder, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    assert opening.from_folder(tmp_path / "model") is not None
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"] + 1}, file, {"format": "pt"})
    assert opening.from_folder(tmp_path / "model") is None
    save_file({"lm_head.weight" if name == "model.embed_tokens.weight" else name: value for name, value in weights.items()}, file, {"format": "pt"})
    alias = opening.from_folder(tmp_path / "model")
    assert alias is not None
    assert same(state(alias.read()), state(build.from_folder(tmp_path / "model")))


@torch.no_grad()
@pytest.mark.parametrize("config", [*CONFIGS, BIAS], ids=kinds)
def test_fresh_weights_are_distributed_as_transformers_draws_them(config: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    wide = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3} if "hidden_size" in config else {"n_embd": 96, "n_layer": 3}
    ours: Any = build.from_scratch({**config, **wide}, 0)
    theirs = AutoModelForCausalLM.from_config(configured({**config, **wide}))
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        constant = float(other.std()) == 0 if other.numel() > 1 else True
        assert torch.equal(mine, other) if constant else float(mine.std()) == pytest.approx(float(other.std()), rel=12 / mine.numel() ** 0.5), name
        assert abs(float(mine.mean() - other.mean())) < 8 * float(other.std(correction=0)) / mine.numel() ** 0.5 + 1e-9, name
    assert all(torch.equal(one, other) for one, other in zip(ours.buffers(), theirs.buffers(), strict=True))
    drawn = [one.flatten()[:200] for one in ours.parameters() if one.ndim > 1]
    assert all(abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.5 for one in drawn for other in drawn if one is not other)
    assert config["model_type"] != "gpt2" or float(ours.transformer.h[0].mlp.c_proj.weight.std()) == pytest.approx(0.02 / 6**0.5, rel=0.05)


def test_a_part_of_a_fresh_model_is_drawn_as_the_whole_is() -> None:
    whole, unread = build.from_scratch(GPT2, 5), opening.from_scratch(GPT2, 5)
    before = torch.get_rng_state()
    for name, value in reversed(list(whole.named_parameters())):
        assert torch.equal(unread.parts[name](quarter(value.shape)), value[quarter(value.shape)]), name
    assert torch.equal(torch.get_rng_state(), before)
    assert {one.device.type for one in unread.model.parameters()} == {"meta"}


def test_a_weight_that_transformers_does_not_begin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

    monkeypatch.setattr(LlamaPreTrainedModel, "_init_weights", lambda self, module: None)
    with pytest.raises(ConfigError, match=r"does not say what model\.rotary_emb.inv_freq of a llama begins with"):
        build.from_scratch(LLAMA, 0)


@pytest.mark.parametrize("config", CONFIGS, ids=kinds)
def test_a_probe_has_two_layers_and_runs(config: dict[str, Any]) -> None:
    deep = {**config, "n_layer" if "n_layer" in config else "num_hidden_layers": 5}
    found = opening.probe(deep, 0)
    assert found.config.num_hidden_layers == 2
    assert logits(found).shape == (2, 20, 300)


@pytest.mark.parametrize("config", CONFIGS, ids=kinds)
def test_a_model_written_in_turn_is_the_folder_that_is_saved_whole(config: dict[str, Any], tmp_path: Path, tokenizer_folder: Path) -> None:
    whole = build.from_scratch(config, 3)
    named = dict(whole.named_parameters(remove_duplicate=False))
    asked: list[int] = []

    def read(names: Any) -> dict[str, torch.Tensor]:
        asked.append(sum(named[name].nbytes for name in names))
        return {name: named[name].detach().clone() for name in names}

    build.save(whole, tokenizer_folder, tmp_path / "whole")
    writing.save(opening.from_scratch(config, 3).model, read, tokenizer_folder, tmp_path / "turns", first=True, file_bytes=30_000)
    files = {path.name for path in (tmp_path / "turns").iterdir()}
    assert {name for name in files if "safetensors" not in name} == {path.name for path in (tmp_path / "whole").iterdir() if "safetensors" not in path.name}
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "turns" / name).read_text()) == json.loads((tmp_path / "whole" / name).read_text())
    assert same(state(build.from_folder(tmp_path / "turns")), state(whole))
    assert len(asked) > 2
    assert max(asked) < sum(asked) / 1.5
    writing.save(opening.from_scratch(config, 3).model, lambda names: {}, tokenizer_folder, tmp_path / "nothing", first=False)
    assert not (tmp_path / "nothing").exists()
