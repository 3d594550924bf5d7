"""Putting a PEFT folder onto the base it was trained on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lmforge.errors import CheckpointError
from lmforge.inference import four_bit
from lmforge.inference.base import BASE_FILE, check_base, read_base
from lmforge.inference.positions import follow_mask

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

# What of a PEFT config decides the model. All else is refused unless it is unset: some of it names modules to import (megatron_core).
KINDS = {
    "LORA": (
        *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "fan_in_fan_out", "lora_bias", "rank_pattern", "alpha_pattern"),
        *("target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern", "modules_to_save"),
    ),
    "PROMPT_TUNING": ("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"),
}
SAID = (  # read here or by people, or only before training
    *("peft_type", "task_type", "inference_mode", "base_model_name_or_path", "revision", "peft_version", "auto_mapping"),
    *("init_lora_weights", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
)
# PEFT runs words of these as regular expressions
PATTERNS = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "rank_pattern", "alpha_pattern")
CHANGES_BASE = ("pissa", "olora")  # initialisations that take a part out of the base's weights; opening has to do it again


def open_adapter(model: Any, folder: Path, *, dense: bool = False) -> Any:
    """The PEFT model of a transformers `model`, opened from its folder, and the adapter in `folder`: in eval mode, nothing trainable.

    CheckpointError in one line where the adapter was trained on another base, is not whole, or is of a kind that is not known here. An adapter that was
    trained on a base in 4 bits gets such a base again, or with `dense` the base's weights rounded to what those 4 bits stand for.
    """
    peft, config, tensors = library(), peft_config(folder), read_tensors(folder)
    _check_base(model, folder)
    said = read_base(folder)
    if said is not None and said.four_bit is not None:
        model = (four_bit.round_weights if dense else four_bit.quantize)(model, **said.four_bit)
    try:
        with quiet_peft():
            made = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
            loaded = peft.set_peft_model_state_dict(made, tensors)
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        raise CheckpointError(str(folder), f"does not fit the model: {_short(error)}", "give the checkpoint it was trained on") from error
    astray = sorted({*(name for name in loaded.missing_keys if ".lora_" in name), *loaded.unexpected_keys} - {"prompt_embeddings"})  # PEFT takes these first
    if astray:
        what = f"does not fit the model: {astray[0]} is in one of them only"
        raise CheckpointError(str(folder), what, "give the checkpoint it was trained on")
    follow_mask(made)
    return made.to(model.device).requires_grad_(False).eval()


def library() -> Any:
    """PEFT; it takes a second to import, and so is imported where an adapter is at hand."""
    with quiet_peft():
        import peft
    return peft


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Without PEFT's notes on what it sets right by itself, such as fan_in_fan_out for GPT-2's Conv1D, and those of what it imports."""
    logger = logging.getLogger("bitsandbytes")  # imported where it is installed; reports an optional kernel for CPUs that is not
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"peft\..*")
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            yield
    finally:
        logger.setLevel(level)


def peft_config(folder: Path) -> Any:
    """PEFT's config of the adapter in `folder`, from the keys known here only; CheckpointError for anything else that is set."""
    peft, said = library(), _read_json(folder / CONFIG_FILE)
    kind = str(said.get("peft_type"))
    if kind not in KINDS:
        raise CheckpointError(str(folder), f"is a PEFT adapter of type {kind}", f"known here: {', '.join(KINDS)}")
    cls = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    usual = {field.name: None if field.default is dataclasses.MISSING else field.default for field in dataclasses.fields(cls)}
    for name, value in said.items():
        if name not in KINDS[kind] and name not in SAID and value and value != usual.get(name):
            raise CheckpointError(str(folder / CONFIG_FILE), f"sets {name}, which is not known here", "merge the adapter with the tool that made it")
    keys = {name: said[name] for name in KINDS[kind] if name in said}
    _check_names(keys, folder / CONFIG_FILE)
    if kind == "LORA":
        start = said.get("init_lora_weights", True)
        keys["init_lora_weights"] = start if isinstance(start, str) and start.startswith(CHANGES_BASE) else True
    try:
        return cls(task_type="CAUSAL_LM", inference_mode=True, **keys)
    except (TypeError, ValueError) as error:
        raise CheckpointError(str(folder / CONFIG_FILE), f"PEFT refuses it: {_short(error)}", "copy the adapter again from where it was made") from error


def _check_names(keys: Mapping[str, Any], path: Path) -> None:
    """CheckpointError unless modules are meant by plain names: a regular expression from a file could run for ever, and mean what nobody sees."""
    for key in PATTERNS:
        value = keys.get(key) or ()
        for word in value if isinstance(value, list | dict) else (value,) if value else ():
            if not (isinstance(word, str) and (re.fullmatch(r"[A-Za-z0-9_.]+", word) or (key, word) == ("target_modules", "all-linear"))):
                what = f"{key} has {str(word)[:60]!r}, which is no plain name of a module"
                raise CheckpointError(str(path), what, "name the modules (letters, digits, _ and .), or merge the adapter with the tool that made it")


def read_tensors(folder: Path) -> dict[str, Any]:
    """The tensors of an adapter folder, under PEFT's names without the adapter's own."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(str(folder), f"has no {WEIGHTS_FILE}", "adapters load from safetensors only; save it again with safe_serialization")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(str(path), f"is truncated or not safetensors ({_short(error)})", "copy or train it again") from error


def _check_base(model: Any, folder: Path) -> None:
    opened = Path(getattr(model, "name_or_path", "") or "-")
    if opened.is_dir():
        check_base(folder, opened)
    elif (folder / BASE_FILE).is_file():
        raise CheckpointError(str(folder), "cannot be compared with its base, which was opened from no folder", "open the base from its checkpoint folder")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(str(path.parent), f"is no adapter: it has no {path.name}", "give a PEFT folder, or a step that trained one")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(str(path), f"cannot be read: {error}", "copy it again from where it was made") from error
    if not isinstance(found, dict):
        raise CheckpointError(str(path), "is not a JSON object", "copy it again from where it was made")
    return found


def _short(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
