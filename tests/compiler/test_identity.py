"""What a step is makes its digest; where and how it runs never does. And a plan is exact as JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lmforge.compose.catalog import Catalog
from lmforge.explain import Status, diff, render
from lmforge.plan import Plan

PlanOf = Callable[..., Plan]
PIPELINE = ("stage=[pretrain,sft,dpo]", "quantize=int8", "hardware=cpu")
EXPERIMENTS = sorted(Catalog.of().options["experiment"])


def digests(plan: Plan) -> dict[str, str]:
    return {step.name: step.digest for step in plan.steps}


def rerun(before: Plan, after: Plan) -> set[str]:
    """Steps of the second plan that the first has not done."""
    done = set(digests(before).values())
    return {step.name for step in after.steps if step.digest not in done}


@pytest.fixture
def base(rows: Path) -> tuple[str, ...]:
    return (*PIPELINE, "data=text", f"data.path={rows}")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_plan_is_exact_as_json(experiment: str, plan_of: PlanOf) -> None:
    plan = plan_of(f"experiment={experiment}", "hardware=h200x8")
    text = json.dumps(plan.to_json(), allow_nan=False)
    again = Plan.from_json(json.loads(text))
    assert again == plan
    assert json.dumps(again.to_json()) == text


@pytest.mark.parametrize("parallel", ["single", "ddp", "fsdp", "deepspeed_zero1", "deepspeed_zero3"])
def test_a_plan_of_every_strategy_is_exact_as_json(parallel: str, plan_of: PlanOf) -> None:
    plan = plan_of("stage=dpo", "model=1b", f"parallel={parallel}", "hardware=h200x8", "eval=lm_eval", "precision=bf16")
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize("until", ["expand", "validate", "resolve", "place", "estimate"])
def test_a_plan_is_exact_as_json_after_every_pass(until: str, plan_of: PlanOf) -> None:
    plan = plan_of("experiment=quickstart", until=until)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize(
    "override",
    [
        "output=elsewhere",
        "name=other",
        "track=none",
        "track.project=other",
        "hardware=h100x8",
        "hardware.memory_bytes=1e12",
        "parallel=ddp parallel.devices=4",
        "parallel=fsdp",
        "parallel.micro_batch_size=2",
        "parallel.activation_checkpointing=full",
        "parallel.compile=true",
        "stage.pretrain.log_every=1",
        "stage.sft.save_every_s=5",
        "eval.batch_tokens=1024",
    ],
)
def test_how_and_where_is_no_identity(override: str, plan_of: PlanOf, base: tuple[str, ...]) -> None:
    before, after = plan_of(*base), plan_of(*base, *override.split())
    assert before.to_json() != after.to_json()
    assert digests(before) == digests(after)


DPO_ON = {"dpo", "eval.dpo", "quantize", "eval.quantize"}
SFT_ON = {"sft", "eval.sft", "dpo.reference"} | DPO_ON
PRETRAIN_ON = {"pretrain", "eval.pretrain"} | SFT_ON
TOKENS = {"tokens.text", "tokens.chat", "tokens.preference"}


@pytest.mark.parametrize(
    ("override", "invalid"),
    [
        ("stage.dpo.beta=0.2", DPO_ON),
        ("stage.dpo.label_smoothing=0.1", DPO_ON),
        ("stage.dpo.optimizer.lr=1e-6", DPO_ON),
        ("stage.dpo.seed=1", DPO_ON),
        ("stage.sft.budget.steps=5", SFT_ON),
        ("stage.sft.precision=bf16", SFT_ON),
        ("stage.pretrain.optimizer=muon", PRETRAIN_ON),
        ("stage.pretrain.budget.steps=5", PRETRAIN_ON),
        ("optimizer.weight_decay=0.5", PRETRAIN_ON),
        ("optimizer.schedule=wsd", PRETRAIN_ON),
        ("precision=bf16", PRETRAIN_ON),
        ("seed=1", PRETRAIN_ON),
        ("model.hidden_size=128", PRETRAIN_ON),
        ("model.rope_theta=20000", PRETRAIN_ON),
        ("model.vocab_size=1024", {"tokenizer"} | TOKENS | PRETRAIN_ON),
        ("model.tokenizer.min_frequency=3", {"tokenizer"} | TOKENS | PRETRAIN_ON),
        ("data.heldout_fraction=0.2", {"data", "tokenizer"} | TOKENS | PRETRAIN_ON),
        ("eval.max_pairs=5", {"eval.pretrain", "eval.sft", "eval.dpo", "eval.quantize"}),
        ("quantize.group_size=16", {"quantize", "eval.quantize"}),
        ("quantize=none", set()),
        ("eval=none", set()),
    ],
)
def test_a_change_reruns_what_it_changes_and_what_follows(override: str, invalid: set[str], plan_of: PlanOf, base: tuple[str, ...]) -> None:
    before, after = plan_of(*base), plan_of(*base, override)
    assert rerun(before, after) == invalid
    assert (rerun(after, before) == invalid) or override in ("quantize=none", "eval=none")


def test_a_shorter_pipeline_is_done_by_the_longer_one(plan_of: PlanOf, rows: Path) -> None:
    data = ("data=text", f"data.path={rows}", "hardware=cpu")
    assert rerun(plan_of("stage=[pretrain,sft,dpo]", *data), plan_of("stage=[pretrain,sft]", *data)) == set()
    assert rerun(plan_of("stage=pretrain", *data), plan_of("experiment=smoke", *data, "stage=pretrain", "stage.pretrain.budget.steps=406")) >= {"pretrain"}


def test_points_of_a_sweep_share_their_data_and_tokens(plan_of: PlanOf, rows: Path) -> None:
    """Four points of the issue's sweep: one data step, one tokenizer, one set of tokens."""
    data = ("stage=pretrain", "data=text", f"data.path={rows}", "hardware=cpu", "stage.pretrain.budget.tokens=200e3")
    points = [plan_of(*data, f"model={model}", f"optimizer.lr={lr}") for model in ("nano", "micro") for lr in ("1e-3", "3e-3")]
    for shared in ("data", "tokenizer", "tokens.text"):
        assert len({digests(point)[shared] for point in points}) == 1
    assert len({digests(point)["pretrain"] for point in points}) == 4


