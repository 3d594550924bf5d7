"""A process of its own in which one chat template renders conversations, with limits on its time, memory and output.

transformers' jinja sandbox keeps a template away from Python, but lets it loop for ever and build gigabytes; the operating system
does not. Run as a script: the first line of standard input is {"template", "variables", "date", "cpu_s", "memory_bytes", "chars"},
each further one {"messages", "prompt"}; answered in order by {"ready": [limits this system cannot set]}, and then
{"text"}, or {"refused": why} for a row the template does not render, or {"fatal": why} for a template that went over a limit.
"""

from __future__ import annotations

import datetime
import json
import os
import resource
import signal
import sys
from collections.abc import Iterable
from typing import Any


def limit(memory_bytes: int) -> list[str]:
    """Bound what this process may still take beyond what its libraries hold; returns the limits that this system cannot set."""
    missing = []
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            held = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + memory_bytes, held + memory_bytes))
    except (OSError, ValueError):  # macOS has no /proc and does not keep to RLIMIT_AS
        missing.append("memory")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    return missing


def serve(lines: Iterable[str], answer: Any) -> None:
    """Render what each line asks for."""
    from transformers.utils import chat_template_utils

    rows = iter(lines)
    asked = json.loads(next(rows))
    today = datetime.datetime.fromisoformat(asked["date"])
    # What a template writes of today's date may not differ from run to run.
    vars(chat_template_utils)["datetime"] = type("Fixed", (), {"now": staticmethod(lambda: today)})
    answer({"ready": limit(asked["memory_bytes"])})
    for line in rows:
        row = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, asked["cpu_s"])  # SIGPROF ends the process, also within one long operation in C
        try:
            reply = render(chat_template_utils.render_jinja_template, asked, row)
            if len(reply.get("text", "")) > asked["chars"]:
                reply = {"fatal": f"writes more than {asked['chars']:,} characters"}
        except MemoryError:
            reply = {"fatal": f"takes more than {asked['memory_bytes'] >> 20:,} MiB of memory"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        answer(reply)


def render(function: Any, asked: dict[str, Any], row: dict[str, Any]) -> dict[str, str]:
    """One row's answer; MemoryError where it took more than there is."""
    try:
        [text], _ = function(conversations=[row["messages"]], chat_template=asked["template"], add_generation_prompt=row["prompt"], **asked["variables"])
        return {"text": text}
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  # a template raises whatever its expressions do
        return {"refused": reason(error)}


def reason(error: Exception) -> str:
    """Why a template did not render, in one line: its own words where it refuses a conversation itself."""
    what = " ".join(str(error).split())[:200]
    own = type(error).__name__ == "TemplateError"
    return f"the chat template refuses it: {what}" if own else f"the chat template does not render: {type(error).__name__}: {what}"


def main() -> None:
    """Answers go to what was standard output; anything printed along the way does not."""
    out = os.fdopen(os.dup(1), "w", encoding="ascii", buffering=1 << 16)
    os.dup2(2, 1)

    def answer(one: dict[str, Any]) -> None:
        out.write(json.dumps(one) + "\n")
        out.flush()

    serve(sys.stdin, answer)


if __name__ == "__main__":
    main()
