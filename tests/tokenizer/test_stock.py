"""What is supervised under the templates in use: the essential shapes of Llama, Qwen, Gemma, Mistral and ChatML, beside ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from tokenizers import AddedToken
from transformers import AutoTokenizer

from lmforge.tokenizer.chat import Chat, Mode
from lmforge.tokenizer.encode import Encoder
from lmforge.tokenizer.markers import TEMPLATE
from lmforge.tokenizer.shapes import BadRow
from lmforge.tokenizer.templates import DATE, Refused, Renderer

FOLDER = Path(__file__).parent / "templates"
STYLES = ["ours", *sorted(path.stem for path in FOLDER.glob("*.jinja"))]
SPECIAL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]
SPECIAL += ["[TOOL_CALLS]"]
END = {"llama2": "<|endoftext|>", "mistral": "<|endoftext|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "ours": "<|end|>"}
BEFORE = {"llama2": " ", "mistral": " "}  # what a style writes between its generation prompt and the answer
AFTER = {"llama2": " "}

CODE = "def f():\n    return 1"
CALL = {"id": "call12345", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2, "ü"]}}}
SINGLE = [{"role": "user", "content": "Write it."}, {"role": "assistant", "content": CODE}]
MULTI = [*SINGLE, {"role": "user", "content": "  and\nnow? "}, {"role": "assistant", "content": "naïve 🙂"}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *MULTI]
TOOLS = [
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": 'a "3"\n', "name": "add", "tool_call_id": "call12345"},
    {"role": "assistant", "content": "3."},
    {"role": "user", "content": "Thanks."},
    {"role": "assistant", "content": "Welcome."},
]


class Styled:
    """A tokenizer with a style's template and special tokens, and what renders it, for all tests of that style."""

    def __init__(self, bpe: Path, style: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(str(bpe))
        self.tokenizer.add_tokens([AddedToken(one, special=True, normalized=False) for one in SPECIAL], special_tokens=True)
        self.tokenizer.bos_token = "<|begin_of_text|>"
        self.tokenizer.chat_template = TEMPLATE if style == "ours" else (FOLDER / f"{style}.jinja").read_text(encoding="utf-8")
        self.renderer = Renderer(self.tokenizer)
        self.chat = Chat(self.tokenizer, self.renderer)

    def reference(self, messages: Any, prompt: bool) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, date_string=DATE))


@pytest.fixture(scope="module")
def styled(bpe: Path) -> Iterator[Callable[[str], Styled]]:
    """`styled(name)`: one of STYLES."""
    made: dict[str, Styled] = {}
    with ExitStack() as stack:

        def make(style: str) -> Styled:
            if style not in made:
                made[style] = Styled(bpe, style)
                stack.enter_context(made[style].renderer)
            return made[style]

        yield make


def learned(style: Styled, messages: Any, mode: Mode = "every") -> list[str]:
    """The stretches of text that are supervised, from ids and mask; what they are cut from is what transformers renders."""
    pieces, tokenizer = style.chat.pieces(messages, mode), style.tokenizer
    [example] = Encoder(tokenizer, markers=True).conversations([pieces])
    assert example is not None
    ids, mask = example
    assert "".join(text for text, _ in pieces) == tokenizer.decode(ids, skip_special_tokens=False) == style.reference(messages, mode == "prompt")
    runs: list[list[int]] = []
    for index, (one, on) in enumerate(zip(ids, mask, strict=True)):
        if on and (index == 0 or not mask[index - 1]):
            runs.append([])
        if on:
            runs[-1].append(one)
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


def ended(style: str, *answers: str) -> list[str]:
    return [BEFORE.get(style, "") + answer + AFTER.get(style, "") + END.get(style, "<|im_end|>") for answer in answers]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("messages", [SINGLE, MULTI], ids=["single", "multi"])
def test_every_answer_and_its_end_token_are_learned_and_nothing_else(styled: Any, style: str, messages: Any) -> None:
    answers = [one["content"] for one in messages if one["role"] == "assistant"]
    if style == "qwen3":  # its prompt leaves the thought to the model, also an empty one
        answers[-1] = "<think>\n\n</think>\n\n" + answers[-1]
    assert learned(styled(style), messages) == ended(style, *answers)


