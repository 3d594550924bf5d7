"""Weights in safetensors files, read a part at a time under the model's names, which transformers may have others for on disk."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lmforge.errors import CheckpointError
from lmforge.model.parts import Part, sliced

Source = tuple[str, str, Path]  # the pattern of a converter that it fits, its name on disk, its file


def stored(bones: Any, folder: Path, files: Sequence[Path]) -> tuple[dict[str, Part], dict[str, set[str]]]:
    """How each weight of a transformers model on the meta device is read, and what is wrong: names by `from_pretrained`'s kinds.

    A tensor that lies in the files as the model has it is read by its slices alone. One that transformers makes of others (experts that are stacked) is
    made whole by its own converters, and cut. Names, ties and what may be left out are transformers' business too. Only headers are read here.
    """
    shapes = bones.state_dict()
    parts, unexpected = _matched(bones, {name: file for file in files for name in names_in(file)})
    for target, source in bones.all_tied_weights_keys.items():
        for one, other in ((target, source), (source, target)):
            if one in parts:
                parts.setdefault(other, parts[one])
    report = SimpleNamespace(missing_keys=shapes.keys() - parts.keys(), unexpected_keys=unexpected)
    bones._adjust_missing_and_unexpected_keys(report)
    other = {name for name, part in parts.items() if isinstance(part, _Plain) and part.shape() != tuple(shapes[name].shape)}
    return parts, {"missing_keys": report.missing_keys, "unexpected_keys": report.unexpected_keys, "mismatched_keys": other}


def tied_apart(bones: Any, parts: dict[str, Part]) -> bool:
    """Whether the files hold other values for weights that the config ties: transformers then unties them, which takes the whole model."""
    pairs = [(parts[one], parts[other]) for one, other in bones.all_tied_weights_keys.items() if one in parts and other in parts]
    return any(one is not other and not torch.equal(one(()), other(())) for one, other in pairs)


def _matched(bones: Any, where: dict[str, Path]) -> tuple[dict[str, Part], set[str]]:
    """The parts that the tensors in the files make, by the model's names, and the names that fit none: as `from_pretrained` matches them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    shapes, mapping = bones.state_dict(), get_model_conversion_mapping(bones)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    parts, unexpected = dict[str, Part](), set[str]()
    for key in sorted(where, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, bones.base_model_prefix, shapes)
        if name not in shapes and key in shapes:
            name, pattern = key, None
        if name not in shapes:
            unexpected.add(name)
        elif pattern is None:
            parts[name] = _Plain(key, where[key])
        else:
            converter = by_pattern[pattern]
            made = parts.setdefault(name, _Made(bones, name, name, converter, []))
            assert isinstance(made, _Made)
            made.sources.append((pattern, key, where[key]))
            for target in converter.target_patterns[1:]:
                other = name.replace(converter.target_patterns[0], target)
                parts[other] = _Made(bones, name, other, converter, made.sources)
    return parts, unexpected


class _Plain:
    """A tensor as it lies in a file."""

    def __init__(self, key: str, file: Path) -> None:
        self.key, self.file = key, file

    def __call__(self, slices: tuple[slice, ...]) -> Tensor:
        return _read(self.file, self.key, slices)

    def shape(self) -> tuple[int, ...]:
        with safe_open(self.file, framework="pt") as weights:
            return tuple(weights.get_slice(self.key).get_shape())


class _Made:
    """A tensor that a converter of transformers makes of those in the files."""

    def __init__(self, bones: Any, first: str, name: str, converter: Any, sources: list[Source]) -> None:
        self.bones, self.first, self.name, self.converter, self.sources = bones, first, name, converter, sources

    def __call__(self, slices: tuple[slice, ...]) -> Tensor:
        converter = copy.deepcopy(self.converter)
        for pattern, key, file in self.sources:
            converter.add_tensor(self.first, key, pattern, functools.partial(_read, file, key, ()))
        try:
            made = converter.convert(self.first, model=self.bones, config=self.bones.config)[self.name]
        except (ValueError, KeyError, RuntimeError) as error:
            raise self._other(str(error)) from error
        value: Tensor = made[0] if isinstance(made, list) else made
        wanted = tuple(self.bones.get_parameter(self.name).shape)
        if tuple(value.shape) != wanted:
            raise self._other(f"{tuple(value.shape)}, not {wanted}")
        return sliced(value, slices)

    def _other(self, what: str) -> CheckpointError:
        folder = str(self.sources[0][2].parent)
        return CheckpointError(folder, f"{len(self.sources)} tensors do not make {self.name}: {what}", "the weights are not those of its config.json")


def names_in(file: Path) -> list[str]:
    """The tensors in a file. Opening it compares its header with its length, which finds truncation without reading the weights."""
    try:
        with safe_open(file, framework="pt") as weights:
            return list(weights.keys())
    except (OSError, SafetensorError) as error:
        raise _broken(file, error) from error


def _read(file: Path, key: str, slices: tuple[slice, ...]) -> Tensor:
    try:
        with safe_open(file, framework="pt") as weights:
            if not slices:
                found: Tensor = weights.get_tensor(key)
                return found
            part: Tensor = weights.get_slice(key)[slices]
            return part
    except (OSError, SafetensorError) as error:
        raise _broken(file, error) from error


def _broken(file: Path, error: Exception) -> CheckpointError:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return CheckpointError(str(file), f"is truncated or no safetensors file ({said})", "restore it, or make the checkpoint again")
