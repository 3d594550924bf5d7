"""Which tokens are supervised, for our template and for stock-like ones; transformers' own mask is the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lmforge.tokenizer.chat import Chat, Mode
from lmforge.tokenizer.encode import Encoder
from lmforge.tokenizer.markers import TEMPLATE
from lmforge.tokenizer.shapes import BadRow, Piece
from lmforge.tokenizer.templates import Renderer

# In the style of each family; @ and # stand where {% generation %} and {% endgeneration %} go in the oracle's copy.
STYLES = {
    "ours": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}@{{ message['content'] + '<|end|>' }}#{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        "<|end|>",
    ),
    "llama": (
        "{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
        "@{{ m['content'] | trim + '<|eot_id|>' }}#{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|eot_id|>",
    ),
    "chatml": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}@{{ m['content'] + '<|im_end|>' }}#{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>",
    ),
    "gemma": (
        "{% set first = '' %}{% if messages[0]['role'] == 'system' %}"
        "{% set first = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
        "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}@{{ m['content'] | trim + '<end_of_turn>' }}#{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "<end_of_turn>",
    ),
}
MARKERS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]


def chat(*contents: str, system: str = "") -> dict[str, Any]:
    messages = [{"role": ("user", "assistant")[index % 2], "content": content} for index, content in enumerate(contents)]
    return {"messages": [{"role": "system", "content": system}, *messages] if system else messages}


CHATS = [
    chat("Write a function.", "def f():\n    return 1"),
    chat("hi", "hello there", "  and now?", "goodbye, naïve 🙂", system="Be brief."),
    chat("first", "one", "second", "two", "third", "three"),
]


def with_template(folder: Path, template: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokenizer.add_tokens([AddedToken(marker, special=True, normalized=False) for marker in MARKERS], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def supervised_runs(tokenizer: Any, ids: list[int], mask: list[int]) -> list[str]:
    runs: list[list[int]] = []
    for index, (token, on) in enumerate(zip(ids, mask, strict=True)):
        if on:
            if not index or not mask[index - 1]:
                runs.append([])
            runs[-1].append(token)
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


def answers(row: dict[str, Any]) -> list[str]:
    return [message["content"] for message in row["messages"] if message["role"] == "assistant"]


def pieces(tokenizer: Any, messages: Any, mode: Mode = "every") -> list[Piece]:
    with Renderer(tokenizer) as renderer:
        return Chat(tokenizer, renderer).pieces(messages, mode)


def encode(tokenizer: Any, row: dict[str, Any]) -> tuple[list[int], list[int]]:
    [example] = Encoder(tokenizer, markers=True).conversations([pieces(tokenizer, row["messages"])])
    assert example is not None
    return example


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("row", CHATS)
def test_exactly_the_answers_and_their_end_tokens_are_supervised(bpe: Path, style: str, row: dict[str, Any]) -> None:
    template, end = STYLES[style]
    tokenizer = with_template(bpe, template.replace("@", "").replace("#", ""))
    ids, mask = encode(tokenizer, row)
    assert supervised_runs(tokenizer, ids, mask) == [answer + end for answer in answers(row)]
    assert tokenizer.decode(ids, skip_special_tokens=False) == tokenizer.apply_chat_template(row["messages"], tokenize=False)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("row", CHATS)
def test_ids_and_mask_equal_those_of_a_template_that_marks_generation(bpe: Path, style: str, row: dict[str, Any]) -> None:
    template, _ = STYLES[style]
    message = "message" if style == "ours" else "m"
    marked = template.replace("@", f"{{% if {message}['role'] == 'assistant' %}}{{% generation %}}", 1)
    body = marked[marked.index("{% generation %}") + len("{% generation %}") : marked.index("#")]
    marked = marked.replace("#", "{% endgeneration %}{% else %}" + body + "{% endif %}")
    oracle = with_template(bpe, marked).apply_chat_template(row["messages"], return_assistant_tokens_mask=True, return_dict=True)
    ids, mask = encode(with_template(bpe, template.replace("@", "").replace("#", "")), row)
    assert ids == oracle["input_ids"]
    assert mask == oracle["assistant_masks"]


def test_our_template_is_the_one_described(bpe: Path) -> None:
    text = AutoTokenizer.from_pretrained(str(bpe)).apply_chat_template(
        chat("q", " a ", "r", system="s")["messages"], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|system|>s<|end|><|user|>q<|end|><|assistant|> a <|end|><|user|>r<|end|><|assistant|>"


def test_an_answer_that_begins_with_a_newline_leaves_the_prompts_ids_alone(bpe: Path) -> None:
    tokenizer = with_template(bpe, STYLES["chatml"][0].replace("@", "").replace("#", ""))
    row = chat("q", "\n    return 1")
    ids, mask = encode(tokenizer, row)
    prompt = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, return_dict=False)
    assert ids[: mask.index(1)] == prompt
    assert supervised_runs(tokenizer, ids, mask) == ["\n    return 1<|im_end|>"]


def test_trimmed_answers_are_supervised_as_the_template_writes_them(bpe: Path) -> None:
    tokenizer = with_template(bpe, STYLES["llama"][0].replace("@", "").replace("#", ""))
    assert supervised_runs(tokenizer, *encode(tokenizer, chat(" q ", "  padded \n"))) == ["padded<|eot_id|>"]


def test_what_a_template_writes_between_its_prompt_and_the_answer_is_supervised(bpe: Path) -> None:
    """Qwen 3 without thinking: its generation prompt ends before the empty thought, so the model has to write that itself."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if loop.last and m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = with_template(bpe, template)
    assert supervised_runs(tokenizer, *encode(tokenizer, chat("q", "a", "r", "b"))) == ["a<|im_end|>", "<think>\n\n</think>\n\nb<|im_end|>"]


