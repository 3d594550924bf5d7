"""A model's folder written with one file's weights in memory at a time."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lmforge.errors import CheckpointError
from lmforge.inference.saving import copy_tokenizer, set_ids, whole_folder
from lmforge.model.construct import quiet

FILE_BYTES = 4 * 2**30  # in a file of weights, and so in memory; a layer that is larger is a file of its own
LAYER = re.compile(r".*?\.\d+(?=\.)")

Whole = Callable[[Sequence[str]], Mapping[str, Tensor]]  # names of weights to the whole tensors on the CPU of rank 0, nothing elsewhere; all ranks call it


def save(bones: Any, read: Whole, tokenizer_folder: Path, out: Path, *, first: bool, file_bytes: int = FILE_BYTES) -> None:
    """What `build.save` writes of a model, from one without memory and a way to read its weights; every rank calls it, and the `first` one writes."""
    tokenizer = fitting(bones, tokenizer_folder)
    parameters, tied = dict(bones.named_parameters(remove_duplicate=False)), bones.all_tied_weights_keys
    left = {*tied, *(bones._keys_to_ignore_on_save or ())}
    values = {name: value for name, value in bones.state_dict().items() if name not in left}
    held: dict[str, dict[str, int]] = {}
    with whole_folder(out) if first else contextlib.nullcontext() as partial:
        for file, names in files({name: value.nbytes for name, value in values.items()}, file_bytes).items():
            weights = dict(read([name for name in names if name in parameters]))
            if partial is not None:
                kept = {name: values[name] for name in names if name not in parameters}  # buffers, which have memory
                held[file] = write_file(partial / file, weights | kept, bones)
        if partial is not None:
            set_ids(bones, tokenizer)
            write_index(partial, held)
            bones.config.dtype, bones.config.architectures = bones.dtype, [type(bones).__name__]
            with quiet():
                bones.config.save_pretrained(partial)
                if bones.can_generate():
                    bones.generation_config.save_pretrained(partial)
            copy_tokenizer(tokenizer_folder, partial)


def fitting(model: Any, folder: str | Path) -> Any:
    """The tokenizer in a folder; CheckpointError where it has more entries than the model."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    rows: int = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise CheckpointError(str(folder), f"a tokenizer of {len(tokenizer)} entries does not fit a model of {rows}", "use the model's own tokenizer")
    return tokenizer


def files(sizes: Mapping[str, int], file_bytes: int = FILE_BYTES) -> dict[str, list[str]]:
    """The weights of each file. A layer is not divided: transformers may join or split its weights on their way to the disk."""
    found: list[list[str]] = [[]]
    room = file_bytes
    for layer in _layers(sizes):
        size = sum(sizes[name] for name in layer)
        if size > room and found[-1]:
            found, room = [*found, []], file_bytes
        found[-1] += layer
        room -= size
    if len(found) == 1:
        return {"model.safetensors": found[0]}
    return {f"model-{number:05}-of-{len(found):05}.safetensors": one for number, one in enumerate(found, 1)}


def _layers(names: Mapping[str, int]) -> Iterator[list[str]]:
    def layer(name: str) -> str:
        found = LAYER.match(name)
        return found[0] if found else name

    for _, group in itertools.groupby(names, layer):
        yield list(group)


def write_file(path: Path, weights: dict[str, Tensor], bones: Any) -> dict[str, int]:
    """One file of weights of the model that `bones` is without them; returns their bytes by their names on disk. Empties `weights`."""
    from transformers.core_model_loading import revert_weight_conversion

    on_disk: dict[str, Tensor] = revert_weight_conversion(bones, {name: weights.pop(name) for name in list(weights)})
    try:
        save_file({name: _own(value) for name, value in on_disk.items()}, path, metadata={"format": "pt"})
        with path.open("rb") as file:
            os.fsync(file.fileno())  # now, while ranks meet after every file: they do not wait long enough for all of a large folder
    except SafetensorError as error:
        raise CheckpointError(str(path.parent), f"cannot be written: {error}", "free some space, or give another folder") from error
    return {name: value.nbytes for name, value in on_disk.items()}


def write_index(folder: Path, held: Mapping[str, Mapping[str, int]]) -> None:
    """Which file has which weights, where there are several."""
    if len(held) > 1:
        index = {"metadata": {"total_size": sum(sum(sizes.values()) for sizes in held.values())}}
        weight_map = {weight: name for name, sizes in held.items() for weight in sizes}
        (folder / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": weight_map}, indent=2), encoding="utf-8")


def _own(value: Tensor) -> Tensor:
    """The tensor in memory of its own, for what transformers splits are views of one."""
    return value.contiguous() if value.untyped_storage().nbytes() == value.nbytes else value.clone(memory_format=torch.contiguous_format)