@pytest.mark.parametrize("style", STYLES)
def test_system_turns(styled: Any, style: str) -> None:
    reasons = {"gemma": "refuses it: System role not supported", "mistral": "drops the system's text"}
    if style in reasons:
        with pytest.raises(BadRow, match=reasons[style]):
            learned(styled(style), SYSTEM)
    else:
        answers = [CODE, ("<think>\n\n</think>\n\n" if style == "qwen3" else "") + "naïve 🙂"]
        assert learned(styled(style), SYSTEM) == ended(style, *answers)


QWEN = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2, "ü"]}}\n</tool_call>'
CALLS = {
    "ours": '{"name": "add", "arguments": {"a": 1, "b": [2, "ü"]}}',
    "llama3": '{"name": "add", "parameters": {"a": 1, "b": [2, "ü"]}}',
    "qwen2": QWEN,
    "qwen3": QWEN,
    "mistral": '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": [2, "ü"]}}]',
}
NO_CALLS = {"llama2": "roles must alternate", "gemma": "roles must alternate", "chatml": "drops the tool calls"}


@pytest.mark.parametrize("style", STYLES)
def test_tool_calls_are_learned_as_the_template_writes_them_and_results_never(styled: Any, style: str) -> None:
    if style in NO_CALLS:
        with pytest.raises(BadRow, match=NO_CALLS[style]):
            learned(styled(style), TOOLS)
        return
    call, *answers = learned(styled(style), TOOLS)
    assert call == CALLS[style] + END.get(style, "<|im_end|>")
    assert answers == ended(style, "3.", ("<think>\n\n</think>\n\n" if style == "qwen3" else "") + "Welcome.")


def test_text_beside_tool_calls(styled: Any) -> None:
    messages = [TOOLS[0], {**TOOLS[1], "content": "Let me see.", "tool_calls": [CALL, CALL]}]
    line = '\n{"name": "add", "arguments": {"a": 1, "b": [2, "ü"]}}'
    assert learned(styled("ours"), messages) == ["Let me see." + line + line + "<|end|>"]
    assert learned(styled("qwen2"), messages) == [f"Let me see.\n{QWEN}\n{QWEN}<|im_end|>"]
    with pytest.raises(BadRow, match="refuses it: This model only supports single tool-calls"):
        learned(styled("llama3"), messages)
    with pytest.raises(BadRow, match="changes or drops the text"):
        learned(styled("llama3"), [TOOLS[0], {**TOOLS[1], "content": "Let me see."}])


def test_thoughts(styled: Any) -> None:
    thought = "<think>\nHm.\n</think>\n\n"
    asked = [SINGLE[0], {"role": "assistant", "content": thought + "It is 1."}]
    for style in ("qwen3", "chatml", "ours"):
        assert learned(styled(style), asked) == ended(style, thought + "It is 1.")
    with pytest.raises(BadRow, match="changes or drops the text"):  # Qwen 3 forgets what it thought in earlier turns
        learned(styled("qwen3"), [*asked, *MULTI[2:]])
    assert learned(styled("qwen3"), [*MULTI[:3], asked[1]]) == ended("qwen3", CODE, thought + "It is 1.")


@pytest.mark.parametrize("style", STYLES)
def test_only_the_last_answer_is_learned_of_a_pair_and_its_prompt_is_what_generation_is_given(styled: Any, style: str) -> None:
    one = styled(style)
    last = ("<think>\n\n</think>\n\n" if style == "qwen3" else "") + "naïve 🙂"
    assert learned(one, MULTI, "last") == ended(style, last)
    pieces, prompt = one.chat.pieces(MULTI, "last"), one.chat.pieces(MULTI[:-1], "prompt")
    assert prompt == [pieces[0]] == [(one.reference(MULTI[:-1], True), False)]


@pytest.mark.parametrize("messages", [SINGLE, MULTI, SYSTEM, TOOLS], ids=["single", "multi", "system", "tools"])
@pytest.mark.parametrize("style", STYLES)
def test_the_text_is_that_of_apply_chat_template(styled: Any, style: str, messages: Any) -> None:
    """Whatever is learned of it: with the generation prompt and without."""
    one = styled(style)
    for prompt in (True, False):
        [found] = one.renderer.render([(messages, prompt)])
        try:
            wanted: Any = one.reference(messages, prompt)
        except TemplateError as error:
            wanted = Refused(f"the chat template refuses it: {error}")
        assert found == wanted
