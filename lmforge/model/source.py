"""Where named weights are: a local folder or a hub id, and its config.json, read without torch or transformers.

A hub id may be pinned: `org/name@<commit>`. It is looked up in the local Hugging Face cache first, and downloaded only when
it is not there. Without a commit it means the hub's newest: a plan reads the config.json of whatever `main` the local cache
holds, and the step that fetches the weights asks the hub again and records the commit it got.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmforge.errors import CheckpointError, ConfigError
from lmforge.formats.store import hub_cache, hub_id, hub_repository
from lmforge.model.families import known


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


def pinned(source: str, revision: str | None) -> tuple[str, str | None]:
    """A hub id without its `@<commit>`, and the revision that is meant: that commit, or else `revision`."""
    name, commit = hub_id(source) or (source, None)
    return name, commit or revision


def snapshot(source: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The files of a hub id that match, in the local cache: a folder named after the commit. CheckpointError where the hub does not answer."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    name, commit = pinned(source, revision)
    try:
        return Path(snapshot_download(name, revision=commit, allow_patterns=list(patterns)))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        what = f"not in the local cache and the hub did not answer ({type(error).__name__})"
        raise CheckpointError(source, what, "give a local folder, or run once with a network") from error


def _commit(repository: Path, revision: str | None) -> str | None:
    """What `revision` (a branch, a tag or a commit) stands for in the cache."""
    name = revision or "main"
    reference = repository / "refs" / name
    if reference.is_file():
        return reference.read_text(encoding="utf-8").strip()
    return name if (repository / "snapshots" / name).is_dir() else None


def _hub_config(source: str, revision: str | None, where: str) -> Path:
    if hub_id(source) is None:
        what = f"{source!r} is neither a folder that exists nor a hub id"
        raise ConfigError(where, what, "a hub id reads org/name, or org/name@<commit> with all its 40 hex digits")
    name, revision = pinned(source, revision)
    repository = hub_repository(name)
    commit = _commit(repository, revision)
    cached = repository / "snapshots" / (commit or "main") / "config.json"
    return cached if cached.is_file() else _download_config(name, revision, where)


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
