"""An attached model is its base until it learns, is its base again when switched off, and merges into what it learned."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from lmforge.inference.checkpoint import open_model, open_tokenizer
from lmforge.inference.forward import logits
from lmforge.model import build
from tests.adapter import tiny

GIVEN = tiny.batch()
LOW_RANK: list[tuple[str, dict[str, Any]]] = [
    ("lora", {}),
    ("lora", {"rslora": True, "alpha": 4}),
    ("lora", {"init": "pissa", "r": 4}),
    ("lora", {"init": "pissa", "r": 4, "rslora": True}),
    ("lora", {"target_modules": ["q_proj", "mlp.down_proj"]}),
    ("dora", {}),
]
SHAPED = [tiny.FAMILIES[0], next(one for one in tiny.FAMILIES if one["model_type"] == "gpt2")]


def named(value: Any) -> str:
    return tiny.by_family(value) if isinstance(value, dict) and "model_type" in value else str(value)


@torch.no_grad()
def says(model: Any) -> torch.Tensor:
    return logits(model, GIVEN)


@pytest.mark.parametrize(("name", "keys"), LOW_RANK)
def test_the_base_before_learning_and_when_off(name: str, keys: dict[str, Any]) -> None:
    node, model = tiny.adapter(name, **keys), tiny.model(tiny.FAMILIES[0])
    before = says(model)
    attached = node.attach(model)
    assert (says(attached) - before).abs().max() < 1e-5
    tiny.learn(attached)
    learned = says(attached)
    assert (learned - before).abs().max() > 0.1
    with node.off(attached):
        assert (says(attached) - before).abs().max() < 1e-5
    assert torch.equal(says(attached), learned)


def test_a_soft_prompt_that_is_off_is_no_prompt() -> None:
    node, model = tiny.adapter("prompt_tuning", virtual_tokens=5), tiny.model(tiny.FAMILIES[0])
    before = says(model)
    attached = node.attach(model)
    with node.off(attached):
        assert torch.equal(says(attached), before)
    assert (says(attached) - before).abs().max() > 0.1


@pytest.mark.parametrize("config", tiny.FAMILIES, ids=tiny.by_family)
@pytest.mark.parametrize("name", ["lora", "dora", "qlora"])
def test_merged_is_unmerged(config: dict[str, Any], name: str) -> None:
    node = tiny.adapter(name)
    attached = tiny.learn(node.attach(tiny.model(config)))
    expected = says(attached)
    merged = node.merged(attached)
    assert type(merged) is type(tiny.model(config))
    assert {name: one.shape for name, one in merged.state_dict().items()} == {name: one.shape for name, one in tiny.model(config).state_dict().items()}
    assert (says(merged) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(("name", "keys"), LOW_RANK)
def test_merged_weights_are_pefts(name: str, keys: dict[str, Any]) -> None:
    node = tiny.adapter(name, **keys)
    attached = tiny.learn(node.attach(tiny.model(tiny.FAMILIES[0])))
    expected = copy.deepcopy(attached).merge_and_unload().state_dict()
    found = node.merged(attached).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["lora", "dora", "qlora", "prompt_tuning"])
def test_a_seed_decides_the_first_weights_and_leaves_the_callers_random_state_alone(name: str) -> None:
    node = tiny.adapter(name)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, same, other = ([p.clone() for p in node.attach(tiny.model(tiny.FAMILIES[0]), seed=seed).parameters() if p.requires_grad] for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    drawn = [p.clone() for p in node.attach(tiny.model(tiny.FAMILIES[0])).parameters() if p.requires_grad]
    assert not torch.equal(before, torch.get_rng_state())
    assert not all(torch.equal(a, b) for a, b in zip(one, drawn, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("config", SHAPED, ids=tiny.by_family)
@pytest.mark.parametrize(("name", "keys"), [*LOW_RANK[:3], ("dora", {}), ("qlora", {}), ("prompt_tuning", {})])
def test_it_learns_and_nothing_else_moves(config: dict[str, Any], name: str, keys: dict[str, Any]) -> None:
    node = tiny.adapter(name, **({} if named(config) == "gpt2" and "target_modules" in keys else keys))
    attached = node.attach(tiny.model(config).train())
    assert attached.training
    frozen = {name: one.clone() for name, one in attached.named_parameters() if not one.requires_grad}
    optimizer = torch.optim.AdamW([one for one in attached.parameters() if one.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        found = tiny.loss(attached, GIVEN)
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(found.item())
    assert losses[-1] < losses[0] - 0.3
    assert all(torch.equal(one, dict(attached.named_parameters())[name]) for name, one in frozen.items())


def test_dropout_is_on_in_training_only() -> None:
    attached = tiny.learn(tiny.adapter("lora", dropout=0.5).attach(tiny.model(tiny.FAMILIES[0])))
    assert torch.equal(says(attached), says(attached))
    attached.train()
    assert not torch.equal(says(attached), says(attached))


# QLoRA


@pytest.mark.parametrize("config", SHAPED, ids=tiny.by_family)
@pytest.mark.parametrize(("quant_type", "double_quant"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_a_base_in_4_bits_is_transformers_own(config: dict[str, Any], quant_type: str, double_quant: bool, tmp_path: Path) -> None:
    """The oracle: the same folder opened by transformers with a BitsAndBytesConfig."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny.model(config).save_pretrained(tmp_path)
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant, bnb_4bit_compute_dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=bits, dtype=torch.float32).eval()
    for layer in theirs.modules():
        layer.support_avx512bf16_for_cpu = False  # a packed form of one kind of CPU, which wants layers of 64 inputs and more
    node = tiny.adapter("qlora", quant_type=quant_type, double_quant=double_quant)
    assert (says(node.attach(open_model(tmp_path, "cpu"))) - says(theirs)).abs().max() < 1e-5


