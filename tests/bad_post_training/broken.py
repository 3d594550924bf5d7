"""Rows, templates and prompts that are bad, and what is said of each."""

from __future__ import annotations

from typing import Any

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</cut>')[-1] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
TEMPLATES = {
    "unclosed": "{% for m in messages %}{{ m.content }}",
    "undefined": "{% for m in messages %}{{ m.nosuch.thing }}{% endfor %}",
    "refusing": "{{ raise_exception('only Latin, please') }}",
    "endless": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "greedy": "{% set n = namespace(x='x' * 4096) %}{% for a in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "dropping": "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}<|end|>{% endif %}{% endfor %}<|assistant|>ok<|end|>",
    "silent": "",
}


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


# (a row that is bad, its kind in the account, what the quarantine says)
BAD_ROWS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "empty_conversation", "messages is empty"),
    (chat(("user", "a"), ("user", "b"), ("assistant", "c")), "turn_order", "messages[1]: two user turns in a row"),
    (chat(("user", "a"), ("assistant", "b"), ("assistant", "c")), "turn_order", "messages[2]: two assistant turns in a row"),
    (chat(("assistant", "a"), ("user", "b"), ("assistant", "c")), "turn_order", "messages[0]: begins with the assistant, so there is no prompt"),
    (chat(("user", "a"), ("system", "b"), ("assistant", "c")), "turn_order", "messages[1]: a system turn right after "),
    (chat(("user", "a")), "no_assistant_turn", "messages has no assistant turn to learn from"),
    (chat(("user", "a"), ("robot", "b")), "unknown_role", "messages[1].role is 'robot', not one of system, user,"),
    (chat(("user", "a"), ("assistant", "  ")), "empty", "messages[1].content is empty"),
    ({"messages": [{"role": "user", "content": 3}]}, "wrong_type", "messages[0].content is int, not text"),
    ({"messages": "hello"}, "wrong_type", "messages is str, not a list"),
    ({"messages": [None]}, "wrong_type", "messages[0] is NoneType, not an object"),
    ({"conversations": [{"from": "alien", "value": "a"}]}, "unknown_role", "conversations[0].from is 'alien', not one of"),
    ({"prompt": "a", "chosen": "same", "rejected": "same"}, "chosen_is_rejected", "chosen and rejected are the same"),
    ({"prompt": "a", "chosen": "b", "rejected": None}, "missing_field", "rejected is missing"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "big"}, "wrong_type", "margin is 'big', not a number"),
    ({"prompt": "a", "completion": "b", "label": "yes"}, "label_not_boolean", "label is 'yes', not a boolean"),
    ({"prompt": "a", "completion": "b", "label": 1}, "label_not_boolean", "label is 1, not a boolean"),
    ({"prompt": "a", "completion": "b", "label": None}, "label_not_boolean", "label is missing, not a boolean"),
]
REFUSALS = {  # what a run says of each: of the rows that a template does not render the first, of one that goes over a limit the template itself
    "unclosed": "good.jsonl:{row}: the chat template does not render: TemplateSyntaxError: Unexpected end of template.",
    "undefined": "good.jsonl:{row}: the chat template does not render: UndefinedError: 'dict object' has no attribute 'nosuch'; every one of the ",
    "refusing": "good.jsonl:{row}: the chat template refuses it: only Latin, please; every one of the ",
    "endless": "chat template of {weights}: does not finish a conversation within 3 s of processor time, at 'question {question}'; use another",
    "greedy": "chat template of {weights}: takes more than 512 MiB of memory, at 'question {question}'; use another",
    "dropping": "good.jsonl:{row}: the chat template changes or drops the text; every one of the ",
    "silent": "good.jsonl:{row}: the chat template drops the user's text; every one of the ",
}
LONG = "again and again " * 30  # more tokens than the context of 64
