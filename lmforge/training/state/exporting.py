"""A state, of whatever layout, as a Hugging Face folder."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lmforge.errors import CheckpointError
from lmforge.formats.store import read_json
from lmforge.inference.saving import whole_folder
from lmforge.model.build import REFUSALS
from lmforge.training.state.about import ABOUT, MODEL
from lmforge.training.state.read import WEIGHTS, Saved

FILE_BYTES = 4 * 2**30  # in a file of weights, and so in memory; a layer that is larger is a file of its own
LAYER = re.compile(r".*?\.\d+(?=\.)")

Source = tuple[str, tuple[str, str]]  # a weight's name in the model, and its path in the state


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
    files = _files(_sources(bones, saved, about["prefix"]), saved, file_bytes)
    with whole_folder(out) as partial:
        for path in described.iterdir():
            if path.name not in (ABOUT, "config.json"):
                shutil.copyfile(path, partial / path.name)
        held = {name: _write(partial / name, sources, saved, bones) for name, sources in files.items()}
        if len(held) > 1:
            index = {"metadata": {"total_size": sum(sum(sizes.values()) for sizes in held.values())}}
            weight_map = {weight: name for name, sizes in held.items() for weight in sizes}
            (partial / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": weight_map}, indent=2), encoding="utf-8")
        bones.config.save_pretrained(partial)
    return [out / name for name in files]


def _bones(config: dict[str, Any]) -> Any:
    """The model without memory: the names, shapes and ties of its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    scores = str(config["architectures"][0]).endswith("ForSequenceClassification")
    maker: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    plain = {key: value for key, value in config.items() if key not in ("auto_map", "model_type")}
    with torch.device("meta"):
        return maker.from_config(AutoConfig.for_model(config["model_type"], **plain))


def _sources(bones: Any, saved: Saved, prefix: str) -> list[Source]:
    """Where each weight lies that a folder of this model has; a tied one under whichever of its names the state has."""
    held, tied = saved.keys(), bones.all_tied_weights_keys
    found: list[Source] = []
    for name, bone in bones.state_dict().items():
        if name in tied:
            continue
        names = (name, *(other for other, source in tied.items() if source == name))
        path = next(((WEIGHTS, prefix + one) for one in names if (WEIGHTS, prefix + one) in held), None)
        if path is None or held[path].shape != tuple(bone.shape):
            said = f"is {held[path]}, not {tuple(bone.shape)}" if path else "is not in it"
            what = f"does not hold the whole model: {name} {said}"
            raise CheckpointError(str(saved.folder), what, "run its step to the end: what it makes is complete")
        found.append((name, path))
    dtypes = {held[path].dtype for _, path in found if held[path].dtype.is_floating_point}
    bones.config.dtype = max(dtypes, key=lambda one: one.itemsize)
    return found


def _files(sources: Sequence[Source], saved: Saved, file_bytes: int) -> dict[str, list[Source]]:
    """The sources of each file. A layer is not divided: transformers may join or split its weights on their way to the disk."""
    files: list[list[Source]] = [[]]
    held, room = saved.keys(), file_bytes
    for layer in _layers(sources):
        size = sum(math.prod(held[path].shape) * held[path].dtype.itemsize for _, path in layer)
        if size > room and files[-1]:
            files, room = [*files, []], file_bytes
        files[-1] += layer
        room -= size
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{number:05}-of-{len(files):05}.safetensors": one for number, one in enumerate(files, 1)}


def _layers(sources: Sequence[Source]) -> Iterator[list[Source]]:
    def layer(source: Source) -> str:
        found = LAYER.match(source[0])
        return found[0] if found else source[0]

    for _, group in itertools.groupby(sources, layer):
        yield list(group)


def _write(path: Path, sources: Sequence[Source], saved: Saved, bones: Any) -> dict[str, int]:
    """One file of weights; returns their bytes by their names on disk."""
    from transformers.core_model_loading import revert_weight_conversion

    tree = saved.tree(only=[where for _, where in sources])
    weights: dict[str, Tensor] = revert_weight_conversion(bones, {name: tree[WEIGHTS].pop(where[1]) for name, where in sources})
    try:
        save_file({name: _own(value) for name, value in weights.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise CheckpointError(str(path.parent), f"cannot be written: {error}", "free some space, or give another folder") from error
    return {name: value.nbytes for name, value in weights.items()}


def _own(value: Tensor) -> Tensor:
    """The tensor in memory of its own, for what transformers splits are views of one."""
    return value.contiguous() if value.untyped_storage().nbytes() == value.nbytes else value.clone(memory_format=torch.contiguous_format)
