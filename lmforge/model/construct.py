"""From a config to a transformers model, without memory or with it, and what transformers says where it cannot."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError

from lmforge.errors import CheckpointError, ConfigError
from lmforge.model.fresh import real_buffers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

REFUSALS = (ValueError, TypeError, KeyError, AssertionError, StrictDataclassError)  # what transformers and torch raise for a config they cannot build


def skeleton(config: PreTrainedConfig, *, scores: bool = False) -> PreTrainedModel:
    """A float32 model in training mode whose weights have no memory, and whose buffers have; with `scores` a sequence classifier with one label."""
    made = construct(config, scores=scores)
    real_buffers(made)
    return made


def construct(config: PreTrainedConfig, *, scores: bool = False) -> PreTrainedModel:
    """The same on the meta device: names and shapes only."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    made = copy.deepcopy(config)
    if scores:
        made.num_labels = 1
    maker: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model: PreTrainedModel = maker.from_config(made, dtype=torch.float32, attn_implementation=attention(made))
    except REFUSALS as error:
        raise ConfigError("model", f"transformers cannot build this config: {first_line(error)}", "mend the config.json") from error
    return model


def attention(config: PreTrainedConfig) -> str:
    """torch's fused attention, or "eager" for a class that has none of it (Gemma 2 caps its attention scores).

    Both keep packed documents apart by their position ids alone, for every family of `lmforge.model.families`.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return "sdpa" if getattr(known, "_supports_sdpa", False) else "eager"


def configured(config: Mapping[str, Any]) -> PreTrainedConfig:
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
        raise ConfigError("model", f"transformers refuses this config: {first_line(error)}", "mend the config.json") from error


def config_in(folder: Path, *, scores: bool = False) -> PreTrainedConfig:
    """transformers' config of a model folder; CheckpointError where it knows no such model, or with `scores` no sequence classifier of it."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig

    try:
        with quiet():
            config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, *REFUSALS) as error:
        raise not_loaded(folder, error) from error
    if scores and type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise CheckpointError(str(folder), f"transformers has no sequence classifier for {config.model_type}", "a reward model of another family")
    return config


def not_loaded(folder: Path, error: Exception) -> CheckpointError:
    """What is said of a folder that transformers cannot make a model of."""
    what = f"cannot be loaded: {first_line(error)}"
    return CheckpointError(str(folder), what, "its config.json and weights must be of one model that transformers knows")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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


def first_line(error: Exception) -> str:
    """What an error says, in a line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
