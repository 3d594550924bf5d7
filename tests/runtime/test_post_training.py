"""Post-training as a user types it, whole: every road runs on real rows, and what one stage makes the next one takes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lmforge.reward.nodes import Episodes, PythonParses
from tests.runtime.conftest import SMALL, Run

TRAINED = ("pretrain", "sft", "reward", "ppo", "grpo", "dpo", "ipo", "hinge", "kto", "orpo", "simpo")
TINY = """# @package _global_
# Two steps of every stage.
stage:
{stages}
  ppo: {{max_new_tokens: 12, epochs: 2, minibatches: 2, eval_prompts: 8, sample_every: 1, budget: {{steps: 5}}, log_every: 1, optimizer: {batch}}}
  grpo: {{max_new_tokens: 12, group_size: 4, minibatches: 2, eval_prompts: 8, budget: {{steps: 3}}, log_every: 1, optimizer: {batch}}}
  sample: {{prompts: 16, answers: 16, max_new_tokens: 32}}
"""
BATCH = "{global_batch_tokens: 512, lr: 1e-3}"
ROW = "  {name}: {{budget: {{steps: 2}}, log_every: 1, optimizer: {batch}}}"


@pytest.fixture(scope="module")
def ran(lmforge: Run, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[str, ...]]:
    """A folder in which every pipeline ran in one multirun, and the words they share."""
    cwd = tmp_path_factory.mktemp("roads")
    (cwd / "conf/experiment").mkdir(parents=True)
    rows = "\n".join(ROW.format(name=name, batch=BATCH) for name in TRAINED if name not in ("ppo", "grpo"))
    (cwd / "conf/experiment/tiny.yaml").write_text(TINY.format(stages=rows, batch=BATCH))
    common = ("--config-dir", "conf", "experiment=tiny", "data=text", f"data.path={corpus}", *SMALL, "track=none")
    roads = ["[pretrain,sft,reward,ppo]", "[pretrain,sft,grpo]", "[pretrain,sft,sample]", *(f"[pretrain,{name}]" for name in TRAINED[6:])]
    (cwd / "printed.txt").write_text(lmforge("-m", *common, "stage=" + ",".join(roads), "eval=none", cwd=cwd).stdout)
    return cwd, common


def step(cwd: Path, name: str) -> Path:
    found = [folder for folder in (cwd / "outputs/steps").glob(f"{name}-*") if (folder / "step.json").is_file()]
    assert len(found) == 1, name
    return found[0]


def metrics(cwd: Path, name: str) -> dict[str, Any]:
    return json.loads((step(cwd, name) / "step.json").read_text())["metrics"]


def lines(cwd: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (step(cwd, name) / "metrics.jsonl").read_text().splitlines()]


def test_pretraining_and_sft_ran_once_for_all_roads(ran: tuple[Path, tuple[str, ...]]) -> None:
    cwd, _ = ran
    for name in (*TRAINED[:5], *TRAINED[6:], "sample", "kto.feedback_reference", "ipo.reference"):
        assert step(cwd, name)


def test_a_reward_model_opens_in_transformers_and_says_how_it_orders_held_out_pairs(ran: tuple[Path, tuple[str, ...]]) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    cwd, _ = ran
    found = metrics(cwd, "reward")
    assert 0 <= found["heldout_accuracy"] <= 1
    assert found["heldout_pairs"] > 5
    folder = step(cwd, "reward") / "reward_model"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], tokenize=False)
    assert model(torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])).logits.shape == (1, 1)


def test_rl_logs_what_people_look_for_and_compares_held_out_rewards(ran: tuple[Path, tuple[str, ...]]) -> None:
    cwd, _ = ran
    wanted = {"reward/mean", "reward/std", "kl", "entropy", "clip_fraction", "response_length", "ended"}
    assert wanted | {"value/explained_variance", "value/loss", "kl_coef"} <= lines(cwd, "ppo")[-1].keys()
    assert wanted <= lines(cwd, "grpo")[-1].keys()
    for name in ("ppo", "grpo"):
        found = metrics(cwd, name)
        assert found["heldout_reward_gain"] == pytest.approx(found["heldout_reward"] - found["heldout_reward_start"], abs=1e-6)
        assert found["heldout_kl_per_token"] >= 0


@pytest.mark.parametrize(("name", "shown"), [("ppo", [0, 4]), ("grpo", [0])])
def test_tables_of_answers_hold_what_the_figures_are_made_of(name: str, shown: list[int], ran: tuple[Path, tuple[str, ...]]) -> None:
    """The last table holds all 8 held-out answers, so the mean of its rewards is the figure; and GRPO's rule gives each its reward again."""
    cwd, _ = ran
    *training, heldout = [json.loads(line) for line in (step(cwd, name) / "samples.jsonl").read_text().splitlines()]
    assert [(table["title"], table["rows"][0]["step"]) for table in training] == [("generations", at) for at in shown]
    assert all(list(row) == ["step", "prompt", "answer", "reward"] for table in training for row in table["rows"])
    assert heldout["title"] == "held-out generations"
    assert all(list(row) == ["prompt", "answer", "reward"] for row in heldout["rows"])
    rewards, found = [row["reward"] for row in heldout["rows"]], metrics(cwd, name)
    assert len(rewards) == len({row["prompt"] for row in heldout["rows"]}) == found["heldout_prompts"] == 8
    assert found["heldout_reward"] == pytest.approx(sum(rewards) / 8, abs=1e-7)
    if name == "ppo":
        assert len(set(rewards)) > 1
    else:
        rule = PythonParses(min_nodes=5, max_chars=4096, trimmed=False).open({})
        texts = [[row[key] for row in heldout["rows"]] for key in ("prompt", "answer")]
        assert rule(Episodes(*texts, references=[None] * 8, ids=[[]] * 8, starts=[0] * 8)) == rewards


