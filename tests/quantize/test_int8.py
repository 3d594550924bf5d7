from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lmforge.codec import decode, encode
from lmforge.errors import CheckpointError, ConfigError, RunError
from lmforge.inference.checkpoint import open_model
from lmforge.quantize.nodes import Int8, NoQuantize, Quantize
from lmforge.step import Context

BASE = {"type": "int8", "embeddings": True, "skip": [], "group_size": None}


def make(folder: Path, tied: bool, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.2, **shape))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] = 0  # a row of zeros must not divide by its scale
    model.to(dtype).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def run(source: Path, out: Path, **change: object) -> dict:
    out.mkdir(parents=True)
    node = decode(Quantize, BASE | change, "quantize")
    return node.run(Context(step="int8", folder=out.parent, out=out, inputs={"checkpoint": source}))


def rounded(weight: torch.Tensor, group: int | None = None) -> torch.Tensor:
    """The grid by its formula, in float64 and without the library."""
    grouped = weight.double().reshape(weight.shape[0], -1, group or weight.shape[1])
    scale = grouped.abs().amax(2, keepdim=True) / 127
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return ((grouped / scale).round() * scale).reshape(weight.shape)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("group", [None, 32])
def test_the_folder_reopens_as_the_rounded_model(tmp_path: Path, tied: bool, group: int | None) -> None:
    source = make(tmp_path / "source", tied)
    metrics = run(source, tmp_path / "q" / "out", group_size=group)
    model, reopened = open_model(source), open_model(tmp_path / "q" / "out")
    for (name, want), (_, got) in zip(model.named_parameters(), reopened.named_parameters(), strict=True):
        expected = want.double() if "norm" in name else rounded(want, group)
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-6, msg=name)
        assert "norm" in name or not torch.equal(got, want)
    assert metrics["params_total"] == sum(one.numel() for one in model.parameters())
    assert (tmp_path / "q" / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


@pytest.mark.parametrize("tied", [True, False])
def test_size_is_what_lies_on_the_disk(tmp_path: Path, tied: bool) -> None:
    source = make(tmp_path / "source", tied)
    metrics = run(source, tmp_path / "q" / "out")
    before, after = (folder.joinpath("model.safetensors").stat().st_size for folder in (source, tmp_path / "q" / "out"))
    assert (metrics["bytes_before"], metrics["bytes_after"]) == (before, after)
    assert metrics["size_ratio"] == after / before < 0.34  # 8 bits of 32, plus scales, norms and headers
    assert metrics["bits_per_parameter"] == pytest.approx(8 * after / metrics["params_total"])


def test_without_embeddings_plain_transformers_opens_it_and_the_tied_tensor_stays(tmp_path: Path) -> None:
    source = make(tmp_path / "source", tied=True)
    metrics = run(source, tmp_path / "q" / "out", embeddings=False)
    stored = load_file(tmp_path / "q" / "out" / "model.safetensors")
    assert torch.equal(stored["model.embed_tokens.weight"], load_file(source / "model.safetensors")["model.embed_tokens.weight"])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "q" / "out").eval()  # the default route, decompressed at the first forward
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, open_model(tmp_path / "q" / "out")(ids).logits, rtol=0, atol=1e-5)
    assert metrics["params_quantized"] == metrics["params_total"] - 256 * 64 - 5 * 64


def test_skip_keeps_layers_and_what_shares_their_tensor(tmp_path: Path) -> None:
    source = make(tmp_path / "source", tied=True)
    run(source, tmp_path / "q" / "out", skip=["lm_head", "*.down_proj"])
    stored = load_file(tmp_path / "q" / "out" / "model.safetensors")
    packed = {name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")}
    assert "model.embed_tokens" not in packed  # it is the tied lm_head
    assert not any("down_proj" in name for name in packed)
    assert "model.layers.1.mlp.up_proj" in packed


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    source = make(tmp_path / "source", tied=False, dtype=torch.bfloat16)
    metrics = run(source, tmp_path / "q" / "out")
    assert open_model(tmp_path / "q" / "out").dtype == torch.bfloat16
    assert 0.5 < metrics["size_ratio"] < 0.65


def test_gpt2_quantizes_what_it_has_of_linear_and_embedding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=32, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path / "source")
    metrics = run(tmp_path / "source", tmp_path / "q" / "out")
    assert metrics["params_quantized"] == 128 * 32 + 32 * 32  # wte (= lm_head) and wpe; its other layers are Conv1D


def test_the_worst_layer_is_the_one_with_an_outlier(tmp_path: Path) -> None:
    source = make(tmp_path / "source", tied=True)
    model = open_model(source)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[:, 5] = 40.0
    model.save_pretrained(source)
    worst = run(source, tmp_path / "q" / "out")["worst_layers"][0]
    weights = {name: one.detach().double() for name, one in model.named_parameters() if one.ndim == 2}
    errors = {name: float((rounded(one) - one).norm() / one.norm()) for name, one in weights.items()}
    assert worst["name"] + ".weight" == max(errors, key=errors.get)
    assert worst["relative_error"] == pytest.approx(max(errors.values()), rel=1e-3)


def test_refusals(tmp_path: Path) -> None:
    source = make(tmp_path / "source", tied=True)
    run(source, tmp_path / "once" / "out")
    with pytest.raises(CheckpointError, match="quantized already"):
        run(tmp_path / "once" / "out", tmp_path / "twice" / "out")
    with pytest.raises(RunError, match="48 does not divide"):
        run(source, tmp_path / "group" / "out", group_size=48)
    with pytest.raises(RunError, match="'nothing' matches no layer"):
        run(source, tmp_path / "skip" / "out", skip=["nothing"])
    with pytest.raises(RunError, match="no layer is left"):
        run(source, tmp_path / "all" / "out", skip=["*"])
    with pytest.raises(ConfigError, match="skip: has an empty pattern"):
        decode(Quantize, BASE | {"skip": [""]}, "quantize")
    with pytest.raises(ConfigError, match="group_size"):
        decode(Quantize, BASE | {"group_size": 0}, "quantize")


def test_none_is_no_step_and_values_survive_a_round_trip() -> None:
    assert isinstance(decode(Quantize, {"type": "none"}, "quantize"), NoQuantize)
    assert NoQuantize.produces == ""
    node = decode(Quantize, BASE | {"skip": ["lm_head"], "group_size": 32}, "quantize")
    assert decode(Quantize, json.loads(json.dumps(encode(node)))) == node == Int8(embeddings=True, skip=("lm_head",), group_size=32)
