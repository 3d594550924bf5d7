"""Options in conf/model as a config names them: they decode, mean what they say, and need no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lmforge.codec import decode, encode
from lmforge.errors import ConfigError
from lmforge.model.nodes import Model
from lmforge.model.weights import count, max_positions, vocab_size

CONF = Path(__file__).parents[2] / "conf" / "model"
TOTALS = {
    "nano": 332_352,
    "micro": 918_656,
    "400m": 392_487_936,
    "1b": 1_484_916_736,
    "7b": 7_298_617_344,
    "13b": 13_716_198_400,
    "70b": 68_976_648_192,
    "gpt3_175b": 174_604_259_328,
}


def option(name: str, **changes: Any) -> dict[str, Any]:
    """A YAML as Hydra would compose it."""
    plain: dict[str, Any] = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    tokenizer = plain.pop("defaults")[0]["tokenizer"]
    plain["tokenizer"] = yaml.safe_load((CONF / "tokenizer" / f"{tokenizer}.yaml").read_text())
    return {**plain, **changes}


def model(name: str, **changes: Any) -> Model:
    made = decode(Model, option(name, **changes), "model")
    assert isinstance(made, Model)
    return made


def refusal(name: str, **changes: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        model(name, **changes)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def meta(config: dict[str, Any]) -> Any:
    from lmforge.model.build import on_meta

    return on_meta(config)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml") if path.stem != "hf"))
def test_options_build_the_model_that_was_counted(name: str) -> None:
    node = model(name)
    config = node.config()
    assert decode(Model, encode(node), "model") == node
    small = config if count(config).total < 2e9 else {**config, ("n_layer" if "n_layer" in config else "num_hidden_layers"): 2}
    built = meta(small)
    assert type(built).__name__ == config["architectures"][0]
    assert sum(p.numel() for p in built.parameters()) == count(small).total
    assert built.config.max_position_embeddings == max_positions(config)
    if name in TOTALS:
        assert count(config).total == TOTALS[name]


@pytest.mark.parametrize("name", ["nano", "1b", "gpt3_175b"])
def test_every_shape_key_reaches_the_transformers_config(name: str) -> None:
    """What the node says is what transformers' config object holds, under transformers' own names."""
    node: Any = model(name, initializer_range=0.07)
    held = meta({**node.config(), ("n_layer" if name.startswith("gpt3") else "num_hidden_layers"): 1}).config
    for key in ("vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings", "tie_word_embeddings", "initializer_range"):
        assert getattr(held, key) == getattr(node, key), key
    if name.startswith("gpt3"):
        assert (held.n_inner, held.layer_norm_epsilon, held.resid_pdrop, held.activation_function) == (49152, 1e-5, 0.0, "gelu_new")
    else:
        assert held.rope_parameters == {"rope_type": "default", "rope_theta": node.rope_theta}
        assert held.rms_norm_eps == node.rms_norm_eps
        assert held.intermediate_size == node.intermediate_size
        assert held.num_key_value_heads == node.num_attention_heads


def test_weights_named_by_olmo_options_are_pinned_to_a_commit() -> None:
    for name in ("1b", "7b", "13b"):
        plain = option(name)
        assert plain["pretrained"].startswith("allenai/OLMo-2-")
        assert len(plain["revision"]) == 40
        assert plain["tokenizer"]["type"] == "own"


def test_dial_gives_a_llama_of_that_size() -> None:
    config = model("dial", params="25e6", vocab_size=4096).config()
    assert config["model_type"] == "llama"
    assert vocab_size(config) == 4096
    assert abs(count(config).total - 25e6) < 0.01 * 25e6


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("nano", {"num_attention_heads": 5}, "model.num_attention_heads: 5 heads do not divide hidden_size 64; take 4 or 8"),
        ("nano", {"num_key_value_heads": 3, "num_attention_heads": 4}, "model.num_key_value_heads: 3 key-value heads do not divide num_attention_heads 4"),
        ("nano", {"num_attention_heads": 64}, "an odd number"),
        ("nano", {"hidden_size": 0}, "model.hidden_size: 0 must be >= 1"),
        ("nano", {"vocab_size": -3}, "model.vocab_size: -3 must be >= 1"),
        ("nano", {"num_hidden_layers": 2.5}, "model.num_hidden_layers: expected a whole number"),
        ("nano", {"rope_theta": float("nan")}, "model.rope_theta: nan is not a finite number"),
        ("nano", {"revision": "abc"}, "model.revision: is a commit of weights that are not named"),
        ("7b", {"num_attention_heads": 30}, "take 16 or 32"),
        ("gpt3_175b", {"num_attention_heads": 100}, "100 heads do not divide hidden_size 12288; take 96 or 128"),
        ("dial", {"params": 1e5}, "model.params: 100000 is too few for a vocabulary of 8192; take at least 269408"),
        ("dial", {"params": 0}, "model.params: 0.0 must be > 0"),
        ("hf", {}, "model.pretrained: must be set"),
    ],
)
def test_what_makes_no_sense_is_refused_where_it_is_said(name: str, changes: dict[str, Any], says: str) -> None:
    assert says in refusal(name, **changes)


def test_a_local_folder_has_no_commit(tmp_path: Path) -> None:
    assert "local folder, which has no commits" in refusal("7b", pretrained=str(tmp_path))


def test_one_commit_is_named_once() -> None:
    pinned = f"org/name@{'a' * 40}"
    assert "is pinned to another commit" in refusal("7b", pretrained=pinned)
    assert model("7b", pretrained=pinned, revision="a" * 40)
    assert model("hf", pretrained=pinned)


def test_who_wrote_a_config_json_is_no_part_of_the_model(tmp_path: Path) -> None:
    says = {"model_type": "llama", "hidden_size": 64, "pad_token_id": 0}
    by = {
        "here": {"transformers_version": "5.23.0", "dtype": "float32", "_name_or_path": "/here"},
        "there": {"transformers_version": "4.47.0", "torch_dtype": "bfloat16", "use_cache": False},
    }
    for name, volatile in by.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**says, **volatile}))
    configs = [model("hf", pretrained=str(tmp_path / name)).config() for name in by]
    assert configs == [says, says]  # the padding row, which no gradient reaches, does count


def test_where_weights_lie_is_no_part_of_what_a_model_is() -> None:
    here, there = (encode(model("nano", pretrained=source), identity=True) for source in ("/a", "/b"))
    assert here == there


def test_planning_needs_no_torch() -> None:
    program = f"""
import sys, yaml
from pathlib import Path
from lmforge.codec import decode
from lmforge.model.nodes import Model
from lmforge.model.weights import count, weights
for path in sorted(Path({str(CONF)!r}).glob("*.yaml")):
    plain = yaml.safe_load(path.read_text())
    plain["tokenizer"] = yaml.safe_load((path.parent / "tokenizer" / (plain.pop("defaults")[0]["tokenizer"] + ".yaml")).read_text())
    if plain["type"] != "hf":
        config = decode(Model, plain, "model").config()
        assert count(config).total > 0 and weights(config)
heavy = {{"torch", "transformers", "lightning", "numpy", "tokenizers", "safetensors", "huggingface_hub"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
