"""Models in memory and on disk: fresh from a config, loaded from safetensors, saved as a folder that any HF tool opens."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from lmforge.errors import CheckpointError, ConfigError
from lmforge.inference.saving import copy_tokenizer, set_ids, whole_folder
from lmforge.model.fetch import weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

REFUSALS = (ValueError, TypeError, KeyError, AssertionError, StrictDataclassError)  # what transformers and torch raise for a config they cannot build


def from_scratch(config: Mapping[str, Any], seed: int) -> PreTrainedModel:
    """A model with fresh float32 weights on the CPU, in training mode; the same for the same seed, whatever ran before it.

    Only the CPU generator is seeded, and it is put back, so nothing after this call depends on it.
    """
    before = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(seed)
        with torch.device("cpu"):
            return _construct(config)
    finally:
        torch.set_rng_state(before)


def on_meta(config: Mapping[str, Any]) -> PreTrainedModel:
    """The same model without memory: names and shapes only."""
    with torch.device("meta"):
        return _construct(config)


def from_folder(path: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A saved model in `dtype`, in training mode: `from_pretrained` leaves dropout off, and Lightning would not turn it on.

    Raises CheckpointError for a missing, truncated or unreadable file, and for weights that are not exactly the model's.
    """
    model, report = _load(Path(path), dtype, scores=False)
    _exactly(Path(path), report, allowed=())
    return model


def scorer_from_folder(path: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A sequence classifier with one label, in training mode: a saved reward model, or a causal LM whose head becomes a scalar one of zeros.

    Raises CheckpointError as `from_folder`, and for an architecture of which transformers has no sequence classifier.
    """
    model, report = _load(Path(path), dtype, scores=True)
    head: Any = model.score
    fresh = {f"score.{name}" for name in head.state_dict()}
    _exactly(Path(path), report, allowed=(*fresh, "lm_head.weight", "embed_out.weight"))
    if fresh & set(map(str, report["missing_keys"])):
        torch.nn.init.zeros_(head.weight)
    return model


def _load(folder: Path, dtype: torch.dtype, *, scores: bool) -> tuple[PreTrainedModel, dict[str, Any]]:
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    for file in weight_files(folder):
        _readable(file)
    maker: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    extra: dict[str, Any] = {"num_labels": 1} if scores else {}
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            if scores and type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
                raise CheckpointError(str(folder), f"transformers has no sequence classifier for {config.model_type}", "a reward model of another family")
            loaded: Any = maker.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=_attention(config),
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **extra,
            )
    except (OSError, RuntimeError, SafetensorError, *REFUSALS) as error:
        what = f"cannot be loaded: {_first_line(error)}"
        raise CheckpointError(str(folder), what, "its config.json and weights must be of one model that transformers knows") from error
    loaded[0].train()
    return loaded[0], loaded[1]


def _exactly(folder: Path, report: Mapping[str, Any], allowed: Collection[str]) -> None:
    """CheckpointError where weights are missing or left over, but for those allowed to be."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if names := sorted(set(map(str, report.get(kind) or ())) - set(allowed)):
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise CheckpointError(str(folder), f"{kind.replace('_', ' ')}: {shown}", "the weights are not those of its config.json")


def save(model: PreTrainedModel, tokenizer_folder: str | Path, out: str | Path) -> None:
    """Write `out` as a Hugging Face folder, with the tokenizer's files, its chat template and its special ids.

    Atomic: it is written beside `out` and then renamed, so `out` is the old folder, the new one, or (for an instant) absent,
    never a part. Raises CheckpointError where the tokenizer has more entries than the model.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True, trust_remote_code=False)
    rows: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    if len(tokenizer) > rows:
        raise CheckpointError(str(tokenizer_folder), f"a tokenizer of {len(tokenizer)} entries does not fit a model of {rows}", "use the model's own tokenizer")
    set_ids(model, tokenizer)
    with whole_folder(Path(out)) as partial, _quiet():
        model.save_pretrained(partial)
        copy_tokenizer(Path(tokenizer_folder), partial)


def _construct(config: Mapping[str, Any]) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    made = _config(config)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            made, dtype=torch.float32, attn_implementation=_attention(made)
        )
    except REFUSALS as error:
        raise ConfigError("model", f"transformers cannot build this config: {_first_line(error)}", "mend the config.json") from error
    return model


def _attention(config: PreTrainedConfig) -> str:
    """torch's fused attention, or "eager" for a class that has none of it (Gemma 2 caps its attention scores).

    Both keep packed documents apart by their position ids alone, for every family of `lmforge.model.families`.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return "sdpa" if getattr(known, "_supports_sdpa", False) else "eager"


def _config(config: Mapping[str, Any]) -> PreTrainedConfig:
    """transformers' config object; it is given a copy, since it writes into nested dicts."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    plain = copy.deepcopy(dict(config))
    plain.pop("auto_map", None)  # code from a config is never run
    model_type = plain.pop("model_type", None)
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError("model", f"transformers has no causal language model of model_type {model_type!r}", "name a model that generates text")
    try:
        return CONFIG_MAPPING[model_type](**plain)
    except REFUSALS as error:
        raise ConfigError("model", f"transformers refuses this config: {_first_line(error)}", "mend the config.json") from error


def _readable(file: Path) -> None:
    """Opening reads the header and compares it with the file's length, which finds truncation without reading the weights."""
    try:
        with safe_open(file, framework="pt") as weights:
            weights.keys()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(str(file), f"is truncated or no safetensors file ({_first_line(error)})", "restore it, or make the checkpoint again") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers without its bars and load reports; what they would say is raised instead."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
