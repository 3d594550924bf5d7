"""Models in memory and on disk: fresh from a config, loaded from safetensors, saved as a folder that any HF tool opens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from lmforge.inference.saving import copy_tokenizer, set_ids, whole_folder
from lmforge.model import opening
from lmforge.model.construct import REFUSALS, attention, config_in, configured, construct, not_loaded, quiet
from lmforge.model.fetch import weight_files
from lmforge.model.stored import names_in
from lmforge.model.writing import fitting

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def from_scratch(config: Mapping[str, Any], seed: int) -> PreTrainedModel:
    """A model with fresh float32 weights on the CPU, in training mode; the same for the same seed, whatever ran before it.

    Each weight is drawn from (seed, its name), so that a rank that makes its part alone draws the same. No random state is changed.
    """
    model: PreTrainedModel = opening.from_scratch(config, seed).read()
    return model


def on_meta(config: Mapping[str, Any]) -> PreTrainedModel:
    """The same model without memory: names and shapes only."""
    return construct(configured(config))


def from_folder(path: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A saved model in `dtype`, in training mode: `from_pretrained` leaves dropout off, and Lightning would not turn it on.

    Raises CheckpointError for a missing, truncated or unreadable file, and for weights that are not exactly the model's.
    """
    model, report = _load(Path(path), dtype, scores=False)
    opening.exactly(Path(path), report, allowed=())
    return model


def scorer_from_folder(path: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A sequence classifier with one label, in training mode: a saved reward model, or a causal LM whose head becomes a scalar one of zeros.

    Raises CheckpointError as `from_folder`, and for an architecture of which transformers has no sequence classifier.
    """
    model, report = _load(Path(path), dtype, scores=True)
    head: Any = model.score
    fresh = {f"score.{name}" for name in head.state_dict()}
    opening.exactly(Path(path), report, allowed=(*fresh, *opening.HEADS))
    if fresh & set(map(str, report["missing_keys"])):
        torch.nn.init.zeros_(head.weight)
    return model


def _load(folder: Path, dtype: torch.dtype, *, scores: bool) -> tuple[PreTrainedModel, dict[str, Any]]:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    for file in weight_files(folder):
        names_in(file)  # is it whole?
    maker: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    extra: dict[str, Any] = {"num_labels": 1} if scores else {}
    config = config_in(folder, scores=scores)
    try:
        with quiet():
            loaded: Any = maker.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=attention(config),
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **extra,
            )
    except (OSError, RuntimeError, SafetensorError, *REFUSALS) as error:
        raise not_loaded(folder, error) from error
    loaded[0].train()
    return loaded[0], loaded[1]


def save(model: PreTrainedModel, tokenizer_folder: str | Path, out: str | Path) -> None:
    """Write `out` as a Hugging Face folder, with the tokenizer's files, its chat template and its special ids.

    Atomic: it is written beside `out` and then renamed, so `out` is the old folder, the new one, or (for an instant) absent,
    never a part. Raises CheckpointError where the tokenizer has more entries than the model.
    """
    set_ids(model, fitting(model, tokenizer_folder))
    with whole_folder(Path(out)) as partial, quiet():
        model.save_pretrained(partial)
        copy_tokenizer(Path(tokenizer_folder), partial)
