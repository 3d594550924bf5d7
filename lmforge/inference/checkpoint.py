"""Opening a checkpoint folder: a transformers causal LM in eval mode, or one line that says why not."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lmforge.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INDEX = "model.safetensors.index.json"
ADAPTER = "adapter"  # the folder, within a checkpoint, of an adapter that cannot be merged into its weights


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; CheckpointError where the folder is not a model."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(str(folder), "is not a model folder: it has no config.json", "give a checkpoint folder with config.json and model.safetensors")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(str(path), f"cannot be read: {error}", "copy it again from where it was made") from error
    if not isinstance(config, dict):
        raise CheckpointError(str(path), "is not a JSON object", "copy it again from where it was made")
    return config


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a model folder, each checked to be whole (its header matches its size)."""
    from safetensors import SafetensorError, safe_open

    index = folder / INDEX
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    files = tuple(folder / name for name in names)
    for path in files:
        if not path.is_file():
            other = " (only pickled weights are here)" if list(folder.glob("*.bin")) else ""
            raise CheckpointError(str(folder), f"has no {path.name}{other}", "weights load from safetensors only; convert them or copy the file again")
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(str(path), f"is truncated or not safetensors ({error})", "copy or train it again") from error
    return files


def open_model(folder: Path, device: torch.device | str | None = None) -> PreTrainedModel:
    """The causal LM in `folder`, in eval mode, in the dtype it was stored in; on the GPU where there is one, unless `device` says otherwise.

    A compressed-tensors folder is opened dense. Tensors that are missing or of another shape are refused: transformers would fill them with random values.
    A folder with an `adapter` inside (a soft prompt, which cannot be merged) is opened as a PEFT model: call it through `forward.logits`.
    """
    model = _open_base(folder, device)
    if not is_adapter(folder / ADAPTER):
        return model
    from lmforge.inference.adapters import open_adapter

    return cast("PreTrainedModel", open_adapter(model, folder / ADAPTER))


def is_adapter(folder: Path) -> bool:
    """Whether it is a PEFT folder."""
    return (folder / "adapter_config.json").is_file()


def _open_base(folder: Path, device: torch.device | str | None) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    config = read_config(folder)
    weight_files(folder)
    loader: Any = AutoModelForCausalLM  # untyped in transformers
    extra: dict[str, Any] = {}
    if (config.get("quantization_config") or {}).get("quant_method") == "compressed-tensors":
        extra["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    try:
        with quiet_transformers(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")  # on purpose: it is how to ask for dense weights
            model, info = loader.from_pretrained(
                folder, dtype="auto", use_safetensors=True, trust_remote_code=False, local_files_only=True, output_loading_info=True, **extra
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(str(folder), f"transformers cannot open it: {_first_line(error)}", "check config.json against the weights") from error
    lost = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
    if lost:
        raise CheckpointError(str(folder), f"lacks {len(lost)} of the model's tensors, such as {lost[0]}", "copy or train it again")
    target = torch.device(device) if device else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    opened: PreTrainedModel = model.to(target).eval()
    return opened


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that travels with a checkpoint."""
    from transformers import AutoTokenizer

    if not has_tokenizer(folder):
        raise CheckpointError(str(folder), "has no tokenizer", "copy tokenizer.json and tokenizer_config.json beside the weights")
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(str(folder), f"transformers cannot open its tokenizer: {_first_line(error)}", "copy the tokenizer files again") from error


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer is in the folder."""
    return (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file()


def context_tokens(model: PreTrainedModel) -> int:
    """How many tokens the model can look at, in transformers' name or GPT-2's, less those a soft prompt takes."""
    from lmforge.inference.forward import virtual_tokens

    for name in ("max_position_embeddings", "n_positions"):
        if isinstance(length := getattr(model.config, name, None), int):
            return length - virtual_tokens(model)
    raise CheckpointError("config.json", "says no context length", "add max_position_embeddings")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers without its progress bars and load reports; what goes wrong is raised here, not printed there."""
    import transformers

    logging: Any = transformers.utils.logging  # untyped in transformers

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
