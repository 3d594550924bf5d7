"""Models opened without their weights, and a way to read each of them in parts: what a rank that is to hold a share of a model begins with."""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lmforge.errors import CheckpointError, ConfigError
from lmforge.model.construct import REFUSALS, config_in, configured, not_loaded, quiet, skeleton
from lmforge.model.fetch import weight_files
from lmforge.model.fresh import drawn
from lmforge.model.parts import Unread
from lmforge.model.stored import stored, tied_apart

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

HEADS = ("lm_head.weight", "embed_out.weight")  # of a causal LM, which a sequence classifier leaves in the files


def from_scratch(config: Mapping[str, Any], seed: int) -> Unread:
    """`build.from_scratch` with its weights not drawn yet."""
    return _fresh(configured(config), seed, scores=False)


def from_folder(folder: Path, *, scores: bool = False) -> Unread | None:
    """`build.from_folder`, or with `scores` `build.scorer_from_folder`, in float32 with the weights still in the folder; raises what they raise.

    None where they cannot be read a part at a time: those that are quantized, and those that the config ties and the files have apart.
    """
    files, config = weight_files(folder), config_in(folder, scores=scores)
    if getattr(config, "quantization_config", None) is not None:
        return None
    try:
        with quiet():
            model, bones = (skeleton(config, scores=scores) for _ in range(2))
            _generation(folder, model)
    except (OSError, ConfigError, *REFUSALS) as error:
        raise not_loaded(folder, error) from error
    parts, report = stored(bones, folder, files)
    head: Any = getattr(model, "score", None) if scores else None
    fresh = {f"score.{name}": value.shape for name, value in head.state_dict().items()} if head is not None else {}
    exactly(folder, report, allowed=(*fresh, *HEADS) if scores else ())
    parts |= {name: functools.partial(_zeros, shape) for name, shape in fresh.items() if name not in parts}
    return None if tied_apart(bones, parts) else Unread(model, parts)


def probe(config: Mapping[str, Any] | Path, seed: int, *, scores: bool = False) -> PreTrainedModel:
    """A fresh model of a config, or of that in a folder, but for its layers, which are two at most: what rows cost little to be tried on."""
    made = copy.deepcopy(config_in(config, scores=scores) if isinstance(config, Path) else configured(config))
    made.num_hidden_layers = min(2, made.num_hidden_layers)
    if kinds := getattr(made, "layer_types", None):
        made.layer_types = kinds[: made.num_hidden_layers]
    model: PreTrainedModel = _fresh(made, seed, scores=scores).read()
    return model


def exactly(folder: Path, report: Mapping[str, Any], allowed: Collection[str]) -> None:
    """CheckpointError where weights are missing or left over, but for those allowed to be."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if names := sorted(set(map(str, report.get(kind) or ())) - set(allowed)):
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise CheckpointError(str(folder), f"{kind.replace('_', ' ')}: {shown}", "the weights are not those of its config.json")


def _fresh(config: PreTrainedConfig, seed: int, *, scores: bool) -> Unread:
    return Unread(skeleton(config, scores=scores), drawn(skeleton(config, scores=scores), seed))


def _generation(folder: Path, model: Any) -> None:
    """Its generation config, where the folder has one and the model generates; else it stays the one made of its config."""
    from transformers import GenerationConfig

    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)


def _zeros(shape: torch.Size, slices: tuple[slice, ...]) -> Tensor:
    return torch.zeros(shape)[slices]
