"""One number to a shape: the total is what was asked, and the rule's ratios hold."""

from __future__ import annotations

import pytest

from lmforge.model import dial
from lmforge.model.weights import count

PARAMS = [3e5, 1e6, 4.2e6, 25e6, 1e8, 7e8, 3e9, 7e9, 7e10]


def config(shape: dial.Shape, vocab_size: int, tied: bool) -> dict[str, object]:
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
    }


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("params", PARAMS)
def test_the_total_is_within_half_a_step_of_what_was_asked(params: float, tied: bool) -> None:
    shape = dial.shape(params, 2048, tied)
    total = count(config(shape, 2048, tied)).total
    assert abs(total - params) <= 12 * shape.hidden_size * shape.num_hidden_layers
    assert abs(total - params) / params < 0.01


@pytest.mark.parametrize("params", [25e6, 1e8, 7e8, 3e9, 7e9, 7e10])
def test_ratios_are_those_of_the_rule_where_the_vocabulary_does_not_dominate(params: float) -> None:
    shape = dial.shape(params, 8192, True)
    head_dim = shape.hidden_size // shape.num_attention_heads
    assert shape.hidden_size % 32 == 0
    assert head_dim * shape.num_attention_heads == shape.hidden_size
    assert head_dim in (32, 64, 128)
    assert 55 <= shape.hidden_size / shape.num_hidden_layers <= 140
    assert 2.3 <= shape.intermediate_size / shape.hidden_size <= 3.2
    assert shape.intermediate_size % 8 == 0


def test_known_sizes_come_out_near_the_models_people_know() -> None:
    """Llama 2 7B is 32 layers of 4096, GPT-2 small 12 of 768."""
    seven = dial.shape(6.74e9, 32000, False)
    assert 28 <= seven.num_hidden_layers <= 36
    assert abs(seven.hidden_size - 4096) <= 256
    small = dial.shape(124e6, 50257, True)
    assert 10 <= small.num_hidden_layers <= 14
    assert abs(small.hidden_size - 768) <= 64


def test_more_parameters_never_give_a_smaller_total() -> None:
    totals = [count(config(dial.shape(params, 2048, True), 2048, True)).total for params in (10 ** (5 + k / 10) for k in range(50))]
    assert totals == sorted(totals)


def test_the_smallest_is_reached_and_nothing_below_it() -> None:
    least = dial.smallest(32000, tied=True)
    assert least == 32000 * 32 + 32 + 4 * 32 * 32 + 3 * 32 * 32 + 2 * 32
    assert count(config(dial.shape(least, 32000, True), 32000, True)).total == least
    with pytest.raises(ValueError, match=str(least)):
        dial.shape(least - 1, 32000, True)


def test_between_two_embeddings_the_nearest_shape_is_taken() -> None:
    """With 50257 rows no shape lies between width 32 at 8 layers and width 64: 2.1M goes down, 3.1M goes up."""
    assert dial.shape(2.1e6, 50257, True).hidden_size == 32
    assert dial.shape(3.1e6, 50257, True).hidden_size == 64
