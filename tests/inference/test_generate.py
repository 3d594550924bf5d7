from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmforge.errors import CheckpointError, LmforgeError, RunError
from lmforge.inference.checkpoint import open_model, open_tokenizer
from lmforge.inference.generate import generate

GREEDY = {"max_new_tokens": 12, "temperature": 0.0, "top_p": 1.0, "seed": 0, "chat": False}


def by_hand(checkpoint: Path, ids: list[int], new: int) -> str:
    """Greedy decoding without a cache: the whole prefix again for every token."""
    model, tokenizer, found = open_model(checkpoint), open_tokenizer(checkpoint), list(ids)
    for _ in range(new):
        with torch.no_grad():
            found.append(int(model(torch.tensor([found])).logits[0, -1].argmax()))
        if found[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(found[len(ids) :], skip_special_tokens=True)


def test_greedy_pieces_join_to_the_argmax_of_every_step(checkpoint: Path) -> None:
    pieces = list(generate(checkpoint, "def add(a", **GREEDY | {"max_new_tokens": 50}))
    assert "".join(pieces) == by_hand(checkpoint, open_tokenizer(checkpoint)("def add(a")["input_ids"], 50) != ""
    assert len(pieces) > 1


def test_chat_continues_the_rendered_template(checkpoint: Path) -> None:
    tokenizer = open_tokenizer(checkpoint)
    ids = tokenizer("<|user|>add<|end|><|assistant|>", add_special_tokens=False)["input_ids"]
    chat = "".join(generate(checkpoint, "add", **GREEDY | {"chat": True}))
    assert chat == by_hand(checkpoint, ids, 12)
    assert chat != "".join(generate(checkpoint, "add", **GREEDY))


def test_a_seed_decides_a_sample_and_leaves_the_callers_random_state_alone(checkpoint: Path) -> None:
    hot = GREEDY | {"temperature": 1.5, "top_p": 0.95}
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, two, other = ("".join(generate(checkpoint, "for i", **hot | {"seed": seed})) for seed in (1, 1, 2))
    assert one == two != other
    assert torch.equal(before, torch.get_rng_state())


def test_leaving_early_ends_the_thread(checkpoint: Path) -> None:
    threads = threading.active_count()
    pieces = generate(checkpoint, "def add(a", **GREEDY | {"max_new_tokens": 50})
    next(pieces)
    pieces.close()
    assert threading.active_count() == threads


def test_a_failure_inside_generate_reaches_the_reader(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "nan")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"].fill_(float("nan"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="probability"):
        list(generate(folder, "def", **GREEDY | {"temperature": 1.0}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max_new_tokens": 64}, "exceed the context of 64"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
    ],
)
def test_what_cannot_be_sampled_is_refused(checkpoint: Path, change: dict[str, float], says: str) -> None:
    with pytest.raises(RunError, match=says):
        generate(checkpoint, "def add(a, b)", **GREEDY | change)


def test_a_prompt_longer_than_the_context_is_refused_before_anything_runs(checkpoint: Path) -> None:
    with pytest.raises(RunError, match=r"prompt: has \d+ tokens and the model's context is 64"):
        generate(checkpoint, "x y " * 200, **GREEDY)


def broken(folder: Path, kind: str) -> Path:
    """The folder, spoiled in one way."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    if kind == "no config":
        config.unlink()
    elif kind == "config cut":
        config.write_text(config.read_text()[:40])
    elif kind == "unknown architecture":
        config.write_text(json.dumps({"model_type": "nothing_known", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    elif kind == "weights cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "header cut":
        weights.write_bytes(weights.read_bytes()[:5])
    elif kind == "pickled only":
        weights.rename(folder / "pytorch_model.bin")
    elif kind == "a tensor missing":
        save_file({name: tensor for name, tensor in load_file(weights).items() if name != "lm_head.weight"}, weights, metadata={"format": "pt"})
    elif kind == "another shape":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 96}))
    elif kind == "no tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    return folder


KINDS = ["no config", "config cut", "unknown architecture", "weights cut", "header cut", "pickled only", "a tensor missing", "another shape", "no tokenizer"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_is_no_whole_model_is_refused_in_one_line(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    folder = broken(shutil.copytree(checkpoint, tmp_path / "broken"), kind)
    with pytest.raises(CheckpointError) as caught:
        generate(folder, "def", **GREEDY)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert isinstance(caught.value, LmforgeError)


@pytest.mark.parametrize("chat", [False, True])
def test_the_default_length_shrinks_to_the_room_left(checkpoint: Path, chat: bool) -> None:
    """The context is 64; as many new tokens as fill it are taken where nobody says how many."""
    prompt = "def add(a"
    tokenizer = open_tokenizer(checkpoint)
    text = f"<|user|>{prompt}<|end|><|assistant|>" if chat else prompt
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert 5 < len(ids) < 60
    found = "".join(generate(checkpoint, prompt, **GREEDY | {"max_new_tokens": None, "chat": chat}))
    assert found == by_hand(checkpoint, ids, 64 - len(ids)) != by_hand(checkpoint, ids, 64 - len(ids) - 1)
    with pytest.raises(RunError, match="exceed the context of 64"):
        generate(checkpoint, prompt, **GREEDY | {"max_new_tokens": 64 - len(ids) + 1, "chat": chat})


def test_the_default_length_is_bounded_where_there_is_room(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "roomy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512, "eos_token_id": None}))
    (folder / "generation_config.json").write_text("{}")
    ids = open_tokenizer(folder)("for i")["input_ids"]
    found = "".join(generate(folder, "for i", **GREEDY | {"max_new_tokens": None}))
    assert found == by_hand(folder, ids, 128)


# Adapters


def learned(checkpoint: Path, out: Path, name: str) -> Path:
    """An adapter of the checkpoint that says something else than its base."""
    from lmforge.model import build
    from tests.adapter import tiny

    node = tiny.adapter(name)
    node.save(tiny.learn(node.attach(build.from_folder(checkpoint).eval())), checkpoint, out, checkpoint)
    return out


@pytest.mark.parametrize("name", ["lora", "dora", "qlora", "prompt_tuning"])
def test_an_adapter_speaks_on_its_base(checkpoint: Path, tmp_path: Path, name: str) -> None:
    """Without a cache: the whole prefix again for every token."""
    from lmforge.inference.adapters import open_adapter
    from lmforge.inference.forward import logits

    adapter = learned(checkpoint, tmp_path / "adapter", name)
    model, found = open_adapter(open_model(checkpoint), adapter), open_tokenizer(checkpoint)("def add(a")["input_ids"]
    start = len(found)
    for _ in range(12):
        with torch.no_grad():
            ids = torch.tensor([found])
            found.append(int(logits(model, {"input_ids": ids, "position_ids": torch.arange(len(found))[None]})[0, -1].argmax()))
        if found[-1] in (0, open_tokenizer(checkpoint).convert_tokens_to_ids("<|end|>")):
            break
    text = "".join(generate(checkpoint, "def add(a", **GREEDY, adapter=adapter))
    assert text == open_tokenizer(checkpoint).decode(found[start:], skip_special_tokens=True)
    assert text != "".join(generate(checkpoint, "def add(a", **GREEDY))


def test_a_soft_prompt_takes_room_in_the_context(checkpoint: Path, tmp_path: Path) -> None:
    adapter = learned(checkpoint, tmp_path / "adapter", "prompt_tuning")
    with pytest.raises(RunError, match="exceed the context of 44"):
        generate(checkpoint, "def add(a", **GREEDY | {"max_new_tokens": 44}, adapter=adapter)


def test_an_adapter_of_another_base_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    other = shutil.copytree(checkpoint, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["lm_head.weight"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    adapter = learned(other, tmp_path / "adapter", "lora")
    with pytest.raises(CheckpointError, match="was trained on another base"):
        generate(checkpoint, "def", **GREEDY, adapter=adapter)
