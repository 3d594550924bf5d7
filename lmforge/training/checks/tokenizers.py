"""Checks that text becomes the same tokens wherever the weights have been and will be: in this stage, in the ones before it, in generation."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lmforge.errors import DataError
from lmforge.inference.checkpoint import open_tokenizer

SETTINGS = ("truncation", "padding")  # how a program last called it, not what it does to a text


def one_template(tokens: Path, checkpoint: Path, view: str) -> None:
    """The chat template that the tokens were rendered with is the one that travels with the weights, where they have one."""
    ours, theirs = template(tokens / "tokenizer"), template(checkpoint)
    if theirs is None or ours == theirs or (ours is None and view == "text"):
        return
    what = f"were rendered with the chat template {_digest(ours)}, but {checkpoint} comes with {_digest(theirs)}"
    mend = "tokenize with the checkpoint's, or give the checkpoint this one"
    raise DataError(str(tokens), what, f"one template serves training, evaluation and generation: {mend}")


def template(folder: Path) -> str | None:
    """The text of a tokenizer folder's default chat template: chat_template.jinja, or the older place in tokenizer_config.json."""
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
    if isinstance(found, list):  # several by name
        found = next((one["template"] for one in found if one.get("name") == "default"), None)
    return found


def one_tokenizer(tokens: Path, other: Path, whose: str) -> None:
    """The tokens' tokenizer is that of `other` by its content: only where `other` has no chat template may it have added tokens after those."""
    files = [folder / "tokenizer.json" for folder in (tokens / "tokenizer", other)]
    if all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes():
        return
    ours, theirs = _tokenizer(tokens / "tokenizer"), _tokenizer(other)
    if ours is None or theirs is None or ours == theirs:
        return
    added = {name: one.pop("added_tokens") for name, one in (("ours", ours), ("theirs", theirs))}
    extended = template(other) is None and all(one in added["ours"] for one in added["theirs"])
    if ours != theirs or not extended:
        digests = [_digest(json.dumps([one, added[name]], sort_keys=True)) for name, one in (("ours", ours), ("theirs", theirs))]
        what = f"were made by the tokenizer {digests[0]}, but {whose} {other} has {digests[1]}, so an id means another text there"
        raise DataError(str(tokens), what, "use weights that share one tokenizer, or tokenize with theirs")


def _tokenizer(folder: Path) -> dict[str, Any] | None:
    """What the tokenizer of a folder does, as plain data; None where it has none.

    As it is once opened, not its file: transformers writes other files than some classes were published with, which open as the same.
    """
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        return None
    opened: Any = open_tokenizer(folder)
    plain: dict[str, Any] = json.loads(opened.backend_tokenizer.to_str())
    return {name: value for name, value in plain.items() if name not in SETTINGS}


def _digest(text: str | None) -> str:
    return "none" if text is None else hashlib.sha256(text.encode()).hexdigest()[:8]