def test_moving_the_data_keeps_its_digest_and_changing_it_does_not(plan_of: PlanOf, rows: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "rows"
    shutil.copytree(rows, moved)
    words = ("stage=[pretrain,sft,dpo]", "data=text", "hardware=cpu")
    here, there = plan_of(*words, f"data.path={rows}"), plan_of(*words, f"data.path={moved}")
    assert digests(here) == digests(there)
    with (moved / "text.jsonl").open("a") as file:
        file.write('{"text": "One more sentence."}\n')
    assert rerun(here, plan_of(*words, f"data.path={moved}")) == {step.name for step in here.steps}


def test_an_alias_changes_only_names(plan_of: PlanOf, rows: Path) -> None:
    """`anneal` is a second pretrain: its digest is that of what it does, not of what it is called."""
    words = ("data=text", f"data.path={rows}", "hardware=cpu")
    alias = plan_of("experiment=anneal_nano", *words)
    plain = plan_of("stage=pretrain", "optimizer.schedule=constant", "stage.pretrain.budget.tokens=1e6", *words)
    assert digests(alias)["pretrain"] == digests(plain)["pretrain"]
    assert digests(alias)["anneal"] != digests(alias)["pretrain"]


def test_a_raised_code_revision_is_another_step(plan_of: PlanOf, base: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A fixed loss bug must not say done."""
    from lmforge.stage.nodes import Dpo

    before = plan_of(*base)
    monkeypatch.setattr(Dpo, "code_revision", Dpo.code_revision + 1)
    assert rerun(before, plan_of(*base)) == DPO_ON


def test_the_diff_names_the_key_and_what_runs_again(plan_of: PlanOf, base: tuple[str, ...]) -> None:
    text = diff(plan_of(*base), plan_of(*base, "stage.dpo.beta=0.2"))
    assert "~ dpo: runs again (beta)" in text
    assert "    beta: 0.1 -> 0.2" in text
    assert "~ eval.dpo: runs again (what it consumes changed)" in text
    assert "sft" not in text
    assert text.endswith("10 of 14 steps are the same in both")


def test_the_diff_names_steps_that_come_and_go(plan_of: PlanOf, base: tuple[str, ...]) -> None:
    text = diff(plan_of(*base), plan_of(*base, "quantize=none"))
    assert "- quantize: gone" in text
    assert diff(plan_of(*base, "quantize=none"), plan_of(*base)).count("new step") == 2
    assert diff(plan_of(*base), plan_of(*base)) == "14 of 14 steps are the same in both"


def test_the_text_of_a_plan_tells_each_steps_status(plan_of: PlanOf, base: tuple[str, ...]) -> None:
    plan = plan_of(*base)
    statuses = {step.name: Status("new") for step in plan.steps} | {"data": Status("done"), "dpo": Status("stale", "beta 0.1 -> 0.2")}
    lines = render(plan, statuses).splitlines()
    assert lines[0].startswith("pretrain-sft-dpo: 14 steps, 1 done; laptop, 8 cores, 16 GiB")
    assert next(line for line in lines if "data [text]" in line).endswith("done; -> corpus")
    assert "stale (beta 0.1 -> 0.2)" in next(line for line in lines if "dpo [dpo]" in line)
    assert all(any(f"{step.name} [{step.stage}]" in line for line in lines) for step in plan.steps)
