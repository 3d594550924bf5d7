"""An adapter and its base become one checkpoint folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lmforge.errors import CheckpointError
from lmforge.inference.adapters import open_adapter, peft_config
from lmforge.inference.base import check_base
from lmforge.inference.checkpoint import ADAPTER, has_tokenizer, is_adapter, open_model, open_tokenizer, quiet_transformers, read_config, weight_files
from lmforge.inference.saving import copy_tokenizer, set_ids, whole_folder


def merge_folders(base: Path, adapter: Path, out: Path) -> dict[str, Any]:
    """Write `out`, a Hugging Face folder of `base` with `adapter`, in the base's own dtype and with the adapter's tokenizer where it has one.

    LoRA and DoRA are added to the weights, in float32 and then rounded once; after QLoRA the weights are those that the base's 4 bits stand for, for
    only on them the adapter means what it learned. A soft prompt goes along as the folder `adapter` inside. CheckpointError where the adapter was
    trained on another base, or the base cannot be merged into.
    """
    config = read_config(base)
    if method := (config.get("quantization_config") or {}).get("quant_method"):
        raise CheckpointError(str(base), f"is quantized ({method}): a merge would be rounded away", "merge into the checkpoint it was made from")
    if is_adapter(base / ADAPTER):
        raise CheckpointError(str(base), "has an adapter inside already", "merge into the base of that one")
    kind = str(peft_config(adapter).peft_type.value)
    tokenizer = adapter if has_tokenizer(adapter) else base
    with whole_folder(out) as partial, quiet_transformers():
        if kind == "PROMPT_TUNING":
            _side_by_side(base, adapter, tokenizer, partial)
        else:
            _added(base, adapter, tokenizer, partial)
        copy_tokenizer(tokenizer, partial)
    return {"peft_type": kind, "merged": kind != "PROMPT_TUNING", "weight_bytes": sum(path.stat().st_size for path in weight_files(out))}


def _added(base: Path, adapter: Path, tokenizer: Path, out: Path) -> None:
    model: Any = open_model(base, "cpu")
    stored = model.dtype
    merged = open_adapter(model.float(), adapter, dense=True).merge_and_unload().to(stored)
    _check_rows(merged.get_input_embeddings().num_embeddings, tokenizer)
    set_ids(merged, open_tokenizer(tokenizer))
    merged.save_pretrained(out)


def _side_by_side(base: Path, adapter: Path, tokenizer: Path, out: Path) -> None:
    from transformers import AutoConfig, GenerationConfig

    check_base(adapter, base)
    config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    _check_rows(config.get_text_config().vocab_size, tokenizer)
    generation: Any = GenerationConfig
    told = generation.from_pretrained(base, local_files_only=True) if (base / "generation_config.json").is_file() else generation.from_model_config(config)
    both = SimpleNamespace(config=config, generation_config=told)
    set_ids(both, open_tokenizer(tokenizer))
    for written in (config, told):
        written.save_pretrained(out)
    for path in (*weight_files(base), *base.glob("*.safetensors.index.json")):
        _link(path.resolve(), out / path.name)
    (out / ADAPTER).mkdir()
    for path in adapter.iterdir():
        if path.is_file() and path.suffix in (".json", ".safetensors"):
            shutil.copyfile(path, out / ADAPTER / path.name)


def _check_rows(rows: int, tokenizer: Path) -> None:
    entries = len(open_tokenizer(tokenizer))
    if entries > rows:
        raise CheckpointError(str(tokenizer), f"a tokenizer of {entries} entries does not fit a model of {rows}", "use the model's own tokenizer")


def _link(source: Path, out: Path) -> None:
    """Weights are hard-linked where that is possible: nothing ever writes into a safetensors file."""
    try:
        os.link(source, out)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, out)
