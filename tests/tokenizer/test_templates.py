"""A user's chat template runs in a process with limits: one that loops for ever or builds gigabytes ends in one line, and soon."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from lmforge.errors import DataError
from lmforge.tokenizer import templates
from lmforge.tokenizer.markers import TEMPLATE
from lmforge.tokenizer.templates import Refused, Renderer, render

MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
DOUBLING = "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}"
GREEDY = {
    "a list that grows": "{% set ns = namespace(l=[0]) %}{% for i in range(60) %}{% set ns.l = ns.l + ns.l %}{% endfor %}",
    "strings that double": DOUBLING,
    "a string times": "{{ messages[0].content * 10000000000 }}",
    "a constant, folded while the template compiles": "{{ 'x' * 10000000000 }}",
    "a format width": "{{ '%09999999999d' % 1 }}",
    "a wide format": "{{ '{:>9999999999}'.format('x') }}",
    "centred": "{{ 'x'.center(9999999999) }}",
    "joined": "{{ (['x' * 100000] * 100000) | join }}",
    "indented": "{{ 'x' | indent(9999999999, true) }}",
}


@pytest.fixture
def tokenizer(bpe: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(bpe))


def refused(tokenizer: Any, template: str) -> str:
    """The one line, in less than 10 s, with this process no larger than before."""
    tokenizer.chat_template = template
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        render(tokenizer, [MESSAGES], add_generation_prompt=False)
    assert time.monotonic() - start < 10 + templates.WALL_S  # on an idle machine it is the limit and a second to start
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("data error: chat template")
    return line


def test_a_template_that_loops_for_ever(tokenizer: Any) -> None:
    line = refused(tokenizer, LOOP)
    assert re.search(r"does not finish a conversation within (3 s of processor time|10 s), at '.*'; use another template", line)  # on a busy machine


def test_one_long_operation_in_c_is_ended_too(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "CPU_S", 0.2)
    assert "does not finish a conversation within 0.2 s" in refused(tokenizer, "{{ (9 ** (9 ** 9)) % 7 }}")


def test_where_no_answer_comes_at_all_the_wait_has_an_end(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "WALL_S", 0.3)
    assert "does not finish a conversation within 0.3 s" in refused(tokenizer, LOOP)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps to RLIMIT_AS")
@pytest.mark.parametrize("template", GREEDY.values(), ids=GREEDY.keys())
def test_a_template_that_builds_gigabytes(tokenizer: Any, template: str) -> None:
    assert "takes more than 512 MiB of memory" in refused(tokenizer, template)


def test_a_template_that_writes_too_much(tokenizer: Any) -> None:
    assert "writes more than 16,777,216 characters" in refused(tokenizer, "{{ 'x' * 20000000 }}")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no\nsuch  turns') }}", "the chat template refuses it: no such turns"),
        ("{{ messages[0].content + 1 }}", "does not render: TypeError: can only concatenate str"),
        ("{{ 1 / 0 }}", "does not render: ZeroDivisionError"),
        ("{% for m in messages %}", "does not render: TemplateSyntaxError: Unexpected end of template"),
        ("{{ messages.nothing.more }}", "does not render: UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "does not render: SecurityError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "does not render: RecursionError"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", ""),
    ],
)
def test_a_template_that_does_not_render(tokenizer: Any, template: str, reason: str) -> None:
    assert reason in refused(tokenizer, template)


def test_one_refused_conversation_does_not_stop_the_others(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% if messages[0].content == 'b' %}{{ raise_exception('not b') }}{% endif %}{{ messages[0].content }}"
    asked = [([{"role": "user", "content": one}], False) for one in "abcb"]
    with Renderer(tokenizer) as renderer:
        twice = [renderer.render(asked), renderer.render(asked)]
    assert twice == [["a", Refused("the chat template refuses it: not b"), "c", Refused("the chat template refuses it: not b")]] * 2


def test_large_batches_and_texts_pass_both_ways(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages[0].content }}"
    texts = [f"{index} \u2028\n\x85é🙂" + "x" * 3000 for index in range(2000)] + ["y" * 5_000_000]
    assert render(tokenizer, [[{"role": "user", "content": text}] for text in texts], add_generation_prompt=False) == texts


def test_todays_date_does_not_enter(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} {{ date_string }} {{ eos_token }}"
    assert render(tokenizer, [MESSAGES], add_generation_prompt=False) == ["26 Jul 2024 26 Jul 2024 <|endoftext|>"]


def test_ours_needs_no_process(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tokenizer.chat_template == TEMPLATE
    monkeypatch.setattr(subprocess, "Popen", None)
    assert render(tokenizer, [MESSAGES], add_generation_prompt=True) == ["<|user|>q<|end|><|assistant|>a<|end|><|assistant|>"]


def test_several_named_templates(tokenizer: Any) -> None:
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "tools"}
    assert render(tokenizer, [MESSAGES], add_generation_prompt=False) == ["q"]
    tokenizer.chat_template = {"one": "1", "two": "2"}
    with pytest.raises(DataError, match="multiple chat templates with no default"):
        render(tokenizer, [MESSAGES], add_generation_prompt=False)


def test_the_process_ends_with_the_block(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages[0].content }}"
    with Renderer(tokenizer) as renderer:
        renderer.render([(MESSAGES, False)])
        child = renderer._child
        assert child is not None
        assert child.poll() is None
    assert child.returncode is not None


def test_the_tokenize_step_ends_in_one_line_and_leaves_nothing(kit: SimpleNamespace, small_corpus: Path, bpe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for file in bpe.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(DOUBLING)
    with pytest.raises(DataError, match=r"chat template of .*: takes more than 512 MiB"):
        kit.tokenize(small_corpus, folder, tmp_path / "tokens", "chat")
    assert [path for path in (tmp_path / "tokens").rglob("*") if path.is_file()] == []


def test_the_sandbox_imports_no_torch() -> None:
    """It starts once for each template of a step; the libraries it loads are its cost."""
    from lmforge.tokenizer import sandbox

    first = {"template": "{{ messages[0].content }}", "variables": {}, "date": "2024-07-26", "cpu_s": 5, "memory_bytes": 2**29, "chars": 100}
    code = f"import sys, runpy; runpy.run_path({sandbox.__file__!r}, run_name='__main__'); sys.exit('torch' in sys.modules)"
    lines = json.dumps(first) + "\n" + json.dumps({"messages": MESSAGES, "prompt": False}) + "\n"
    done = subprocess.run([sys.executable, "-P", "-c", code], input=lines, capture_output=True, text=True, timeout=120)
    assert [json.loads(line) for line in done.stdout.splitlines()][1:] == [{"text": "q"}]
    assert done.returncode == 0, done.stderr
