"""Beside the shards: config, generation config and tokenizer, so that the weights can be exported before their step is done."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lmforge.inference.checkpoint import open_tokenizer
from lmforge.inference.saving import copy_tokenizer, set_ids, whole_folder

MODEL = "model"  # the folder, in a state's
ABOUT = "about.json"


def describe(folder: Path, model: Any, tokenizer_folder: str | Path) -> None:
    """Write `folder`/model for a transformers or PEFT model, or for the first of a module's `transformers()`; to be called on one rank.

    Nothing in it depends on how the model is spread, or on its weights.
    """
    main = model.transformers()[0] if hasattr(model, "transformers") else model
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is main)
    both = SimpleNamespace(config=copy.deepcopy(main.config), generation_config=copy.deepcopy(getattr(main, "generation_config", None)))
    if hasattr(main, "score"):
        both.score = main.score
    both.config.architectures = [type(main).__name__.removeprefix("FSDP")]  # torch's fully_shard renames the class
    set_ids(both, open_tokenizer(Path(tokenizer_folder)))
    with whole_folder(folder / MODEL) as partial:
        both.config.save_pretrained(partial)
        if both.generation_config is not None:
            both.generation_config.save_pretrained(partial)
        copy_tokenizer(Path(tokenizer_folder), partial)
        (partial / ABOUT).write_text(json.dumps({"prefix": prefix, "adapter": hasattr(main, "peft_config")}), encoding="utf-8")
