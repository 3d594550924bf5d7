"""An adapter folder: PEFT opens it, we open PEFT's, and it goes onto no base but its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmforge.errors import CheckpointError
from lmforge.inference.adapters import open_adapter
from lmforge.inference.base import identify, read_base
from lmforge.inference.checkpoint import open_model, open_tokenizer
from lmforge.inference.forward import logits
from lmforge.model import build
from tests.adapter import tiny

GIVEN = tiny.batch(vocabulary=300)
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("lora", {}),
    ("lora", {"rslora": True, "target_modules": ["q_proj", "lm_head"]}),
    ("lora", {"init": "pissa", "r": 4}),
    ("lora", {"init": "pissa", "r": 4, "rslora": True}),
    ("dora", {}),
    ("qlora", {}),
    ("prompt_tuning", {"virtual_tokens": 5}),
]


@torch.no_grad()
def says(model: Any) -> torch.Tensor:
    return logits(model, GIVEN)


def saved(base: Path, tokenizer: Path, out: Path, name: str = "lora", **keys: Any) -> tuple[Path, torch.Tensor]:
    """An adapter folder of something learned, and the logits it means."""
    node = tiny.adapter(name, **keys)
    attached = tiny.learn(node.attach(build.from_folder(base).eval()))
    node.save(attached, tokenizer, out, base)
    return out, says(attached)


@pytest.mark.parametrize(("name", "keys"), KINDS)
def test_it_opens_as_what_was_saved(base: Path, tokenizer: Path, tmp_path: Path, name: str, keys: dict[str, Any]) -> None:
    folder, expected = saved(base, tokenizer, tmp_path / "adapter", name, **keys)
    opened = tiny.adapter(name, **keys).open(open_model(base), folder)
    assert (says(opened) - expected).abs().max() < 2e-5
    assert not opened.training
    assert not any(one.requires_grad for one in opened.parameters())
    assert open_tokenizer(folder).chat_template == tiny.TEMPLATE
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("name", "keys"), [one for one in KINDS if one[0] != "qlora"])
def test_peft_opens_it(base: Path, tokenizer: Path, tmp_path: Path, name: str, keys: dict[str, Any]) -> None:
    """As a PEFT user does, who knows nothing of base.json."""
    from peft import AutoPeftModelForCausalLM

    folder, expected = saved(base, tokenizer, tmp_path / "adapter", name, **keys)
    opened = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    assert (says(opened) - expected).abs().max() < 2e-5


def test_qlora_is_a_lora_on_transformers_base_in_4_bits(base: Path, tokenizer: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder, expected = saved(base, tokenizer, tmp_path / "adapter", "qlora")
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
    model: Any = AutoModelForCausalLM.from_pretrained(base, quantization_config=bits, dtype=torch.float32)
    for layer in model.modules():
        layer.support_avx512bf16_for_cpu = False
    assert (says(PeftModel.from_pretrained(model, folder).eval()) - expected).abs().max() < 2e-5
    rounded = open_adapter(open_model(base), folder, dense=True)
    assert (says(rounded) - expected).abs().max() < 2e-5
    assert not any(type(layer).__name__ == "Linear4bit" for layer in rounded.modules())


def test_one_adapter_for_another_on_the_same_base(base: Path, tokenizer: Path, tmp_path: Path) -> None:
    one, first = saved(base, tokenizer, tmp_path / "one")
    two, second = saved(base, tokenizer, tmp_path / "two", "dora")
    assert (first - second).abs().max() > 0.1
    assert (says(open_adapter(open_model(base), one)) - first).abs().max() < 2e-5
    assert (says(open_adapter(open_model(base), two)) - second).abs().max() < 2e-5


def test_an_adapter_from_elsewhere_opens(base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 4}, task_type="CAUSAL_LM")
    theirs = tiny.learn(get_peft_model(build.from_folder(base).eval(), config))
    expected = says(theirs)
    theirs.save_pretrained(tmp_path)
    assert read_base(tmp_path) is None
    assert (says(open_adapter(open_model(base), tmp_path)) - expected).abs().max() < 2e-5


def test_pefts_own_pissa_opens(base: Path, tmp_path: Path) -> None:
    """Saved by PEFT it belongs to what is left of the base, which opening has to work out again."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    theirs = tiny.learn(get_peft_model(build.from_folder(base).eval(), config))
    expected = says(theirs)
    theirs.save_pretrained(tmp_path)
    assert (says(open_adapter(open_model(base), tmp_path)) - expected).abs().max() < 2e-5


def test_base_json_says_what_it_was_trained_on(base: Path, tokenizer: Path, tmp_path: Path) -> None:
    folder, _ = saved(base, tokenizer, tmp_path / "adapter", "qlora", quant_type="fp4")
    said = json.loads((folder / "base.json").read_text())
    assert (said["fingerprint"], said["architecture"]) == identify(base)
    assert said["four_bit"] == {"quant_type": "fp4", "double_quant": True}


