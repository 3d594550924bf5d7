"""The `samples` artifact: prompts with the answers a checkpoint gave them.

samples.jsonl   one prompt a line: {"id", "prompt", "answers": [{"text", "tokens", "ended", "logprob"}]}, and "reference" where the data has an answer.
                "prompt" is a text, one user turn, or a list of {"role", "content"}; "tokens" and "logprob" count the end token of an answer that ended
tokenizer/      the tokenizer it was drawn with, and its chat template
meta.json       how it was drawn, and the account: drawn = kept + duplicates + empty; written last
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lmforge.errors import DataError

FILE, META = "samples.jsonl", "meta.json"
Message = dict[str, Any]
Prompt = str | list[Message]


@dataclass(frozen=True)
class Answer:
    """One answer: its text without special tokens, its length, whether it ended by itself, and its summed log-probability (nats, temperature 1)."""

    text: str
    tokens: int
    ended: bool
    logprob: float


@dataclass(frozen=True)
class Sampled:
    """A prompt and the distinct answers drawn for it."""

    id: str
    prompt: Prompt
    answers: tuple[Answer, ...]
    reference: str | None = None

    @property
    def messages(self) -> list[Message]:
        """The prompt as a conversation."""
        return [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else self.prompt

    def plain(self) -> dict[str, Any]:
        """The JSON object of its line."""
        row = {"id": self.id, "prompt": self.prompt, "answers": [asdict(one) for one in self.answers]}
        return row if self.reference is None else row | {"reference": self.reference}


def write(folder: Path, samples: Iterable[Sampled], meta: Mapping[str, Any]) -> None:
    """Both files, each atomically, meta.json last."""
    lines = (json.dumps(one.plain(), ensure_ascii=False, allow_nan=False) for one in samples)
    _replace(folder / FILE, "".join(f"{line}\n" for line in lines))
    _replace(folder / META, json.dumps(meta, indent=1, ensure_ascii=False) + "\n")


def _replace(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}")
    with temporary.open("w", encoding="utf-8", newline="\n") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, file)


def read(folder: Path) -> list[Sampled]:
    """Every row; DataError with the line of the first that is not one."""
    file, found, ids = folder / FILE, [], set()
    if not (folder / META).is_file():
        raise DataError(str(folder), "these samples are unfinished: no meta.json", "run the sample step again")
    with file.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            try:
                one = _parsed(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{file}:{number}", f"is not a sample ({error})", "run the sample step again") from error
            if one.id in ids:
                raise DataError(f"{file}:{number}", f"the id {one.id!r} comes twice", "run the sample step again")
            ids.add(one.id)
            found.append(one)
    return found


def _parsed(row: Any) -> Sampled:
    answers = tuple(Answer(str(one["text"]), int(one["tokens"]), bool(one["ended"]), float(one["logprob"])) for one in row["answers"])
    prompt = row["prompt"]
    if not isinstance(prompt, str) and not all(isinstance(one["content"], str) and isinstance(one["role"], str) for one in prompt):
        raise ValueError("prompt")
    return Sampled(str(row["id"]), prompt, answers, row.get("reference"))
