"""plan: EXPLAIN. Prints the steps, what is done, and what each takes; nothing runs, and torch is not imported.

--json for scripts: one indented object, or under -m one line for each point. --launch: how to start it on the ranks it wants, instead.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from omegaconf import DictConfig

from lmforge.compiler import compile
from lmforge.compose import experiment
from lmforge.compose.app import of_job
from lmforge.errors import ConfigError
from lmforge.explain import render
from lmforge.plan import Plan
from lmforge.runtime.submission import hint, launches
from lmforge.runtime.workspace import Workspace
from lmforge.verbs._arguments import app_of, hydra_flags


def main(argv: Sequence[str]) -> int:
    """Print the plan as a tree, or as JSON, or how it is launched."""
    as_json, to_launch = "--json" in argv, "--launch" in argv
    app, args = app_of([word for word in argv if word not in ("--json", "--launch")])
    if hydra_flags(app, args):
        return 0
    many = args.multirun or any(one.key == "sweep" for one in app.typed)
    if to_launch and (many or as_json):
        raise ConfigError("--launch", "is text for one run", f"leave {'--json' if as_json else 'the sweep'} away")
    if to_launch:
        folder = ["--config-dir", args.config_dir] if args.config_dir else []
        print(launches(compile(experiment(app.compose())), [*folder, *args.overrides]))
        return 0
    if many:
        app.multirun(json_point if as_json else point)
        return 0
    show_one = show_json if as_json else show
    show_one(compile(experiment(app.compose())))
    return 0


def show(plan: Plan) -> None:
    """The plan with what the store knows of each step."""
    print(render(plan, Workspace(plan.experiment.output).statuses(plan)))
    if line := hint(plan):
        print(line)


def show_json(plan: Plan, indent: int | None = 1) -> None:
    """The same as a JSON object; on one line where `indent` is None."""
    statuses = Workspace(plan.experiment.output).statuses(plan)
    plain = plan.to_json()
    for step in plain["steps"]:
        step["status"], step["why"] = statuses[step["name"]].state, statuses[step["name"]].why
    print(json.dumps(plain, indent=indent, ensure_ascii=False, allow_nan=False))


def point(config: DictConfig) -> None:
    """One point of a sweep, as text."""
    show(compile(experiment(of_job(config))))


def json_point(config: DictConfig) -> None:
    """One point of a sweep, as a line of JSON."""
    show_json(compile(experiment(of_job(config))), indent=None)
