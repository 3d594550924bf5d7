"""No inert key: every key of every option changes what is planned or is read by the code that runs, and YAML and classes agree.

Each key is set to other valid values. A key that says what a step *is* must change a digest; one that says how or where it
runs must not. And each must be seen to matter beyond its own echo: in a placement, a cost, the arithmetic, the strategy's
arguments, the plan's text; or, for what only training sees, by being read in the code (`Reads`), checks not counted.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmforge.codec import decode, encode
from lmforge.compiler import compile
from lmforge.compose import App, experiment
from lmforge.errors import LmforgeError
from lmforge.experiment import Experiment
from lmforge.explain import Status, render
from lmforge.plan import Plan
from lmforge.registry import Key
from tests.keys.options import NAMES, OPTIONS, Leaf, alternatives, changed, leaves, node_of, numbers, places
from tests.keys.reads import PACKAGE, Reads
from tests.keys.world import World

# Keys that say where content lies: moving it changes nothing, other content changes the digest.
NAMES_CONTENT = {
    "model": {"pretrained", "revision"},
    "data": {"path", "exclude", "name", "revision"},
    "stage": {"init_from", "reward_from"},
    "eval": {"include_path"},
}


def effects(plan: Plan) -> tuple[Any, ...]:
    """What a plan is beyond the echo of its keys."""
    steps = [
        (step.name, step.stage, step.inputs, step.placement, step.cost, step.content, step.arithmetic, emitted(step.spec, step.group)) for step in plan.steps
    ]
    return (steps, render(plan, {step.name: Status("new") for step in plan.steps}))


def emitted(spec: Any, group: str) -> Any:
    """What the parallel option hands to the back end; a node that the compiler made itself, whole."""
    parallel = getattr(spec, "parallel", None)
    return parallel.strategy_args() if parallel is not None else spec if group == "step" else None


def digests(plan: Plan) -> dict[str, str]:
    return {step.name: step.digest for step in plan.steps}


@functools.cache
def reads() -> Reads:
    return Reads.of(PACKAGE)


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=NAMES)
def test_no_key_is_inert(group: str, option: str, world: World) -> None:
    """Every key of the option, set to every other valid value we can think of, changes what it should and nothing else."""
    wrong = []
    for stages, paths in (("[pretrain,sft]", None), ("sft", {"pretrained", "revision"})) if group == "model" else (("[pretrain,sft]", None),):
        plain = encode(experiment(App(world.base(group, option, stages)).compose()))
        before = compile(decode(Experiment, plain))
        for leaf in leaves(node_of(group, option), places(plain, group, option)[0]):
            wanted = leaf.path in paths if paths else group != "model" or leaf.path not in ("pretrained", "revision")
            if wanted and leaf.path not in alone(group, option) and (complaint := complain(leaf, plain, before, group, option, world)):
                wrong.append(complaint)
    assert wrong == []


# Keys that have no other valid value beside the rest of an option: another option of the same type shows that they are live.
ALONE: dict[tuple[str, str], set[str]] = {
    ("precision", "fp32"): {"param_dtype", "loss_scale"},
    ("precision", "bf16"): {"loss_scale"},
    ("precision", "fp16"): {"param_dtype", "compute_dtype"},
    ("parallel", "deepspeed_zero1"): {"offload_parameters"},
    ("parallel", "deepspeed_zero2"): {"offload_parameters"},
    **{("parallel", one): {"pp_schedule"} for one in ("fsdp", "fsdp_zero2", "hsdp", "tp", "fsdp_tp")},  # there are no stages to schedule
}
# Axes that nothing runs on: any other value is refused (tests/test_bad_input.py), with the reason.
REFUSED = {"cp"}
VIEW = ("data", "hf", "view")  # another view is another stage's: see its own test


def alone(group: str, option: str) -> set[str]:
    """Keys of an option that are looked at elsewhere."""
    return ALONE.get((group, option), set()) | (REFUSED if group == "parallel" else set()) | ({VIEW[2]} if (group, option) == VIEW[:2] else set())


def test_what_one_option_cannot_show_another_does() -> None:
    """Every exception of ALONE is covered by an option of the same type that makes none."""
    for (group, option), paths in ALONE.items():
        same = [other for one, other in OPTIONS if one == group and node_of(group, other) is node_of(group, option)]
        for path in paths:
            assert any(path not in ALONE.get((group, other), set()) for other in same), (group, option, path)


def test_the_view_of_a_hub_data_set_decides_which_stage_may_read_it(world: World) -> None:
    """`data.view=chat` makes rows for SFT out of the same data set, and pretraining refuses them."""
    base = ["data=hf", "eval=none", "hardware=h200x8"]
    sft = [*base, "stage=sft", f"stage.sft.init_from={world.weights}"]
    assert attempt(encode(experiment(App([*base, "stage=pretrain"]).compose()))) is not None
    assert attempt(encode(experiment(App([*base, "stage=pretrain", "data.view=chat"]).compose()))) is None
    assert attempt(encode(experiment(App(sft).compose()))) is None
    assert attempt(encode(experiment(App([*sft, "data.view=chat"]).compose()))) is not None


def complain(leaf: Leaf, plain: dict[str, Any], before: Plan, group: str, option: str, world: World) -> str:
    """What is wrong with a key, or an empty string."""
    value = functools.reduce(lambda at, name: at[name], leaf.path.split("."), places(plain, group, option)[0])
    tried = [one for one in (*world.special(leaf), *alternatives(leaf, value)) if one != value or type(one) is not type(value)]
    plans = [plan for one in tried if (plan := attempt(changed(plain, group, option, leaf, one))) is not None]
    if not plans:
        return f"{leaf.path}: no valid alternative among {tried}"
    if all(plan.to_json() == before.to_json() for plan in plans):
        return f"{leaf.path}: no value changes the plan at all"
    named = leaf.name in NAMES_CONTENT.get(group, set())
    moved = [plan for plan in plans if digests(plan) != digests(before)]
    if (leaf.identity or named) and not moved:
        return f"{leaf.path}: is identity, and changes no digest"
    if not leaf.identity and not named and moved:
        return f"{leaf.path}: is no identity, and changes a digest"
    if all(effects(plan) == effects(before) for plan in plans) and not reads().live(leaf.cls, leaf.name):
        return f"{leaf.path}: nothing reads {leaf.cls.__name__}.{leaf.name}"
    return ""


def attempt(plain: dict[str, Any]) -> Plan | None:
    """The plan, or None where the values do not go together."""
    try:
        return compile(decode(Experiment, plain))
    except LmforgeError:
        return None


ROOT_KEYS: list[tuple[str, str, bool]] = [("seed", "seed=1", True), ("name", "name=other", False), ("output", "output=elsewhere", False)]


@pytest.mark.parametrize(("key", "override", "identity"), ROOT_KEYS, ids=[row[0] for row in ROOT_KEYS])
def test_root_keys_are_live(key: str, override: str, identity: bool, plan_of: Callable[..., Plan], rows: Path) -> None:
    """The seed is identity; what the run is called and where it is kept are not."""
    base = ["stage=pretrain", "data=text", f"data.path={rows}", "hardware=cpu"]
    before, after = plan_of(*base), plan_of(*base, override)
    assert before.to_json() != after.to_json()
    assert (digests(before) != digests(after)) is identity


def test_numbers_stay_in_range() -> None:
    """The oracle's own candidates respect the bounds and are finite."""
    about = Key("a share", gt=0, lt=1)
    found = list(numbers(about, 0.5, float))
    assert found
    assert all(0 <= one <= 1 and math.isfinite(one) for one in found)
