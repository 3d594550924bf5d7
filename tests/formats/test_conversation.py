"""What is wrong with a conversation is said in plain English."""

from __future__ import annotations

import pytest

from lmforge.formats.conversation import complaint


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        (("system", "assistant"), "an assistant turn right after a system turn"),
        (("user", "assistant", "system"), "a system turn right after an assistant turn"),
        (("user", "user"), "two user turns in a row"),
        (("assistant",), "begins with the assistant, so there is no prompt"),
    ],
)
def test_turns_out_of_order(roles: tuple[str, ...], said: str) -> None:
    found = complaint([{"role": role, "content": "x"} for role in roles])
    assert found is not None
    assert (found.kind, found.reason, found.at) == ("turn_order", said, len(roles) - 1)
