"""A state, of whatever layout, as a Hugging Face folder."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmforge.errors import CheckpointError
from lmforge.formats.store import read_json
from lmforge.inference.saving import whole_folder
from lmforge.model.construct import REFUSALS
from lmforge.model.writing import FILE_BYTES, files, write_file, write_index
from lmforge.training.state.about import ABOUT, MODEL
from lmforge.training.state.read import WEIGHTS, Saved

Source = tuple[str, str]  # a weight's path in the state


def release(saved: Saved, out: Path, file_bytes: int = FILE_BYTES) -> list[Path]:
    """Write `out`, atomically, with one file's weights in memory at a time, each in the dtype it is trained in; returns the files of weights.

    Tied weights are written once. CheckpointError where the state has not all weights of a model: an adapter's, or those of a stage that froze some.
    """
    described = saved.folder / MODEL
    if not (described / "config.json").is_file():
        raise CheckpointError(str(saved.folder), "does not say what model it is of: it has no model/config.json", "run the step to its end")
    about = read_json(described / ABOUT)
    if about["adapter"]:
        raise CheckpointError(str(saved.folder), "holds an adapter, not a model", "run its step to the end, then type: lmforge merge <step> <folder>")
    try:
        bones = _bones(read_json(described / "config.json"))
    except REFUSALS as error:
        raise CheckpointError(str(described / "config.json"), f"transformers refuses it: {error}", "run the step to its end") from error
    sources, kept = _sources(bones, saved, about["prefix"]), saved.keys()
    planned = files({name: math.prod(kept[path].shape) * kept[path].dtype.itemsize for name, path in sources.items()}, file_bytes)
    with whole_folder(out) as partial:
        for path in described.iterdir():
            if path.name not in (ABOUT, "config.json"):
                shutil.copyfile(path, partial / path.name)
        held = {file: write_file(partial / file, _read(saved, {name: sources[name] for name in names}), bones) for file, names in planned.items()}
        write_index(partial, held)
        bones.config.save_pretrained(partial)
    return [out / name for name in planned]


def _read(saved: Saved, sources: Mapping[str, Source]) -> dict[str, Tensor]:
    tree = saved.tree(only=list(sources.values()))
    return {name: tree[WEIGHTS].pop(where[1]) for name, where in sources.items()}


def _bones(config: dict[str, Any]) -> Any:
    """The model without memory: the names, shapes and ties of its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    scores = str(config["architectures"][0]).endswith("ForSequenceClassification")
    maker: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    plain = {key: value for key, value in config.items() if key not in ("auto_map", "model_type")}
    with torch.device("meta"):
        return maker.from_config(AutoConfig.for_model(config["model_type"], **plain))


def _sources(bones: Any, saved: Saved, prefix: str) -> dict[str, Source]:
    """Where each weight lies that a folder of this model has; a tied one under whichever of its names the state has."""
    held, tied = saved.keys(), bones.all_tied_weights_keys
    found: dict[str, Source] = {}
    for name, bone in bones.state_dict().items():
        if name in tied:
            continue
        names = (name, *(other for other, source in tied.items() if source == name))
        path = next(((WEIGHTS, prefix + one) for one in names if (WEIGHTS, prefix + one) in held), None)
        if path is None or held[path].shape != tuple(bone.shape):
            said = f"is {held[path]}, not {tuple(bone.shape)}" if path else "is not in it"
            what = f"does not hold the whole model: {name} {said}"
            raise CheckpointError(str(saved.folder), what, "run its step to the end: what it makes is complete")
        found[name] = path
    dtypes = {held[path].dtype for path in found.values() if held[path].dtype.is_floating_point}
    bones.config.dtype = max(dtypes, key=lambda one: one.itemsize)
    return found
