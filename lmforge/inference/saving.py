"""Writing model and adapter folders: whole or not at all, with the tokenizer that belongs to them."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmforge.errors import CheckpointError
from lmforge.formats import store
from lmforge.tokenizer import templates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER = "an answer"  # stands for an assistant's turn when a chat template is asked how it ends one


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into; when the block ends it becomes `out`, the old one gone. CheckpointError where it cannot be written.

    `out` is at every moment the old folder, the new one, or (for an instant) absent, never a part.
    """
    partial, old = (out.with_name(f".{out.name}.{what}") for what in ("partial", "old"))
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)  # of an interrupted run
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())  # before the rename: a crash cannot leave a whole-looking folder of empty files
        if out.exists():
            os.replace(out, old)
        os.replace(partial, out)
    except OSError as error:
        raise CheckpointError(str(out), f"cannot be written: {error.strerror or error}", "free some space, or give another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def copy_tokenizer(folder: Path, out: Path) -> None:
    """The tokenizer's own files, byte for byte, so that they hash the same in every folder of a pipeline."""
    for path in sorted({path for pattern in store.TOKENIZER_FILES for path in folder.glob(pattern)}):
        shutil.copyfile(path, out / path.name)


def set_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the tokenizer's special ids into the model's config, and where generation ends into its generation config."""
    generation = getattr(model, "generation_config", None)  # a sequence classifier has none
    for target in filter(None, (model.config, generation)):
        for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
            setattr(target, name, getattr(tokenizer, name))
    if generation is not None:
        generation.eos_token_id = stop_ids(tokenizer)
    if hasattr(model, "score") and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.eos_token_id  # a sequence classifier looks for the last token before padding


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> int | list[int] | None:
    """The end of text, and the end of a turn where the chat template closes turns with another token."""
    stops: list[int] = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER}]
        text = templates.render(tokenizer, [turn], add_generation_prompt=False)[0]
        after = tokenizer.encode(text.rpartition(ANSWER)[2], add_special_tokens=False)
        stops += [one for one in after if one in tokenizer.added_tokens_decoder and one not in stops][:1]
    return stops if len(stops) > 1 else next(iter(stops), None)
