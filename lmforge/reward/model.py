"""A trained reward model as a reward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lmforge.errors import CheckpointError
from lmforge.inference.checkpoint import quiet_transformers, read_config, weight_files
from lmforge.reward.nodes import Episodes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ModelScorer:
    """(score - shift) * scale of prompt and answer, at their last token; opened once, in the dtype it was stored in."""

    def __init__(self, folder: Path, batch_size: int, shift: float, scale: float) -> None:
        self.model = open_scorer(folder)
        self.batch_size, self.shift, self.scale = batch_size, shift, scale

    def __call__(self, episodes: Episodes) -> list[float]:
        return [(one - self.shift) * self.scale for one in scores(self.model, episodes.ids, self.batch_size)]


def open_scorer(folder: Path) -> PreTrainedModel:
    """The reward model in `folder`, in eval mode, on the GPU where there is one. CheckpointError where it is none, or lacks a tensor."""
    from transformers import AutoModelForSequenceClassification

    read_config(folder)
    weight_files(folder)
    loader: Any = AutoModelForSequenceClassification  # untyped in transformers
    try:
        with quiet_transformers():
            model, info = loader.from_pretrained(
                folder, dtype="auto", use_safetensors=True, trust_remote_code=False, local_files_only=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(str(folder), f"transformers cannot open it as a reward model: {first}", "give what stage=reward made") from error
    lost = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
    if lost or model.config.num_labels != 1:
        what = f"lacks {lost[0]}" if lost else f"gives {model.config.num_labels} scores, not one"
        raise CheckpointError(str(folder), f"is no trained reward model: it {what}", "give what stage=reward made")
    opened: PreTrainedModel = model.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)
    return opened


@torch.no_grad()
def scores(model: Any, sequences: Sequence[Sequence[int]], batch_size: int) -> list[float]:
    """The score of each sequence of ids at its last token, fp32; those of like length share a batch.

    Not transformers' own pooling, which looks for the last token that is not padding: an end token that also pads would be left out.
    """
    found = [0.0] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda one: len(sequences[one]))
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        rows = [torch.tensor(list(sequences[one]), dtype=torch.int64) for one in some]
        # Padding is on the right, where a causal model sees it from nowhere that counts.
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
        ends = torch.tensor([len(row) - 1 for row in rows], device=model.device)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        values = model.score(hidden[torch.arange(len(rows), device=model.device), ends]).float().flatten().tolist()
        for one, value in zip(some, values, strict=True):
            found[one] = value
    return found
