"""plan: EXPLAIN. Prints the steps, what is done, and what each takes; nothing runs, and torch is not imported.

--json for scripts: one indented object, or under -m one line for each point. Instead of the plan:
--launch      how to start it on the ranks it wants
--why KEY     which file or override gave a key its value, and what the compiler made of it
--table       parameters, tokens, FLOPs and device-hours of models from 400m to gpt3_175b, on hardware=
--analyze RUN what was predicted of a run's or a step's training, and what was measured
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from lmforge.compiler import compile
from lmforge.compiler.machine import warning
from lmforge.compose import experiment
from lmforge.compose.app import of_job
from lmforge.errors import ConfigError
from lmforge.explain import render
from lmforge.plan import Plan
from lmforge.runtime.submission import hint, launches
from lmforge.runtime.workspace import Workspace
from lmforge.verbs._arguments import QUICKSTART, app_of, hydra_flags

SWITCHES = ("--json", "--launch", "--table")
VALUED = ("--why", "--analyze")  # each followed by its word


def main(argv: Sequence[str]) -> int:
    """Print the plan as a tree, or as JSON, or what is asked of it instead."""
    if {"-h", "--help"} & set(argv):
        print((__doc__ or "").strip())
        return 0
    asked, words = questions(argv)
    as_json = asked.pop("--json", None) is not None
    if len(asked) > 1:
        raise ConfigError(" ".join(asked), "are two questions", "ask one at a time")
    if "--analyze" in asked:
        from lmforge.verbs import _analyze  # what only one question needs is imported for it alone

        print(_analyze.answer(asked["--analyze"], words, as_json))
        return 0
    app, args = app_of(words)
    if hydra_flags(app, args):
        return 0
    many = args.multirun or any(one.key == "sweep" for one in app.typed)
    if asked and (many or as_json):
        raise ConfigError(next(iter(asked)), "is text for one run", f"leave {'--json' if as_json else 'the sweep'} away")
    if many:
        app.multirun(json_point if as_json else point)
    elif "--launch" in asked:
        folder = ["--config-dir", args.config_dir] if args.config_dir else []
        print(launches(compile(experiment(app.compose())), [*folder, *args.overrides]))
    elif "--why" in asked:
        from lmforge.verbs import _why

        print(_why.answer(app, asked["--why"], "" if QUICKSTART in args.overrides else QUICKSTART))
    elif "--table" in asked:
        from lmforge.verbs import _table

        print(_table.answer(args.overrides, args.config_dir))
    else:
        (show_json if as_json else show)(compile(experiment(app.compose())))
    return 0


def questions(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The flags of this verb with their words, wherever they stand, and what is left for Hydra."""
    asked: dict[str, str] = {}
    left: list[str] = []
    words = iter(argv)
    for word in words:
        name, sign, value = word.partition("=")
        if word in SWITCHES:
            asked[word] = ""
        elif name in VALUED:
            found = value if sign else next(words, "")
            if not found or found.startswith("-"):
                raise ConfigError(name, "expects a word after it", f"type {name} {'KEY, such as optimizer.lr' if name == '--why' else 'RUN'}")
            asked[name] = found
        else:
            left.append(word)
    return asked, left


def show(plan: Plan) -> None:
    """The plan with what the store knows of each step."""
    print(render(plan, Workspace(plan.experiment.output).statuses(plan)))
    warn(plan)
    if line := hint(plan):
        print(line)


def show_json(plan: Plan, indent: int | None = 1) -> None:
    """The same as a JSON object; on one line where `indent` is None."""
    statuses = Workspace(plan.experiment.output).statuses(plan)
    plain = plan.to_json()
    for step in plain["steps"]:
        step["status"], step["why"] = statuses[step["name"]].state, statuses[step["name"]].why
    print(json.dumps(plain, indent=indent, ensure_ascii=False, allow_nan=False))
    warn(plan)


def warn(plan: Plan) -> None:
    """Beside the plan: a calibration that it is not timed with."""
    if line := warning(plan):
        print(f"warning: {line}", file=sys.stderr)


def point(config: DictConfig) -> None:
    """One point of a sweep, as text."""
    show(compile(experiment(of_job(config))))


def json_point(config: DictConfig) -> None:
    """One point of a sweep, as a line of JSON."""
    show_json(compile(experiment(of_job(config))), indent=None)
