"""What a word on the command line means where weights are asked for: a checkpoint, an adapter on it, or both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lmforge.errors import CheckpointError, ConfigError
from lmforge.formats import store
from lmforge.inference.base import identify, read_base
from lmforge.inference.checkpoint import is_adapter

KINDS = ("checkpoint", "adapter")


def weights_of(reference: str, output: str) -> tuple[str, Path | None]:
    """(checkpoint, adapter on it or None): of a run the last it made, be it a checkpoint or an adapter, whose base is looked for."""
    folder = _newest(reference, output)
    if folder is None or folder.name == "checkpoint":
        return (str(folder) if folder else store.checkpoint_of(reference, output)), None
    return str(base_of(folder, output, None)), folder


def adapter_of(reference: str, output: str) -> Path:
    """The PEFT folder that a PEFT folder, a step, a run or a digest means."""
    path = Path(reference)
    if is_adapter(path):
        return path
    if path.is_dir() and not any((path / file).is_file() for file in (store.RUN_FILE, store.STEP_FILE)):
        raise ConfigError(reference, "not an adapter folder: it has no adapter_config.json", "give a PEFT folder, or a step that trained an adapter")
    made = [folder for folder in _made(store.find(reference, output, also="or give a PEFT folder")) if folder.name == "adapter"]
    if not made:
        raise ConfigError(reference, "made no adapter", "give a step that ran with adapter=lora or another")
    return made[-1]


def base_of(adapter: Path, output: str, given: str | None) -> Path:
    """The checkpoint an adapter was trained on: the one given, else the one it names or its step was given, if its fingerprint is still the same."""
    if given is not None:
        return Path(store.checkpoint_of(given, output))
    said = read_base(adapter)
    for folder in _candidates(adapter):
        if (folder / "config.json").is_file() and (said is None or identify(folder)[0] == said.fingerprint):
            return folder
    raise CheckpointError(str(adapter), "the base it was trained on is not where it was", "type --base <the checkpoint it was trained on>")


def _candidates(adapter: Path) -> Iterator[Path]:
    """The folder that adapter_config.json names, then checkpoints of steps named as the inputs of the step that trained the adapter."""
    if named := store.read_json(adapter / "adapter_config.json").get("base_model_name_or_path"):
        yield Path(str(named))
    step = adapter.parent
    if (step / store.STEP_FILE).is_file():
        for one in store.read_json(step / store.STEP_FILE)["step"]["inputs"]:
            if one["kind"] == "checkpoint":
                yield from sorted(step.parent.glob(f"{one['step']}-*/checkpoint"))


def _newest(reference: str, output: str) -> Path | None:
    """The last checkpoint or adapter of a run or a step; an adapter folder itself; None for what is neither, which `checkpoint_of` knows or refuses."""
    if is_adapter(Path(reference)):
        return Path(reference)
    try:
        made = _made(store.find(reference, output))
    except ConfigError:
        return None
    return made[-1] if made else None


def _made(folder: Path) -> list[Path]:
    """The checkpoints and adapters of a run in the order they were made, or of a step; quantized ones are not trained on from."""
    steps = [folder]
    if (folder / store.RUN_FILE).is_file():
        named = store.read_json(folder / store.RUN_FILE)["steps"]
        steps = [folder.parent.parent / "steps" / name for name in named if not name.startswith("quantize")]
    found = [step / kind for step in steps for kind in KINDS]
    return [one for one in found if (one / "config.json").is_file() or is_adapter(one)]
