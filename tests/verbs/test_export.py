"""`export RUN`: what a step made, or the weights in an unfinished step's state, as a folder that transformers opens."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lmforge.__main__ import main
from lmforge.errors import CheckpointError
from lmforge.model import build
from lmforge.training.rl.actor_critic import ActorCritic, Critic
from lmforge.training.state import Saver, describe, open_state, release
from tests.adapter import tiny

STEP = "sft-dddd4444"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


def unfinished(output: Path, model: Any, tokenizer: Path, name: str = STEP, dtype: torch.dtype = torch.float32) -> Path:
    """A step that has saved its state after 7 steps, and is not done."""
    folder = output / "steps" / name / "state"
    folder.mkdir(parents=True)
    describe(folder, model, tokenizer)
    saver = Saver(folder, background=False)
    trained = {key: value.detach().to(dtype) for key, value in model.named_parameters() if value.requires_grad}
    saver.save(7, {"weights": trained, "optimizer": {"m": torch.zeros(1000)}})
    saver.close()
    return folder


def fresh(config: dict[str, Any]) -> Any:
    return tiny.model({**config, "vocab_size": 300}, seed=4)


@pytest.mark.parametrize("reference", [STEP, "dddd", "STEP", "STATE"])
def test_a_state_becomes_a_folder(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str], reference: str) -> None:
    model = fresh(tiny.LLAMA)
    state = unfinished(tmp_path, model, tokenizer)
    meant = {"STEP": str(state.parent), "STATE": str(state)}.get(reference, reference)
    assert main(["export", meant, str(tmp_path / "out"), f"output={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert f"the weights of {state} after step 7" in said
    assert said.count("\n") == 1
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, opened.state_dict()[name]) for name, value in model.state_dict().items())
    assert opened.config.architectures == ["LlamaForCausalLM"]
    text = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert opened.generation_config.eos_token_id is not None
    assert text("def add")["input_ids"] == AutoTokenizer.from_pretrained(tokenizer)("def add")["input_ids"]
    assert not (tmp_path / "out" / "about.json").exists()


@pytest.mark.parametrize("config", tiny.FAMILIES, ids=tiny.by_family)
@pytest.mark.parametrize("file_bytes", [2**32, 30_000])
def test_every_family_as_transformers_writes_it(tmp_path: Path, tokenizer: Path, config: dict[str, Any], file_bytes: int) -> None:
    """The same tensors under the same names as `save_pretrained`: experts apart, tied weights once; in one file or in many."""
    model = fresh(config)
    saved = open_state(unfinished(tmp_path, model, tokenizer))
    assert saved is not None
    files = release(saved, tmp_path / "out", file_bytes)
    assert (len(files) > 2) == (file_bytes == 30_000)
    model.save_pretrained(tmp_path / "oracle")
    ours, theirs = {name: value for path in files for name, value in load_file(path).items()}, load_file(tmp_path / "oracle" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    if len(files) > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == theirs.keys()
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in theirs.values())
    opened, given = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tiny.batch(vocabulary=300)
    with torch.no_grad():
        assert torch.equal(opened(**given).logits, model.eval()(**given).logits)


def test_the_dtype_is_the_one_trained_in(tmp_path: Path, tokenizer: Path) -> None:
    unfinished(tmp_path, fresh(tiny.LLAMA), tokenizer, dtype=torch.bfloat16)
    assert main(["export", STEP, str(tmp_path / "out"), f"output={tmp_path}"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_policy_of_ppo_and_a_reward_model(tmp_path: Path, tokenizer: Path) -> None:
    policy, base = fresh(tiny.LLAMA), tiny.checkpoint_folder(tmp_path / "base", tokenizer)
    scorer: Any = build.scorer_from_folder(base)
    unfinished(tmp_path, ActorCritic(policy, Critic(scorer, 0.0, 1.0)), tokenizer)
    assert main(["export", STEP, str(tmp_path / "policy"), f"output={tmp_path}"]) == 0
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert all(torch.equal(value, opened.state_dict()[name]) for name, value in policy.state_dict().items())
    torch.nn.init.normal_(scorer.score.weight)
    unfinished(tmp_path, scorer, tokenizer, "reward-eeee5555")
    assert main(["export", "eeee", str(tmp_path / "scorer"), f"output={tmp_path}"]) == 0
    made = AutoModelForSequenceClassification.from_pretrained(tmp_path / "scorer")
    assert torch.equal(made.score.weight, scorer.score.weight)
    assert made.config.num_labels == 1


def test_what_a_finished_step_made_is_copied(output: Path, tmp_path: Path) -> None:
    made, source = tmp_path / "made", output / "steps" / "pretrain-aaaa1111" / "checkpoint"
    assert main(["export", "aaaa", str(made), f"output={output}"]) == 0
    assert {path.name: path.read_bytes() for path in made.iterdir()} == {path.name: path.read_bytes() for path in source.iterdir()}


@pytest.mark.parametrize("by_path", [False, True])
def test_a_run_that_is_not_done(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str], by_path: bool) -> None:
    """Its plan names the steps; the last that has a state is meant."""
    run = tmp_path / "runs" / "20260101-000000-mine"
    run.mkdir(parents=True)
    steps = [{"name": name, "digest": digest} for name, digest in (("pretrain", "aaaa1111"), ("sft", "dddd4444"), ("dpo", "eeee5555"))]
    (run / "plan.json").write_text(json.dumps({"steps": steps}))
    (tmp_path / "steps" / "pretrain-aaaa1111").mkdir(parents=True)
    (tmp_path / "steps" / "pretrain-aaaa1111" / "step.json").write_text("{}")
    words = ["export", str(run) if by_path else run.name, str(tmp_path / "out"), f"output={tmp_path}"]
    assert main(words) == 2
    assert "none of its steps has a state; give a finished step of it: pretrain-aaaa1111" in capsys.readouterr().err
    state = unfinished(tmp_path, fresh(tiny.LLAMA), tokenizer)
    assert main(words) == 0
    assert f"the weights of {state} after step 7" in capsys.readouterr().out


def test_an_adapters_state_is_refused(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unfinished(tmp_path, tiny.adapter("lora").attach(fresh(tiny.LLAMA)), tokenizer)
    assert main(["export", STEP, str(tmp_path / "out"), f"output={tmp_path}"]) == 2
    assert "holds an adapter, not a model; run its step to the end, then type: lmforge merge" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["zzzz", "OUT"], "no such run, step or digest"),
        (["bbbb", "OUT"], "made an adapter, not weights"),
        (["aaaa", "HERE"], "is there already"),
        (["org/name", "OUT"], "is a hub id"),
        ([], "arguments are required: run, out"),
        (["aaaa", "OUT", "to=x"], "unrecognized arguments: to=x"),
    ],
)
def test_bad_words(output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    words = [word.replace("OUT", str(tmp_path / "out")).replace("HERE", str(tmp_path)) for word in words]
    assert main(["export", *words, f"output={output}"]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_states_that_cannot_be_exported(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused() -> str:
        assert main(["export", STEP, str(tmp_path / "out"), f"output={tmp_path}"]) == 2
        assert not (tmp_path / "out").exists()
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    model = fresh(tiny.LLAMA)
    model.model.embed_tokens.weight.requires_grad_(False)
    state = unfinished(tmp_path, model, tokenizer)
    assert "does not hold the whole model: model.embed_tokens.weight is not in it" in refused()
    config = json.loads((state / "model" / "config.json").read_text())
    (state / "model" / "config.json").write_text(json.dumps(config | {"model_type": "nothing"}))
    assert "config.json: transformers refuses it" in refused()
    (state / "model" / "config.json").rename(state / "config.json")
    assert "has no model/config.json" in refused()
    shard = state / "step-7" / "rank-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "rank-00000.safetensors: has" in refused()


@pytest.mark.parametrize("done", [False, True])
def test_two_steps_of_one_digest(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str], done: bool) -> None:
    for name in (STEP, "dpo-dddd4445"):
        unfinished(tmp_path, fresh(tiny.LLAMA), tokenizer, name)
    if done:
        (tmp_path / "steps" / "dpo-dddd4445" / "step.json").write_text("{}")
    assert main(["export", "dddd", str(tmp_path / "out"), f"output={tmp_path}"]) == 2
    assert "means 2 steps: dpo-dddd4445, sft-dddd4444" in capsys.readouterr().err


def test_a_broken_export_leaves_nothing(tmp_path: Path, tokenizer: Path) -> None:
    saved = open_state(unfinished(tmp_path, fresh(tiny.LLAMA), tokenizer))
    assert saved is not None
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        release(saved, tmp_path / "file" / "out")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))  # a real write error in the middle of the weights
    try:
        with pytest.raises(CheckpointError, match=r"cannot be written: .*File too large"):
            release(saved, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "steps"]
