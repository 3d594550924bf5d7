"""A real Hydra application with one door more: nothing that `hydra.*` names is instantiated before it is looked at.

Hydra imports and calls every `_target_` under its own config (launcher, sweeper, callbacks). Each is resolved to the
object it names, so that no alias slips by, and compared with an exact list.
"""

from __future__ import annotations

import contextlib
import importlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.defaults_list import DefaultsList
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lmforge.compose.catalog import Catalog
from lmforge.compose.merge import CONFIG, merged
from lmforge.compose.messages import problem
from lmforge.compose.overrides import Typed, translate
from lmforge.errors import ConfigError

ALLOWED = (
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
    "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
)
# A config must not read the environment or files: secrets would travel into plans and logs.
RESOLVERS = ("oc.env", "oc.decode", "oc.deprecated")
OF_SWEEPS = ("hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweeper", "hydra.sweep.")


@dataclass(frozen=True)
class Composed:
    """A composed config as plain data, with the options chosen and what was typed."""

    config: dict[str, Any]
    choices: dict[str, Any]
    typed: tuple[Typed, ...]
    catalog: Catalog = field(repr=False)


class GuardedHydra(Hydra):
    """Hydra that looks at its own `_target_`s before it instantiates any."""

    def compose_config(self, *args: Any, **kwargs: Any) -> DictConfig:
        """As Hydra's; ConfigError for a target that is not on the list."""
        close_resolvers()
        config = super().compose_config(*args, **kwargs)
        _guard(OmegaConf.to_container(config, resolve=False)["hydra"], "hydra")  # type: ignore[index, call-overload]
        return config


def close_resolvers() -> None:
    """Take away the resolvers that read from outside the config."""
    for name in RESOLVERS:
        OmegaConf.clear_resolver(name)


def _guard(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "_target_":
                _guard_target(str(inner), f"{where}._target_")
            _guard(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _guard(inner, f"{where}[{index}]")


def _guard_target(target: str, where: str) -> None:
    if target in ALLOWED and _resolve(target) in (target, ""):
        return
    raise ConfigError(where, f"{target!r} is not run from a config", "Hydra's basic, joblib and submitit launchers are what can be named here")


def _resolve(target: str) -> str:
    """The full name of the object itself, which an alias cannot fake; empty where its package is not installed."""
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except ImportError:
        return ""
    return f"{found.__module__}.{found.__qualname__}"


class App:
    """conf/ as a Hydra application. Use as a context manager: Hydra's state is global."""

    def __init__(self, overrides: list[str], config_dir: str | None = None) -> None:
        self.catalog = Catalog.of(config_dir)
        if broken := list(self.catalog.broken()):
            raise ConfigError.of(broken)
        self.typed = tuple(translate(overrides, self.catalog))

    @property
    def overrides(self) -> list[str]:
        """What Hydra gets."""
        return [one.hydra for one in self.typed]

    @contextlib.contextmanager
    def hydra(self) -> Iterator[GuardedHydra]:
        """A guarded Hydra over the catalog, its errors made ours."""
        first, *others = self.catalog.folders
        path = create_config_search_path(f"file://{first}")
        for folder in others:
            path.prepend("lmforge", f"file://{folder}", anchor=SearchPathQuery(provider="schema"))
        GlobalHydra.instance().clear()
        try:
            with readable_errors():
                yield GuardedHydra.create_main_hydra2("lmforge", path)  # type: ignore[misc]
        finally:
            GlobalHydra.instance().clear()

    def compose(self) -> Composed:
        """One config, for one run. ConfigError where what starts the points of a sweep was chosen for it."""
        if (found := merged(self.catalog, self.typed)) is not None:
            return Composed(found.config, found.choices, self.typed, self.catalog)
        with self.hydra() as hydra:
            config = hydra.compose_config(CONFIG, self.overrides, run_mode=RunMode.RUN, with_log_configuration=False)
            if idle := next((one.key for one in self.typed if one.key.startswith(OF_SWEEPS)), None):
                raise ConfigError(idle, "is for the points of a sweep, and this is one run, here", "add -m, or leave it away")
            own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
            return _composed(own, config.hydra, self.typed, self.catalog)

    def defaults(self) -> DefaultsList:
        """The files that `compose` merges, lowest first, each with its place in the config and what chose it."""
        with self.hydra() as hydra:
            found: DefaultsList = hydra.config_loader.compute_defaults_list(CONFIG, self.overrides, run_mode=RunMode.RUN)
            return found

    def multirun(self, task: Callable[[DictConfig], Any]) -> Any:
        """Hydra's own multirun, launchers and sweepers included; it leaves no file of its own."""
        with tempfile.TemporaryDirectory(prefix="lmforge-sweep-") as scratch, self.hydra() as hydra:
            typed = self.overrides
            if not any(one.startswith("hydra.sweep.dir=") for one in typed):
                typed = [*typed, f"hydra.sweep.dir={scratch}"]
            return hydra.multirun(CONFIG, task, typed, with_log_configuration=False)


def of_job(config: DictConfig) -> Composed:
    """What a sweep's job was composed to, in whichever process the launcher runs it."""
    hydra = HydraConfig.get()
    folders = [Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file"]
    with readable_errors():
        return _composed(config, hydra, tuple(Typed.of_hydra(one) for one in hydra.overrides.task), Catalog(tuple(folders)))


def _composed(own: DictConfig, hydra: Any, typed: tuple[Typed, ...], catalog: Catalog) -> Composed:
    """Plain data, interpolations resolved."""
    close_resolvers()
    plain: Any = OmegaConf.to_container(own, resolve=True)
    choices: Any = OmegaConf.to_container(hydra.runtime.choices)
    return Composed(plain, choices, typed, catalog)


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Hydra's, OmegaConf's and YAML's errors as one line of ours."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError.of([problem(error)]) from error
