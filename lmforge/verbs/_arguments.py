"""What every verb that takes overrides shares: Hydra's own flags, the quickstart by default, one composition."""

from __future__ import annotations

import argparse
import os
from collections.abc import MutableMapping, Sequence

from hydra._internal.utils import get_args_parser

from lmforge.compose import App, Composed, experiment
from lmforge.compose.merge import CONFIG
from lmforge.errors import ConfigError
from lmforge.experiment import Experiment

CHOOSES_A_PIPELINE = ("stage", "experiment", "sweep")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError("command line", message, "see python -m lmforge --help")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Hydra's flags and the overrides; ConfigError for a flag nobody knows."""
    parser = get_args_parser()
    parser.__class__ = _Parser
    args = parser.parse_intermixed_args(list(argv))  # flags may stand among the overrides
    for flag in ("config_name", "config_path", "experimental_rerun"):
        if getattr(args, flag) is not None:
            raise ConfigError(f"--{flag.replace('_', '-')}", "is not read: there is one root config", "add options of your own with --config-dir")
    return args


QUICKSTART = "experiment=quickstart"


def with_quickstart(overrides: list[str]) -> list[str]:
    """The overrides, with the quickstart where neither a stage nor an experiment is chosen."""
    heads = {one.lstrip("+~").partition("=")[0].split("@")[0] for one in overrides}
    return overrides if heads & set(CHOOSES_A_PIPELINE) else [*overrides, QUICKSTART]


def app_of(argv: Sequence[str]) -> tuple[App, argparse.Namespace]:
    """The application for a command line."""
    args = parse(argv)
    # Completion's own words (install=bash, query=bash) are not overrides.
    return App([] if args.shell_completion else with_quickstart(args.overrides), args.config_dir), args


def composed(argv: Sequence[str]) -> tuple[Composed, Experiment]:
    """One run's config and what it means."""
    app, _ = app_of(argv)
    one = app.compose()
    return one, experiment(one)


def hydra_flags(app: App, args: argparse.Namespace) -> bool:
    """Do what --help, --cfg, --info, --hydra-help or --shell-completion asks; False where none is given."""
    if not (args.hydra_help or args.cfg or args.info or args.shell_completion):
        return False
    with app.hydra() as hydra:
        if args.hydra_help:
            hydra.hydra_help(CONFIG, args_parser=get_args_parser(), args=args)
        elif args.cfg:
            hydra.show_cfg(CONFIG, app.overrides, cfg_type=args.cfg, package=args.package, resolve=args.resolve)
        elif args.info:
            hydra.show_info(args.info, CONFIG, app.overrides)
        else:
            without_verb(os.environ)
            hydra.shell_completion(CONFIG, args.overrides)
    return True


def without_verb(environment: MutableMapping[str, str]) -> None:
    """Take the verb out of the line being completed: Hydra's completion knows overrides only."""
    words = environment.get("COMP_LINE", "").split(" ")
    if len(words) > 2 and "=" not in words[1] and not words[1].startswith("-"):
        environment["COMP_LINE"] = " ".join([words[0], *words[2:]])
