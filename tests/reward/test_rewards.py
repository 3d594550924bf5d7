"""Each reward by example, decoded from its YAML; the trained one against transformers."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from lmforge.codec import decode, encode
from lmforge.errors import CheckpointError, ConfigError, DataError, RunError
from lmforge.registry import register
from lmforge.reward.nodes import Episodes, Reward, Scorer

CONF = Path(__file__).parents[2] / "conf" / "reward"
OPTIONS = sorted(path.stem for path in CONF.glob("*.yaml"))
PROMPT = 'def halve(numbers, by=2):\n    """Each number divided by `by`."""'
BODY = "    return [one / by for one in numbers]"


def make(name: str, **changes: Any) -> Reward:
    plain = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    for line in plain.pop("defaults", []):  # as Hydra composes a sum
        if "@" in line:
            option, place = line.split("@rewards.")
            plain.setdefault("rewards", {})[place] = yaml.safe_load((CONF / f"{option}.yaml").read_text())
    reward = decode(Reward, plain | changes, "reward")
    return reward


def episodes(*answers: str, prompt: str = PROMPT, references: list[str | None] | None = None, ids: list[list[int]] | None = None) -> Episodes:
    rows = len(answers)
    return Episodes([prompt] * rows, list(answers), references or [None] * rows, ids or [[1, 2, 3]] * rows, [1] * rows)


def scored(name: str, *answers: str, prompt: str = PROMPT, references: list[str | None] | None = None, **changes: Any) -> list[float]:
    return make(name, **changes).open({})(episodes(*answers, prompt=prompt, references=references))


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_decodes_and_encodes(name: str) -> None:
    reward = make(name)
    assert decode(Reward, encode(reward)) == reward
    assert reward.takes() == (("reward_model",) if name == "model" else ())


# python_parses


def test_a_body_parses_in_its_prompt_and_a_trivial_one_earns_nothing() -> None:
    worthless = ["", "    pass", "    return", "    return None", "    # a comment, and nothing else", '    "a string that says return [1, 2, 3]"', "    ..."]
    assert scored("python_parses", BODY, *worthless) == [1.0] + [0.0] * len(worthless)


@pytest.mark.parametrize(
    "answer",
    [
        "    return [one / by for one in numbers",  # not closed
        "return [one / by for one in numbers]",  # not indented: not the function's body
        "    total = 0\n  return [one / by for one in numbers]",
        BODY + "\n\ndef another(a, b):\n    return a + b",  # goes on after the body
        "Here is the code:\n" + BODY,
        BODY + " \0",
        BODY + " # \ud800",
    ],
)
def test_what_is_no_body_earns_nothing(answer: str) -> None:
    assert scored("python_parses", answer) == [0.0]


def test_the_least_number_of_nodes_is_of_the_answer_alone() -> None:
    prompt = 'def f(a, b=[1, 2, 3, 4], c={"d": 5}):\n    """Many nodes before the answer."""'
    answer = "    return a + b + c"  # Return, BinOp, BinOp, and three names
    assert scored("python_parses", answer, prompt=prompt, min_nodes=6) == [1.0]
    assert scored("python_parses", answer, prompt=prompt, min_nodes=7) == [0.0]


LITERALS = ["1, 2, 3, 4, 5, 6", "'a'\n{i}'b'\n{i}'c'\n{i}'d'\n{i}'e'", "-1 + 2 * (3, 4) == [5] and {{6: f'{{7}}'}}", "pass\n{i}pass\n{i}(1, 2, 3, 4, 5)"]


@pytest.mark.parametrize("answer", LITERALS)
def test_bare_literals_are_no_code(answer: str) -> None:
    """In a definition and without one; one of them beside code adds nothing to it."""
    assert scored("python_parses", "    " + answer.format(i="    ")) == [0.0]
    assert scored("python_parses", answer.format(i=""), prompt="Write some code.") == [0.0]
    code = answer.format(i="    ") + "\n    return a + b + c"
    assert [scored("python_parses", "    " + code, min_nodes=least) for least in (6, 7)] == [[1.0], [0.0]]


def test_what_a_template_leaves_around_the_prompt_does_not_matter() -> None:
    for before, after in (("user\n", "\nassistant\n"), ("You are a helper; answer in code!\nuser\n", "\nassistant\n"), ("", "\n\n")):
        assert scored("python_parses", BODY, "    return", prompt=before + PROMPT + after) == [1.0, 0.0]
    decorated = "import functools\n\n@functools.cache\n" + PROMPT
    assert scored("python_parses", BODY, prompt=decorated) == [1.0]


def test_prompts_that_end_inside_a_definition_or_hold_none() -> None:
    assert scored("python_parses", " by\n    return by + half", " (by", prompt=PROMPT + "\n    half =") == [1.0, 0.0]
    assert scored("python_parses", "print(sum([1, 2]))", "The sum is 3.", prompt="Print the sum of 1 and 2.") == [1.0, 0.0]


def test_a_trimmed_answer_gets_the_bodys_indent_back() -> None:
    answer = "half = by\n    return [one / half for one in numbers]"
    assert scored("python_parses", answer) == [0.0]
    assert scored("python_parses", answer, "    " + answer, trimmed=True) == [1.0, 1.0]


BOMBS = {
    "parentheses": "    " + "(" * 4000,
    "signs": "    " + "-" * 4000 + "1",
    "attributes": "    a" + ".b" * 2000,
    "sums": "    " + "1+" * 2000 + "1",
    "lambdas": "    " + "lambda:" * 500 + "1",
    "indents": "".join("    " + " " * depth + "if 1:\n" for depth in range(80)),
    "elifs": "    if 1: pass\n" + "    elif 1: pass\n" * 200,
    "digits": "    return " + "9" * 4000 * 2,
    "escapes": "    return '\\d' is 1 + 1 + 1",
    "long": BODY + "\n" + "    x = 1\n" * 500_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_no_text_harms_the_parser(name: str) -> None:
    started = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (value,) = scored("python_parses", BOMBS[name])
    assert value in (0.0, 1.0)
    assert time.monotonic() - started < 5


def test_a_longer_answer_earns_nothing() -> None:
    assert scored("python_parses", BODY, max_chars=len(BODY)) == [1.0]
    assert scored("python_parses", BODY, max_chars=len(BODY) - 1) == [0.0]


def test_nothing_is_executed(tmp_path: Path) -> None:
    made = tmp_path / "made"
    scored("python_parses", f"    pass\nopen({str(made)!r}, 'w').write('x')", f"open({str(made)!r}, 'w').write('x')", prompt="")
    assert not made.exists()


# exact_match


@pytest.mark.parametrize(
    ("extract", "answer", "reference", "value"),
    [
        ("whole", " Paris\n", "Paris", 1.0),
        ("whole", "paris", "Paris", 0.0),
        ("last_line", "I think it is\n\nParis \n", "Paris", 1.0),
        ("last_line", "", "Paris", 0.0),
        ("last_number", "2 + 2 is 1,234.50, so 1234.5.", "#### 1,234.5", 1.0),
        ("last_number", "it is -7", "7", 0.0),
        ("last_number", "it is -7", "-7", 1.0),
        ("last_number", "3-5", "5", 1.0),  # a range or a difference: no sign
        ("last_number", "x-5", "5", 1.0),
        ("last_number", "3 - -5", "-5", 1.0),
        ("last_number", "+5", "5", 1.0),
        ("last_number", "none", "7", 0.0),
        ("boxed", "so \\boxed{1}, no: \\boxed{\\frac{1}{2}}.", "we get \\boxed{\\frac{1}{2}}", 1.0),
        ("boxed", "\\boxed{ 42 }", "42", 1.0),
        ("boxed", "42", "42", 0.0),
        ("boxed", "\\boxed{42", "42", 0.0),
    ],
)
def test_exact_match_compares_what_is_extracted(extract: str, answer: str, reference: str, value: float) -> None:
    assert scored("exact_match", answer, references=[reference], extract=extract) == [value]


def test_exact_match_may_ignore_case() -> None:
    assert scored("exact_match", "PARIS", references=["Paris"], ignore_case=True) == [1.0]


def test_a_prompt_without_a_reference_is_named() -> None:
    with pytest.raises(DataError, match=r"reward=exact_match: the prompt 'def halve\(.*has no reference answer; give its row an \"answer\""):
        scored("exact_match", "a", "b", references=["a", None])
    with pytest.raises(DataError, match=r"the reference 'many' of the prompt .* has nothing that extract=last_number finds"):
        scored("exact_match", "a", references=["many"], extract="last_number")


@pytest.mark.parametrize("within", [False, True])
def test_references_are_looked_at_before_any_answer(within: bool) -> None:
    parts = {"right": encode(make("exact_match", extract="last_number")), "parses": encode(make("python_parses"))}
    reward = make("sum", rewards=parts, weights=dict.fromkeys(parts, 1.0)) if within else make("exact_match", extract="last_number")
    scorer, where = reward.open({}), r"reward\.rewards\.right=exact_match" if within else "reward=exact_match"
    scorer.check(["7", "so -1"], "train")
    with pytest.raises(DataError, match=rf'{where}: prompt 2 \(from 0\) of train has no reference answer; give its row an "answer"'):
        scorer.check(["7", "8", None], "train")
    with pytest.raises(DataError, match=rf"{where}: the reference 'many' of prompt 1 \(from 0\) of heldout has nothing that extract=last_number finds; choose"):
        scorer.check(["7", "many", None], "heldout")
    make("python_parses").open({}).check([None], "train")  # needs none


# regex, length, repetition


def test_a_pattern_is_found_anywhere() -> None:
    answers = ["so: 42", "so: forty", "", "A\nB", "x\ud800y"]
    assert scored("regex", *answers, pattern=r"\d+$") == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert scored("regex", *answers, pattern="^a.b", ignore_case=False) == [0.0] * 5
    assert scored("regex", *answers, pattern="(?s)^a.b$", ignore_case=True) == [0.0, 0.0, 0.0, 1.0, 0.0]


def test_no_pattern_takes_long() -> None:
    started = time.monotonic()
    assert scored("regex", "a" * 100_000 + "!", pattern="^(a+)+$") == [0.0]  # Python's re would not end
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("pattern", ["(a", r"(a)\1", "a(?=b)", "\ud800"])
def test_a_pattern_that_re2_does_not_take_is_refused_before_anything_runs(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"^conf error: stage.grpo.reward.pattern: .*; RE2 has no lookaround and no backreferences$"):
        decode(Reward, {"type": "regex", "pattern": pattern, "ignore_case": False}, "stage.grpo.reward")


def test_length_falls_on_both_sides_of_the_target() -> None:
    assert scored("length", "a" * 10, "a" * 5, "", "a" * 15, "a" * 25, target=10, unit="characters") == [1.0, 0.5, 0.0, 0.5, 0.0]
    rows = Episodes(["p"] * 2, ["x", "x"], [None] * 2, [[7, 7, 1, 2, 3, 0], [7, 1, 0]], [2, 1])
    assert make("length", target=4, unit="tokens").open({})(rows) == [1.0, 0.5]


def test_repetition_is_the_distinct_share() -> None:
    assert scored("repetition", "a b a b a b", "a b c d", "", "a", n=2) == [2 / 5, 1.0, 0.0, 1.0]


# sum, and what every reward is held to


def test_a_sum_weighs_its_parts_and_says_each(tmp_path: Path) -> None:
    reward = make("sum", weights={"parses": 2.0, "length": -0.5})
    scorer = reward.open({})
    rows = Episodes([PROMPT] * 2, [BODY, "x"], [None] * 2, [[1] * 65, [1] * 33], [1, 1])
    assert scorer(rows) == [2.0 - 0.5, -0.25]
    assert dict(scorer.components) == {"length": [1.0, 0.5], "parses": [1.0, 0.0]}


def test_sums_nest() -> None:
    inner = encode(make("sum"))
    outer = make("sum", rewards={"a": inner, "b": encode(make("repetition"))}, weights={"a": 1.0, "b": 1.0}).open({})
    (total,) = outer(episodes(BODY))
    assert set(outer.components) == {"a", "a/length", "a/parses", "b"}
    assert total == pytest.approx(outer.components["a"][0] + outer.components["b"][0])


def test_a_sum_takes_what_its_parts_take() -> None:
    parts = {"judge": encode(make("model")), "again": encode(make("model", scale=2.0)), "parses": encode(make("python_parses"))}
    assert make("sum", rewards=parts, weights=dict.fromkeys(parts, 1.0)).takes() == ("reward_model",)


def test_weights_and_rewards_go_together() -> None:
    plain = encode(make("sum"))
    for weights, said in (({"parses": 1.0}, "weights.length: each reward has one weight"), ({"parses": 1.0, "length": 0.0}, "weights.length: is 0; leave")):
        with pytest.raises(ConfigError, match=said):
            decode(Reward, plain | {"weights": weights}, "reward")
    with pytest.raises(ConfigError, match=r"reward.rewards.parses.type: unknown reward type 'python_parse'; did you mean 'python_parses'"):
        decode(Reward, plain | {"rewards": {"parses": {"type": "python_parse"}}}, "reward")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_names_itself_and_the_row(bad: float) -> None:
    class Broken(Reward):  # as a plugin brings one
        def scorer(self, inputs: Mapping[str, Path], where: str) -> Scorer:
            return lambda episodes: [0.0, bad][: len(episodes.answers)]

    register("reward", "broken_in_a_test")(Broken)
    broken = {"type": "broken_in_a_test"}
    reward = decode(Reward, broken, "reward")
    with pytest.raises(RunError, match=rf"reward=broken_in_a_test: is {bad} for row 1, the answer 'y' to 'def halve"):
        reward.open({})(episodes("x", "y"))
    with pytest.raises(RunError, match="gave 2 values for 3 answers"):
        reward.open({})(episodes("x", "y", "z"))
    inside = make("sum", rewards={"mine": broken}, weights={"mine": 1.0}).open({})
    with pytest.raises(RunError, match=rf"reward.rewards.mine=broken_in_a_test: is {bad} for row 1"):
        inside(episodes("x", "y"))


# the trained one


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64, num_labels=1,
        eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("reward_model")
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


SEQUENCES = [[5, 6, 7, 0], [9, 0], [11, 12, 13, 14, 15, 16, 0], [3, 4, 0, 7, 0]]


def test_a_trained_model_scores_the_last_token_whatever_the_batch(trained: Path) -> None:
    import torch
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification.from_pretrained(trained).eval()
    model.config.pad_token_id = model.model.padding_idx = None  # one row at a time: transformers then takes the very last token
    with torch.no_grad():
        expected = [float(model(input_ids=torch.tensor([ids])).logits) for ids in SEQUENCES]
    rows = Episodes(["p"] * 4, ["a"] * 4, [None] * 4, SEQUENCES, [1] * 4)
    for batch_size in (1, 3, 8):
        assert make("model", batch_size=batch_size).open({"reward_model": trained})(rows) == pytest.approx(expected, abs=1e-6)
    moved = make("model", shift=0.5, scale=-2.0).open({"reward_model": trained})(rows)
    assert moved == pytest.approx([(one - 0.5) * -2 for one in expected], abs=1e-5)


def test_what_is_no_reward_model_is_refused(trained: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    small = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**small, num_labels=1)).save_pretrained(tmp_path / "policy")
    with pytest.raises(CheckpointError, match=r"is no trained reward model: it lacks score\.weight; give what stage=reward made"):
        make("model").open({"reward_model": tmp_path / "policy"})
    LlamaForSequenceClassification(LlamaConfig(**small, num_labels=3)).save_pretrained(tmp_path / "classes")
    with pytest.raises(CheckpointError, match="gives 3 scores, not one"):
        make("model").open({"reward_model": tmp_path / "classes"})
    with pytest.raises(CheckpointError, match="is not a model folder"):
        make("model").open({"reward_model": tmp_path})


def test_planning_a_reward_imports_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, yaml; from lmforge.codec import decode; from lmforge.reward.nodes import Reward\n"
        f"for name in {[one for one in OPTIONS if one != 'sum']}:\n"
        f"    list(decode(Reward, yaml.safe_load(open('{CONF}/' + name + '.yaml')), 'reward').check('reward'))\n"
        "assert not {'torch', 'transformers', 'lightning'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CONF.parents[1])