def test_the_summary_says_what_was_learned_and_what_to_type_next(ran: tuple[Path, tuple[str, ...]]) -> None:
    cwd, _ = ran
    printed = (cwd / "printed.txt").read_text()
    pairs, sample = metrics(cwd, "reward")["heldout_pairs"], step(cwd, "sample").name
    assert f"of {pairs} held-out pairs in the right order" in printed
    for name in ("ppo", "grpo"):
        assert f"{name} moves the held-out reward {metrics(cwd, name)['heldout_reward_start']:.4g}" in printed
    assert f"python -m lmforge rank {sample}" in printed


def test_preference_losses_start_where_policy_and_reference_are_one(ran: tuple[Path, tuple[str, ...]]) -> None:
    """At the first step log-ratios are 0, so each loss has its closed form."""
    cwd, _ = ran
    first = {name: lines(cwd, name)[0] for name in ("ipo", "hinge", "kto")}
    assert first["ipo"]["loss"] == pytest.approx((0 - 1 / (2 * 0.1)) ** 2, rel=1e-3)
    assert first["hinge"]["loss"] == pytest.approx(1.0, abs=1e-3)
    assert first["kto"]["loss"] == pytest.approx(0.5, abs=1e-3)
    assert lines(cwd, "orpo")[0]["loss"] > 1  # cross entropy and the odds ratio: nothing cancels


def test_an_adapter_is_an_artifact_and_its_merge_a_plain_checkpoint(ran: tuple[Path, tuple[str, ...]], lmforge: Run, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    cwd, common = ran
    lmforge(*common, "stage=[pretrain,dpo]", "adapter=lora", "adapter.r=2", "eval=perplexity", "eval.max_tokens=500", "eval.max_pairs=8", cwd=cwd)
    base, adapter = step(cwd, "pretrain") / "checkpoint", step(cwd, "dpo") / "adapter"
    assert (
        sum(value.numel() for value in load_file(adapter / "adapter_model.safetensors").values())
        == json.loads((step(cwd, "dpo") / "step.json").read_text())["predicted"]["params_trainable"]
    )
    ids = torch.arange(3, 40)[None]
    unmerged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    merged = AutoModelForCausalLM.from_pretrained(step(cwd, "dpo.merge") / "checkpoint")
    with torch.no_grad():
        assert torch.allclose(unmerged(ids).logits, merged(ids).logits, atol=1e-5)
    printed = lmforge("merge", str(adapter), str(tmp_path / "merged"), "--base", str(base), cwd=cwd).stdout
    assert "merged" in printed
    first = lmforge("generate", str(base), "import", "--adapter", str(adapter), "--max-new-tokens", "4", cwd=cwd).stdout
    assert first == lmforge("generate", str(tmp_path / "merged"), "import", "--max-new-tokens", "4", cwd=cwd).stdout


def test_ranked_samples_are_preference_data(ran: tuple[Path, tuple[str, ...]], lmforge: Run) -> None:
    """The answers that ended by themselves, about one in ten of a model that knows nothing, become pairs, and the policy that gave them learns from them."""
    cwd, _ = ran
    name = step(cwd, "sample").name
    said = lmforge("rank", name, "--by", "length", "--export", "mine.jsonl", cwd=cwd).stdout
    drawn = [answer for line in (step(cwd, "sample") / "samples/samples.jsonl").read_text().strip().split("\n") for answer in json.loads(line)["answers"]]
    ended = {answer["text"] for answer in drawn if answer["ended"]}
    assert f"left out: {sum(not answer['ended'] for answer in drawn):,} answers that were cut off" in said
    rows = [json.loads(line) for line in (cwd / "mine.jsonl").read_text().strip().split("\n")]
    assert {row[side] for row in rows for side in ("chosen", "rejected")} <= ended
    policy = step(cwd, "sft") / "checkpoint"
    words = ("stage=dpo", f"stage.dpo.init_from={policy}", "data=text", "data.path=mine.jsonl", "data.heldout_fraction=0.3", "eval=none", "track=none")
    lmforge("--config-dir", "conf", "experiment=tiny", *SMALL, *words, "stage.dpo.budget.steps=1", "output=ranked", cwd=cwd)
    [folder] = (cwd / "ranked/steps").glob("dpo-*")
    [first] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)  # policy and reference are one
    found = json.loads((folder / "step.json").read_text())["metrics"]
    assert found["steps"] == 1
    assert found["grad_norm"] > 0
    [tokens] = (cwd / "ranked/steps").glob("tokens.preference-*/tokens/meta.json")
    assert sum(json.loads(tokens.read_text())["rows"].values()) == len(rows)


def test_a_reward_model_of_another_run_is_a_reward(ran: tuple[Path, tuple[str, ...]], lmforge: Run) -> None:
    """The same PPO as in the pipeline, with policy and reward model named by their steps: the same weights come out."""
    cwd, common = ran
    start = (f"stage.ppo.init_from={step(cwd, 'sft').name}", f"stage.ppo.reward_from={step(cwd, 'reward').name}")
    lmforge(*common, "stage=ppo", *start, "eval=none", "name=again", cwd=cwd)
    made = [folder for folder in (cwd / "outputs/steps").glob("ppo-*") if (folder / "step.json").is_file()]
    assert len(made) == 2
    first, second = (load_file(folder / "checkpoint/model.safetensors") for folder in made)
    assert all(torch.equal(first[name], second[name]) for name in first)
