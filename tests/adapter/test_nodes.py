"""What a config may say of adapters, and where QLoRA runs."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lmforge.adapter.low_rank import no_four_bit
from lmforge.errors import ConfigError
from lmforge.model.weights import weights
from lmforge.optimizer.groups import decays, role
from tests.adapter import tiny


@pytest.mark.parametrize(
    ("name", "keys", "says"),
    [
        ("lora", {"r": 0}, "adapter.r: 0 must be >= 1"),
        ("lora", {"dropout": 1}, "adapter.dropout: 1.0 must be < 1"),
        ("lora", {"alpha": 0}, "adapter.alpha: 0.0 must be > 0"),
        ("lora", {"target_modules": []}, "names nothing"),
        ("lora", {"target_modules": "  "}, "names nothing"),
        ("lora", {"target_modules": ["all-linear", "lm_head"]}, "it stands alone"),
        ("lora", {"init": "pisa"}, "did you mean 'pissa'"),
        ("lora", {"init": "pissa", "dropout": 0.1}, "adapter.dropout"),
        ("lora", {"quant_type": "nf4"}, "unknown key"),
        ("qlora", {"quant_type": "nf3"}, "adapter.quant_type"),
        ("prompt_tuning", {"virtual_tokens": 0}, "must be >= 1"),
        ("prompt_tuning", {"init_text": " "}, "adapter.init_text: is empty"),
    ],
)
def test_what_is_wrong_is_refused(name: str, keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny.adapter(name, **keys)
    assert says in str(caught.value)


def test_pissa_starts_from_singular_values_that_are_there() -> None:
    config = weights({**tiny.FAMILIES[0], **tiny.IDS})
    assert list(tiny.adapter("lora", init="pissa", r=16).problems(config, "adapter")) == []  # k_proj has 16 outputs
    found = list(tiny.adapter("lora", init="pissa", r=17).problems(config, "adapter"))
    assert [str(one) for one in found] == [
        "adapter.r: 17 is more than the 16 singular values of k_proj that PiSSA starts from; type adapter.r=16 or less, or adapter.init=default"
    ]
    assert list(tiny.adapter("lora", r=17).problems(config, "adapter")) == []


@pytest.mark.parametrize(
    ("system", "machine", "macos", "says"),
    [
        ("Linux", "x86_64", "", ""),
        ("Linux", "aarch64", "", ""),
        ("Windows", "AMD64", "", ""),
        ("Darwin", "arm64", "15.1", ""),
        ("Darwin", "arm64", "13.6", "macOS 14 or later"),
        ("Darwin", "x86_64", "14.0", "no build for Darwin on x86_64"),
        ("Linux", "ppc64le", "", "no build for Linux on ppc64le"),
        ("FreeBSD", "amd64", "", "no build for FreeBSD"),
    ],
)
def test_where_4_bits_run(system: str, machine: str, macos: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert says in no_four_bit(system, machine, macos)
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("platform.mac_ver", lambda: (macos, ("", "", ""), ""))
    if not says:
        assert tiny.adapter("qlora").type == "qlora"
        return
    with pytest.raises(ConfigError, match=r"adapter: bitsandbytes .*; type adapter=lora") as caught:
        tiny.adapter("qlora")
    assert "\n" not in str(caught.value)
    assert tiny.adapter("lora").type == "lora"


def test_what_decays_and_what_muon_takes() -> None:
    """A and B are matrices, DoRA's norms are vectors, a soft prompt is an embedding."""
    config = weights({**tiny.FAMILIES[0], **tiny.IDS})
    dora = {one.name.rpartition(".lora_")[2]: role(one.name, one.shape) for one in tiny.adapter("dora").trainable(config)}
    assert dora == {"A.default.weight": "matrix", "B.default.weight": "matrix", "magnitude_vector.default.weight": "vector"}
    prompt = tiny.adapter("prompt_tuning").trainable(config)[0]
    assert role(prompt.name, prompt.shape) == "embedding"
    assert not decays(prompt.name, prompt.shape)


def test_a_soft_prompt_takes_room_and_no_packing() -> None:
    assert (tiny.adapter("prompt_tuning", virtual_tokens=9).positions, tiny.adapter("prompt_tuning").packs) == (9, False)
    assert (tiny.adapter("lora").positions, tiny.adapter("lora").packs) == (0, True)


def test_frozen_bytes() -> None:
    config = weights({**tiny.FAMILIES[0], **tiny.IDS})
    total = sum(one.count * math.prod(one.shape) for one in config)
    assert tiny.adapter("none").frozen_bytes(config, 2) == 0
    assert tiny.adapter("lora").frozen_bytes(config, 2) == 2 * total
    assert tiny.adapter("qlora").frozen_bytes(config, 2) < 2 * total
