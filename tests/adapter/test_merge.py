"""The merge step: a folder that any tool opens, with the output of base and adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lmforge.adapter.nodes import Merge
from lmforge.errors import CheckpointError
from lmforge.inference.checkpoint import open_model, open_tokenizer
from lmforge.inference.forward import logits
from lmforge.model import build, opening
from lmforge.model.parts import replace
from lmforge.step import Context
from tests.adapter import tiny

GIVEN = tiny.batch(vocabulary=300)


@torch.no_grad()
def says(model: Any) -> torch.Tensor:
    return logits(model, GIVEN).float()


def trained(base: Path, tokenizer: Path, out: Path, name: str, **keys: Any) -> torch.Tensor:
    """Save an adapter that learned something; the logits it means."""
    node = tiny.adapter(name, **keys)
    attached = tiny.learn(node.attach(build.from_folder(base).eval()))
    node.save(attached, tokenizer, out, base)
    return says(attached)


def merge(base: Path, adapter: Path, folder: Path) -> dict[str, Any]:
    out = folder / "checkpoint"
    out.mkdir(parents=True)  # the runner makes it
    return Merge().run(Context(step="sft.merge", folder=folder, out=out, inputs={"checkpoint": base, "adapter": adapter}))


@pytest.mark.parametrize(("name", "keys"), [("lora", {}), ("lora", {"init": "pissa", "r": 4}), ("dora", {}), ("qlora", {}), ("qlora", {"double_quant": False})])
def test_merged_is_unmerged(base: Path, tokenizer: Path, tmp_path: Path, name: str, keys: dict[str, Any]) -> None:
    expected = trained(base, tokenizer, tmp_path / "adapter", name, **keys)
    metrics = merge(base, tmp_path / "adapter", tmp_path / "step")
    assert metrics["merged"] is True
    out = tmp_path / "step" / "checkpoint"
    assert (says(open_model(out)) - expected).abs().max() < 2e-5
    assert (says(build.from_folder(out).eval()) - expected).abs().max() < 2e-5  # no tensor missing or left over
    assert sorted(path.name for path in (tmp_path / "step").iterdir()) == ["checkpoint"]
    assert not (out / "base.json").exists()


@pytest.mark.parametrize("config", [{**config, **tiny.IDS} for config in tiny.FAMILIES], ids=lambda config: config["model_type"])
def test_a_base_without_memory_is_merged_a_weight_at_a_time(config: dict[str, Any]) -> None:
    node = tiny.adapter("lora", r=4)
    whole = tiny.learn(node.attach(build.from_scratch(config, 0), 1))
    bones = opening.from_scratch(config, 0).under(lambda base: node.attach(base, 1)).model
    learned = {name: value.detach().clone() for name, value in whole.named_parameters()}
    replace(bones, {one: torch.nn.Parameter(learned[name]) for name, one in bones.named_parameters() if one.requires_grad})
    plain, read = node.merged_in_turn(bones, lambda names: {name: learned[name] for name in names})
    merged = dict(node.merged(whole).named_parameters(remove_duplicate=False))
    assert dict(plain.named_parameters(remove_duplicate=False)).keys() == merged.keys()
    assert plain.state_dict().keys() <= merged.keys()
    assert all(torch.equal(read([name])[name], value) for name, value in merged.items())
    _, nothing = node.merged_in_turn(opening.from_scratch(config, 0).under(lambda base: node.attach(base, 1)).model, lambda names: {})
    assert nothing(list(merged)) == {}


def test_weights_are_pefts_merge(base: Path, tokenizer: Path, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    trained(base, tokenizer, tmp_path / "adapter", "lora")
    merge(base, tmp_path / "adapter", tmp_path / "step")
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").merge_and_unload().state_dict()
    ours = load_file(tmp_path / "step" / "checkpoint" / "model.safetensors")
    assert ours.keys() <= theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_a_16_bit_base_stays_one(tokenizer: Path, tmp_path: Path, name: str) -> None:
    base = tiny.checkpoint_folder(tmp_path / "base", tokenizer, dtype=torch.bfloat16)
    expected = trained(base, tokenizer, tmp_path / "adapter", name)
    merge(base, tmp_path / "adapter", tmp_path / "step")
    merged = open_model(tmp_path / "step" / "checkpoint")
    assert merged.dtype == torch.bfloat16
    assert (says(merged.float()) - expected).abs().max() < 0.02 * expected.abs().max()  # rounded once


def test_the_tokenizer_is_the_adapters(base: Path, tokenizer: Path, tmp_path: Path) -> None:
    """SFT on a base without chat adds markers, and generation has to stop at them."""
    marked = shutil.copytree(tokenizer, tmp_path / "marked")
    (marked / "chat_template.jinja").write_text(tiny.TEMPLATE + "{# another #}")
    plain = tmp_path / "base"
    shutil.copytree(base, plain)
    (plain / "chat_template.jinja").unlink()
    (plain / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    for name in ("lora", "prompt_tuning"):
        trained(plain, marked, tmp_path / name, name)
        merge(plain, tmp_path / name, tmp_path / f"step-{name}")
        out = tmp_path / f"step-{name}" / "checkpoint"
        assert open_tokenizer(out).chat_template.endswith("{# another #}")
        end = open_tokenizer(out).convert_tokens_to_ids("<|end|>")
        assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [0, end]


def test_a_soft_prompt_goes_along(base: Path, tokenizer: Path, tmp_path: Path) -> None:
    expected = trained(base, tokenizer, tmp_path / "adapter", "prompt_tuning", virtual_tokens=5)
    metrics = merge(base, tmp_path / "adapter", tmp_path / "step")
    assert metrics["merged"] is False
    out = tmp_path / "step" / "checkpoint"
    opened = open_model(out)
    assert (says(opened) - expected).abs().max() < 1e-5
    assert (out / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert (says(build.from_folder(base).eval()) - expected).abs().max() > 0.1  # the base alone
    with pytest.raises(CheckpointError, match="holds a soft prompt"):
        build.from_folder(out)
    with pytest.raises(CheckpointError, match="has an adapter inside already"):
        merge(out, tmp_path / "adapter", tmp_path / "again")


def test_what_cannot_be_merged_is_refused(base: Path, tokenizer: Path, tmp_path: Path) -> None:
    trained(base, tokenizer, tmp_path / "adapter", "lora")
    other = tiny.checkpoint_folder(tmp_path / "other", tokenizer, seed=5)
    with pytest.raises(CheckpointError, match="was trained on another base"):
        merge(other, tmp_path / "adapter", tmp_path / "one")
    trained(base, tokenizer, tmp_path / "soft", "prompt_tuning")
    with pytest.raises(CheckpointError, match="was trained on another base"):
        merge(other, tmp_path / "soft", tmp_path / "two")
    small = tiny.checkpoint_folder(tmp_path / "small", tokenizer)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "compressed-tensors"}}))
    with pytest.raises(CheckpointError, match="is quantized"):
        merge(small, tmp_path / "adapter", tmp_path / "three")
    assert not list((tmp_path / "one" / "checkpoint").iterdir())


def test_a_tokenizer_too_big_for_the_base_is_refused(base: Path, tokenizer: Path, tmp_path: Path) -> None:
    big = shutil.copytree(tokenizer, tmp_path / "big")
    made = open_tokenizer(big)
    made.add_tokens([f"<{index}>" for index in range(60)], special_tokens=True)
    made.save_pretrained(big)
    for name in ("lora", "prompt_tuning"):
        trained(base, big, tmp_path / name, name)
        with pytest.raises(CheckpointError, match="does not fit a model of 300"):
            merge(base, tmp_path / name, tmp_path / f"step-{name}")
