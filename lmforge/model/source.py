"""Where named weights are: a local folder or a hub id, and its config.json, read without torch or transformers.

A hub id is looked up in the local Hugging Face cache first, by huggingface_hub's own rules (HF_HUB_CACHE, HF_HOME,
XDG_CACHE_HOME), and downloaded only when it is not there.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from lmforge.errors import ConfigError
from lmforge.model.families import known

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def local_folder(source: str) -> Path | None:
    """The folder a source names, or None for a hub id; a folder that exists wins over a hub id of the same name."""
    folder = Path(source).expanduser()
    if folder.is_dir() or source.startswith(("/", "./", "../", "~")) or source in (".", ".."):
        return folder
    return None


def read_config(source: str, revision: str | None, where: str) -> dict[str, Any]:
    """The config.json of a local folder or hub id; ConfigError in one line for what is missing, bad, or needs remote code."""
    folder = local_folder(source)
    path = folder / "config.json" if folder else _hub_config(source, revision, where)
    if not path.is_file():
        raise ConfigError(where, f"{source} has no config.json", "name a folder that holds one, or a hub id such as allenai/OLMo-2-0425-1B")
    try:
        config = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (OSError, ValueError) as error:
        raise ConfigError(where, f"{path} cannot be read: {error}", "restore the file") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ConfigError(where, f"{path} names no model_type", "it must be the config.json of a transformers model")
    if config.pop("auto_map", None) and config["model_type"] not in known():
        what = f"{source} needs code of its own (auto_map) for model_type {config['model_type']!r}, which is never run"
        raise ConfigError(where, what, f"known: {', '.join(known())}")
    return config


def hub_cache() -> Path:
    """The hub's cache folder, by huggingface_hub's rules."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.expandvars(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))).expanduser()


def _repository(source: str) -> Path:
    return hub_cache() / f"models--{source.replace('/', '--')}"


def _commit(repository: Path, revision: str | None) -> str | None:
    """What `revision` (a branch, a tag or a commit) stands for in the cache."""
    name = revision or "main"
    reference = repository / "refs" / name
    if reference.is_file():
        return reference.read_text(encoding="utf-8").strip()
    return name if (repository / "snapshots" / name).is_dir() else None


def _hub_config(source: str, revision: str | None, where: str) -> Path:
    if not HUB_ID.fullmatch(source):
        raise ConfigError(where, f"{source!r} is neither a folder that exists nor a hub id", "a hub id reads org/name")
    repository = _repository(source)
    commit = _commit(repository, revision)
    cached = repository / "snapshots" / (commit or "main") / "config.json"
    return cached if cached.is_file() else _download_config(source, revision, where)


def _download_config(source: str, revision: str | None, where: str) -> Path:
    from huggingface_hub import snapshot_download  # gives up at once offline; hf_hub_download retries for 23 s
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=["config.json"])) / "config.json"
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        at = f"{source} at {revision}" if revision else source
        what = f"{at} is no local folder, is not in {hub_cache()}, and the hub did not answer ({type(error).__name__})"
        raise ConfigError(where, what, "give a local folder, or run once with a network") from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")