BAD = [
    ([], "no messages"),
    (chat("q", "   ")["messages"], "an empty turn"),
    (chat("q")["messages"], "no assistant turn"),
    ([{"role": "robot", "content": "x"}], "unknown role"),
    ([{"role": "tool", "content": "x"}], "begins with the tool"),
    ([{"role": "user", "content": "a"}, *chat("b", "c")["messages"]], "two user turns in a row"),
    ([*chat("b", "c")["messages"], {"role": "assistant", "content": "a"}], "two assistant turns in a row"),
    ([*chat("b", "c")["messages"], {"role": "system", "content": "a"}], "a system turn right after an assistant turn"),
    ([{"role": "assistant", "content": "a"}], "begins with the assistant"),
    ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": ["f()"]}], "tool_calls is not a list of functions"),
    ([{"role": "user", "content": ["x"]}], "not text"),
    (chat("say <|end|>", "a")["messages"], "special token"),
]


@pytest.mark.parametrize(("messages", "reason"), BAD)
def test_bad_conversations_are_refused_with_the_reason(bpe: Path, messages: Any, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        pieces(AutoTokenizer.from_pretrained(str(bpe)), messages)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (TEMPLATE.replace("message['content']", "message['content'].split('</think>')[-1]"), "changes or drops"),
        ("{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'] }}{% endif %}{% endfor %}", "changes or drops"),
        (TEMPLATE.replace("<|end|>", ""), "no end-of-turn token"),
        ("{{ raise_exception('no system turns') }}", "refuses it: no system turns"),
    ],
)
def test_a_template_that_loses_the_answer_is_refused(bpe: Path, template: str, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        pieces(with_template(bpe, template), chat("q", "thought</think>a")["messages"])


def test_the_template_cannot_reach_python(bpe: Path) -> None:
    with pytest.raises(BadRow, match="unsafe"):
        pieces(with_template(bpe, "{{ ''.__class__.__mro__ }}"), chat("q", "a")["messages"])


def test_a_tokenizer_that_begins_texts_with_a_space_is_masked_by_offsets() -> None:
    """Llama 2's style: sentencepiece spaces and `[INST] q [/INST] a </s>`."""
    words = ["<unk>", "<s>", "</s>", "▁", *(chr(code) for code in range(33, 127)), "▁a", "▁an", "▁answer"]
    backend = Tokenizer(models.Unigram([(word, -float(index)) for index, word in enumerate(words)], unk_id=0))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(Regex(" "), "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<s>[INST] ' + m['content'] | trim + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] | trim + ' </s>' }}{% endif %}{% endfor %}"
    )
    ids, mask = encode(tokenizer, chat("what?", "an answer"))
    shown = [(tokenizer.convert_ids_to_tokens(token), on) for token, on in zip(ids, mask, strict=True)]
    assert [token for token, on in shown if on] == ["▁an", "▁answer", "▁", "</s>"]
    assert shown[-5] == ("]", 0)
