"""`plan --table`: what models of round sizes take on the hardware given. N, 20N tokens and 6ND are formulae; expected device-hours are those of the plan of
each size's option, scaled from its FLOPs to these."""

from __future__ import annotations

from collections.abc import Sequence

from lmforge.compiler import compile
from lmforge.compose import App, experiment
from lmforge.compose.catalog import Catalog
from lmforge.errors import ConfigError, PlanError
from lmforge.explain.words import columns, plain, short
from lmforge.hardware.nodes import Machine
from lmforge.model.weights import count
from lmforge.plan import Cost
from lmforge.predict.table import Row, rows

READ = ("hardware", "parallel", "precision", "optimizer", "output")
HEAD = ("model", "N", "20N tokens", "6ND FLOPs", "at peak, device-hours", "as planned, device-hours", "MFU", "the option's own parameters")
SHARDED = ("auto", "fsdp")  # parallel where none is typed: the first there is, for large models do not fit one device


def answer(overrides: Sequence[str], config_dir: str | None) -> str:
    """The table, and why where an option has no plan here. ConfigError for an override that it would not read."""
    for word in overrides:
        if _group(word) not in READ:
            raise ConfigError(word, "is not read by --table, whose sizes and tokens are fixed", f"type {', '.join(f'{one}=' for one in READ)}")
    machine = experiment(App([*overrides, "stage=pretrain"], config_dir).compose()).hardware.machine()
    words = [*overrides, *_chosen(overrides, machine, config_dir)]
    lines, refused = [], []
    for row in rows():
        cost, why = _cost(row, words, config_dir)
        refused.extend([f"{row.option}: {why}"] if why else [])
        lines.append(_line(row, _peak(machine, words), cost))
    head = f"{machine.name}: {machine.devices} x {machine.accelerator}; {' '.join(words)}"
    return "\n".join([head, *columns(HEAD, lines), *refused])


def _group(word: str) -> str:
    return word.lstrip("+~").partition("=")[0].partition("@")[0].replace("/", ".").partition(".")[0]


def _chosen(overrides: Sequence[str], machine: Machine, config_dir: str | None) -> list[str]:
    """What is added to the words typed: 16 bits where the machine has them, and weights that are spread."""
    groups, known = {_group(word) for word in overrides}, Catalog.of(config_dir).options["parallel"]
    precision = [] if "precision" in groups or machine.peak_flops.of("bfloat16") is None else ["precision=bf16"]
    return [*precision, *([] if "parallel" in groups else [f"parallel={next(one for one in SHARDED if one in known)}"])]


def _cost(row: Row, words: Sequence[str], config_dir: str | None) -> tuple[Cost, str]:
    """The cost of pretraining the option on 20 tokens a parameter, which is the stage's own budget; or why there is no such plan."""
    app = App([*words, "stage=pretrain", "stage.pretrain.budget.tokens_per_parameter=20", f"model={row.option}", "eval=none"], config_dir)
    meant = experiment(app.compose())
    try:
        return compile(meant).step("pretrain").cost, ""
    except PlanError as error:
        return Cost(params_total=count(meant.model.config()).total), error.problems[0].what


def _peak(machine: Machine, words: Sequence[str]) -> float | None:
    dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    named = [dtype[word.partition("=")[2]] for word in words if word.partition("=")[0] == "precision" and word.partition("=")[2] in dtype]
    return machine.peak_flops.of(named[-1] if named else "float32")


def _line(row: Row, peak: float | None, cost: Cost) -> tuple[str, ...]:
    least = plain(row.hours_at(peak)) if peak else "-"
    expected = plain(cost.device_hours * row.flops / cost.train_flops) if cost.device_hours is not None and cost.train_flops else "-"
    mfu = cost.mfu
    own = "-" if cost.params_total is None else f"{cost.params_total:,}"
    figures = (short(row.parameters), short(row.tokens), f"{row.flops:.3g}", least, expected, "-" if mfu is None else f"{mfu:.2f}", own)
    return (row.option, *figures)