def test_4_bits_are_what_was_planned() -> None:
    from bitsandbytes.nn import Linear4bit

    from lmforge.model.weights import weights

    config = {**tiny.FAMILIES[0], "hidden_size": 128, "intermediate_size": 256}
    for double in (True, False):
        node = tiny.adapter("qlora", double_quant=double)
        attached = node.attach(tiny.model(config))
        layers = [one for one in attached.modules() if isinstance(one, Linear4bit)]
        held = sum(one.weight.nbytes for one in layers)
        for state in (one.weight.quant_state for one in layers):
            held += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
        held += sum(one.nbytes for name, one in attached.named_parameters() if not one.requires_grad and "base_layer" not in name)
        assert len(layers) == 14
        assert node.frozen_bytes(weights({**config, **tiny.IDS}), 4) == held


def test_the_16_bit_base_is_not_what_qlora_learned_on() -> None:
    node = tiny.adapter("qlora")
    attached = tiny.learn(node.attach(tiny.model(tiny.FAMILIES[0])))
    wrong = tiny.learn(tiny.adapter("lora").attach(tiny.model(tiny.FAMILIES[0])))
    assert (says(wrong) - says(attached)).abs().max() > 0.1


def test_4_bits_survive_a_change_of_dtype_and_bf16_compute() -> None:
    """What `lower` and autocast do to the model."""
    node = tiny.adapter("qlora")
    attached = tiny.learn(node.attach(tiny.model(tiny.FAMILIES[0])))
    expected = says(attached)
    assert torch.equal(says(attached.to(torch.float32)), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert 0 < (says(attached) - expected).abs().max() < 0.5
    assert 0 < (says(attached.to(torch.bfloat16)).float() - expected).abs().max() < 0.5


# Soft prompts


def test_a_prompt_begins_as_a_text(base: Path) -> None:
    """The oracle: PEFT's own initialisation from a text, which needs the tokenizer's folder."""
    from peft import PromptTuningConfig, PromptTuningInit, get_peft_model

    text = "def add(a, b):"
    assert 5 < len(open_tokenizer(base)(text)["input_ids"]) < 20
    for count in (5, 20):
        ours = tiny.adapter("prompt_tuning", virtual_tokens=count, init_text=text).attach(build.from_folder(base))
        config = PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=count,
            prompt_tuning_init=PromptTuningInit.TEXT,
            prompt_tuning_init_text=text,
            tokenizer_name_or_path=str(base),
        )
        theirs = get_peft_model(build.from_folder(base), config)
        assert torch.equal(ours.prompt_encoder["default"].embedding.weight, theirs.prompt_encoder["default"].embedding.weight)


def test_a_prompt_begins_in_the_vocabulary() -> None:
    model = tiny.model(tiny.FAMILIES[0])
    table = {tuple(row.tolist()) for row in model.get_input_embeddings().weight}
    for init, inside in (("vocabulary", True), ("random", False)):
        attached = tiny.adapter("prompt_tuning", init=init, virtual_tokens=6).attach(tiny.model(tiny.FAMILIES[0]))
        rows = {tuple(row.tolist()) for row in attached.prompt_encoder["default"].embedding.weight}
        assert (rows <= table) is inside


# Reward and value models


@pytest.fixture
def scorer(base: Path) -> Any:
    return build.scorer_from_folder(base)


@pytest.mark.parametrize("name", ["lora", "dora", "qlora", "prompt_tuning"])
def test_a_scalar_head_is_trained_in_its_place(scorer: Any, name: str) -> None:
    before = sum(one.numel() for one in scorer.parameters())
    attached = tiny.adapter(name).attach(scorer)
    head = attached.get_base_model().score
    assert isinstance(head, torch.nn.Linear)
    assert head.weight.requires_grad
    names = [name for name, one in attached.named_parameters() if one.requires_grad]
    assert [name for name in names if "score" in name] == [next(name for name, one in attached.named_parameters() if one is head.weight)]
    assert all("lora" in name or "prompt_encoder" in name or "score" in name for name in names)
    assert before > sum(one.numel() for one in attached.parameters() if one.requires_grad)


@pytest.mark.parametrize("name", ["lora", "dora", "qlora"])
def test_a_scorer_merges(scorer: Any, name: str) -> None:
    node = tiny.adapter(name)
    attached = tiny.learn(node.attach(scorer.eval()))
    ids = GIVEN["input_ids"]
    with torch.no_grad():
        expected = attached(input_ids=ids).logits
        merged = node.merged(attached)
        assert type(merged).__name__ == "LlamaForSequenceClassification"
        assert (merged(input_ids=ids).logits - expected).abs().max() < 1e-5
    assert expected.abs().max() > 0
