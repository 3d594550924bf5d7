"""Our chat template and its special tokens."""

from __future__ import annotations

# Each marker is one token that BPE never merges with its neighbours, so contents need no newline around them:
# prompt and response have the same ids apart or together, and contents keep every space.
EOS, USER, ASSISTANT, SYSTEM, END, TOOL = SPECIAL_TOKENS = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|tool|>")
MARKERS = (USER, ASSISTANT, SYSTEM, END, TOOL)
# A tool call is one line of JSON after the assistant's text; whose result a tool turn holds shows by their order.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ('system', 'user', 'assistant', 'tool') %}{{ raise_exception('unknown role: ' ~ message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + (message['content'] or '') }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '\\n' if message['content'] or not loop.first else '' }}{{ {'name': call['function']['name'], 'arguments': call['function']['arguments']} | tojson }}"
    "{% endfor %}"
    "{{ '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
