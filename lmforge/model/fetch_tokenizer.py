"""The step that takes only the tokenizer of named weights, for training their architecture from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from lmforge.errors import CheckpointError
from lmforge.formats.manifest import digest
from lmforge.model.source import local_folder, pinned, snapshot
from lmforge.registry import Key, register
from lmforge.step import Context, StepNode

FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges*", "*.jinja")


@register("step", "tokenizer")
class FetchTokenizer(StepNode):
    """The tokenizer of a local folder or a hub id."""

    produces = "tokenizer"
    source: Annotated[str, Key("a local folder or a hub id", identity=False)]
    revision: Annotated[str | None, Key("hub commit; null = the newest when the step runs", identity=False)]

    def content(self, cache: Path | None) -> str:
        """The tokenizer's files, or the hub id and commit."""
        folder = local_folder(self.source)
        if folder:
            return digest(files(folder), cache)
        name, commit = pinned(self.source, self.revision)
        return f"{name}@{commit or 'main'}"

    def run(self, context: Context) -> dict[str, Any]:
        """Open it and save it again as a folder that AutoTokenizer opens; no code of its own ever runs. `commit` is the one the hub gave."""
        from transformers import AutoTokenizer

        local = local_folder(self.source)
        folder = local or snapshot(self.source, self.revision, (*FILES, "config.json"))
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            what = f"its tokenizer cannot be opened: {str(error).splitlines()[0][:120]}"
            raise CheckpointError(self.source, what, "type model.tokenizer=bpe to train one") from error
        tokenizer.save_pretrained(context.out)
        made: dict[str, Any] = {"entries": len(tokenizer)}
        return made if local else {**made, "commit": folder.name}


def files(folder: Path) -> list[Path]:
    """The tokenizer's files; CheckpointError where there are none."""
    found = sorted({path for pattern in FILES for path in folder.glob(pattern) if path.is_file()})
    if not found:
        raise CheckpointError(str(folder), "holds no tokenizer", "type model.tokenizer=bpe to train one")
    return found
