"""Rendering of chat templates: a user's template is a program, so it runs in a process of its own with limits on time and memory.

The text is exactly what `tokenizer.apply_chat_template(messages, tokenize=False, date_string=DATE)` gives; a template that asks for
today's date is told DAY, so that tokens do not change from one day to the next.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from lmforge.errors import DataError
from lmforge.tokenizer import sandbox
from lmforge.tokenizer.markers import TEMPLATE

DATE, DAY = "26 Jul 2024", "2024-07-26"  # Llama 3's own default; its newer templates would write today's date into every row
CPU_S, WALL_S, START_S = 3.0, 10.0, 120.0  # of one conversation; a real template takes less than a millisecond
MEMORY_BYTES, CHARS = 512 * 2**20, 2**24
SHOWN_CHARS = 60  # of a conversation in an error
Asked = tuple[Sequence[dict[str, Any]], bool]  # messages, and whether the generation prompt follows them


@dataclass(frozen=True)
class Refused:
    """A conversation that the template does not render, and why."""

    reason: str

    def __str__(self) -> str:
        return self.reason


def render(tokenizer: Any, conversations: Iterable[Sequence[dict[str, Any]]], *, add_generation_prompt: bool) -> list[str]:
    """Each conversation as the tokenizer's template writes it. DataError where it refuses one, or goes over a limit."""
    with Renderer(tokenizer) as renderer:
        found = renderer.render([(messages, add_generation_prompt) for messages in conversations])
    for one in found:
        if isinstance(one, Refused):
            raise DataError("chat template", one.reason, "use messages that it takes, or another template")
    return [one for one in found if isinstance(one, str)]


class Renderer:
    """Renders with one tokenizer's template; our own runs here, any other in a process that starts on first use and ends with the `with` block."""

    def __init__(self, tokenizer: Any) -> None:
        try:
            self.template: str = tokenizer.get_chat_template()
        except ValueError as error:
            raise DataError("chat template", str(error).splitlines()[0], "give a tokenizer with one template, or none at all") from error
        self.variables = {**tokenizer.special_tokens_map, "date_string": DATE}
        self.where = f"chat template of {tokenizer.name_or_path}" if tokenizer.name_or_path else "chat template"
        self._child: subprocess.Popen[bytes] | None = None
        self._lines: _Lines | None = None

    def __enter__(self) -> Renderer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def render(self, asked: Sequence[Asked]) -> list[str | Refused]:
        """The text of each; a DataError ends the step where the template runs for ever or builds too much."""
        if self.template == TEMPLATE:
            return [_here(self.template, self.variables, messages, prompt) for messages, prompt in asked]
        if not asked:
            return []
        child, lines = self._started()
        feed = b"".join(json.dumps({"messages": messages, "prompt": prompt}).encode() + b"\n" for messages, prompt in asked)
        threading.Thread(target=_write, args=(child.stdin, feed), daemon=True).start()
        return [self._text(lines, messages) for messages, _ in asked]

    def _text(self, lines: _Lines, messages: Sequence[dict[str, Any]]) -> str | Refused:
        reply = self._reply(lines, WALL_S)
        if "fatal" in reply:
            said = str(next((one["content"] for one in messages if one["role"] == "user"), ""))
            begins = said if len(said) <= SHOWN_CHARS else said[:SHOWN_CHARS] + "..."
            raise DataError(self.where, f"{reply['fatal']}, at {begins!r}", "use another template")
        return Refused(reply["refused"]) if "refused" in reply else str(reply["text"])

    def _reply(self, lines: _Lines, seconds: float) -> dict[str, Any]:
        try:
            line = lines.next(seconds)
        except TimeoutError:
            return {"fatal": f"does not finish a conversation within {seconds:g} s"}
        if line:
            reply: dict[str, Any] = json.loads(line)
            return reply
        assert self._child is not None
        code = self._child.wait()
        if code == -signal.SIGPROF:
            return {"fatal": f"does not finish a conversation within {CPU_S:g} s of processor time"}
        return {"fatal": f"ended the process that renders it (exit code {code})"}

    def _started(self) -> tuple[subprocess.Popen[bytes], _Lines]:
        if self._child is None or self._lines is None:
            # -P: the script's own folder holds modules with the standard library's names
            command = [sys.executable, "-P", str(Path(sandbox.__file__))]
            self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            self._lines = _Lines(self._child.stdout)
            first = {"template": self.template, "variables": self.variables, "date": DAY, "cpu_s": CPU_S, "memory_bytes": MEMORY_BYTES, "chars": CHARS}
            _write(self._child.stdin, json.dumps(first).encode() + b"\n")
            ready = self._reply(self._lines, START_S)
            if "fatal" in ready:
                raise DataError(self.where, ready["fatal"], "use another template")
            missing = ready["ready"]
            if missing:
                warnings.warn(f"chat templates run without a limit on {', '.join(missing)}, which this system cannot set", stacklevel=2)
        return self._child, self._lines


class _Lines:
    """Lines of a pipe, each within a time."""

    def __init__(self, pipe: Any) -> None:
        self._file = pipe.fileno()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._file, selectors.EVENT_READ)
        self._parts: list[bytes] = []
        self._ready: list[bytes] = []

    def next(self, seconds: float) -> bytes:
        """The next line; nothing at the end. TimeoutError where it does not come."""
        end = time.monotonic() + seconds
        while not self._ready:
            if not self._selector.select(max(0.0, end - time.monotonic())):
                raise TimeoutError
            chunk = os.read(self._file, 1 << 20)
            if not chunk:
                return b""
            *whole, rest = chunk.split(b"\n")
            if whole:
                whole[0] = b"".join([*self._parts, whole[0]])
                self._parts = []
                self._ready = whole[::-1]
            self._parts.append(rest)
        return self._ready.pop()


def _write(pipe: Any, data: bytes) -> None:
    try:
        pipe.write(data)
        pipe.flush()
    except (BrokenPipeError, ValueError):
        pass  # the process has ended; whoever reads its answers says so


def _here(template: str, variables: dict[str, Any], messages: Sequence[dict[str, Any]], prompt: bool) -> str | Refused:
    from transformers.utils.chat_template_utils import render_jinja_template

    answer = sandbox.render(render_jinja_template, {"template": template, "variables": variables}, {"messages": list(messages), "prompt": prompt})
    return Refused(answer["refused"]) if "refused" in answer else answer["text"]