@pytest.mark.parametrize(
    ("other", "differs"),
    [({"seed": 1}, "was trained on another base: "), ({"num_hidden_layers": 3}, "other names, shapes or dtypes")],
)
@pytest.mark.parametrize("name", ["lora", "prompt_tuning"])
def test_another_base_is_refused_in_one_line(base: Path, tokenizer: Path, tmp_path: Path, name: str, other: dict[str, Any], differs: str) -> None:
    folder, _ = saved(base, tokenizer, tmp_path / "adapter", name)
    wrong = tiny.checkpoint_folder(tmp_path / "other", tokenizer, **other)
    with pytest.raises(CheckpointError, match="was trained on another base") as caught:
        tiny.adapter(name).open(open_model(wrong), folder)
    assert differs in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_base_from_no_folder_cannot_be_compared(base: Path, tokenizer: Path, tmp_path: Path) -> None:
    folder, _ = saved(base, tokenizer, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="cannot be compared with its base"):
        open_adapter(build.from_scratch(tiny.LLAMA, 0), folder)


def spoiled(folder: Path, kind: str) -> None:
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    said = json.loads(config.read_text())
    if kind == "no config":
        config.unlink()
    elif kind == "config cut":
        config.write_text(config.read_text()[:40])
    elif kind == "pickled":
        torch.save(load_file(weights), folder / "adapter_model.bin")
        weights.unlink()
    elif kind == "weights cut":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif kind == "a tensor missing":
        save_file(dict(list(load_file(weights).items())[1:]), weights)
    elif kind == "a tensor too many":
        save_file({**load_file(weights), "base_model.model.other.lora_A.weight": torch.zeros(2)}, weights)
    elif kind == "another rank":
        config.write_text(json.dumps(said | {"r": 3}))
    elif kind == "a module to import":
        config.write_text(json.dumps(said | {"megatron_config": {"a": 1}, "megatron_core": "antigravity"}))
    elif kind == "unknown kind":
        config.write_text(json.dumps(said | {"peft_type": "IA3"}))
    elif kind == "base.json cut":
        (folder / "base.json").write_text("{")


BROKEN = {
    "no config": "it has no adapter_config.json",
    "config cut": "cannot be read",
    "pickled": "has no adapter_model.safetensors",
    "weights cut": "truncated",
    "a tensor missing": "is in one of them only",
    "a tensor too many": "is in one of them only",
    "another rank": "does not fit the model",
    "a module to import": "sets megatron_co",
    "unknown kind": "is a PEFT adapter of type IA3",
    "base.json cut": "cannot be read",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_folder_is_refused_in_one_line(base: Path, tokenizer: Path, tmp_path: Path, kind: str) -> None:
    folder, _ = saved(base, tokenizer, tmp_path / "adapter")
    spoiled(folder, kind)
    with pytest.raises(CheckpointError, match=BROKEN[kind]) as caught:
        open_adapter(open_model(base), folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"target_modules": "(a+)+b"},
        {"target_modules": ["q_proj", ".*"]},
        {"target_modules": {"q_proj|v_proj": 1}},
        {"target_modules": ["q_proj", 3]},
        {"exclude_modules": "[qv]_proj"},
        {"modules_to_save": ["lm_head$"]},
        {"layers_pattern": "(layers|h)", "layers_to_transform": [0]},
        {"rank_pattern": {"(.*)*v_proj": 4}},
        {"alpha_pattern": {"^v_proj": 4}},
    ],
)
def test_regular_expressions_of_a_file_are_not_run(base: Path, tokenizer: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    folder, _ = saved(base, tokenizer, tmp_path / "adapter")
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | keys))
    with pytest.raises(CheckpointError, match=f"{next(iter(keys))} has .*, which is no plain name of a module") as caught:
        open_adapter(open_model(base), folder)
    assert "\n" not in str(caught.value)


def test_all_linear_of_an_adapter_from_elsewhere_is_taken(base: Path, tokenizer: Path, tmp_path: Path) -> None:
    folder, expected = saved(base, tokenizer, tmp_path / "adapter", target_modules="all-linear")
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"target_modules": "all-linear"}))
    assert (says(open_adapter(open_model(base), folder)) - expected).abs().max() < 2e-5


def test_a_folder_is_replaced_whole(base: Path, tokenizer: Path, tmp_path: Path) -> None:
    folder, _ = saved(base, tokenizer, tmp_path / "adapter")
    (folder / "left_over").write_text("")
    saved(base, tokenizer, tmp_path / "adapter", "dora")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "base.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert not {"left_over", "README.md"} & names


def test_a_copy_of_the_base_is_the_base(base: Path, tokenizer: Path, tmp_path: Path) -> None:
    folder, expected = saved(base, tokenizer, tmp_path / "adapter")
    copy = shutil.copytree(base, tmp_path / "copy")
    assert (says(open_adapter(open_model(copy), folder)) - expected).abs().max() < 2e-5
