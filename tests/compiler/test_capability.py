"""What is refused names what is taken: every no of the matrix is typed, and then what its refusal says, as it is written there."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from lmforge.compiler.capability import NOES, No, refused, table
from lmforge.errors import LmforgeError, PlanError, Problem
from lmforge.plan import Plan

PlanOf = Callable[..., Plan]
SHAPE = "model=nano model.num_hidden_layers=8 model.num_attention_heads=8 model.tie_word_embeddings=false eval=none data=text hardware=h100x8"
KINDS = {"adapter": "adapter={}", "precision": "{}", "optimizer": "optimizer={}", "guard": "optimizer.max_skips=3"}
PRECISION = {"fp16": "precision=fp16", "bfloat16 weights": "precision=bf16 precision.param_dtype=bfloat16"}
# What a user may have typed for each way, by option and by axis.
WAYS = {way: [f"parallel={way}"] for way in ("ddp", "fsdp", "tp", "pp")} | {"cp": [], "deepspeed": ["parallel=deepspeed_zero3", "parallel=deepspeed_zero1"]}
for axis in ("tp", "pp", "cp"):
    WAYS[axis] += [f"parallel=fsdp parallel.{axis}=2", f"parallel=fsdp parallel.{axis}=2 parallel.dp_shard=4", f"parallel={axis} parallel.devices=4"]
WAYS["cp"] = [words.replace("parallel=cp", "parallel=fsdp parallel.dp_shard=1 parallel.cp=4") for words in WAYS["cp"]]


def cells(noes: Sequence[No] = NOES) -> Iterator[tuple[str, str]]:
    """(value, what is typed) of each no."""
    rows = [row[0].partition("=")[::2] for row in table()][1:]
    for no in noes:
        for value in [name for kind, name in rows if kind == no.kind] if "*" in no.values else no.values:
            for way in no.ways:
                for words in WAYS[way]:
                    yield value, f"{more(no.kind, value)} {words}"


def more(kind: str, value: str) -> str:
    """What makes a plan show a value."""
    if value in ("ppo", "grpo"):
        return f"stage=[pretrain,{value}] stage.{value}.reward=length"
    if kind == "stage":
        return "stage=pretrain" if value == "pretrain" else f"stage=[pretrain,{value}]"
    return f"stage={'[pretrain,sft]' if kind == 'adapter' else 'pretrain'} {KINDS[kind].format(PRECISION.get(value, value))}"


def ways_out(problem: Problem, typed: list[str]) -> list[list[str]]:
    """The words of each alternative that a refusal says to type; a number is for the key that was typed, or else for the one it names."""
    own = ".".join(problem.where.split(".")[2:])
    key = own if any(word.startswith(f"{own}=") for word in typed) else problem.where
    parts = re.split(r" or |, ", problem.instead.removeprefix("type "))
    found = [[f"{key}={part}"] if part.isdigit() else [word for word in part.split() if "=" in word] for part in parts]
    return [one for one in found if one]


def retyped(typed: list[str], words: list[str]) -> list[str]:
    """The command line with an option or key given another value, or a new one at its end."""
    keys = {word.partition("=")[0] for word in words}
    return [word for word in typed if word.partition("=")[0] not in keys] + words


@pytest.fixture
def rows(tmp_path: Path) -> str:
    (tmp_path / "rows").mkdir()
    pair = '"prompt": "a question", "chosen": "yes", "rejected": "no"'
    (tmp_path / "rows/text.jsonl").write_text('{"text": "a row"}\n')
    (tmp_path / "rows/preference.jsonl").write_text(f"{{{pair}}}\n")
    (tmp_path / "rows/chat.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    return f"data.path={tmp_path}/rows"


def accepted(typed: list[str], plan_of: PlanOf) -> None:
    """Refused, and each alternative that the refusal names is not."""
    with pytest.raises(PlanError) as caught:
        plan_of(*typed)
    problems = {problem: ways_out(problem, typed) for problem in caught.value.problems}
    assert all(problems.values()), problems
    for choice in itertools.product(*problems.values()):  # whoever is told of several mends them all
        words = functools.reduce(retyped, choice, typed)
        try:
            plan_of(*words)
        except LmforgeError as error:
            pytest.fail(f"{' '.join(typed)}: {caught.value}\n{' '.join(words)}: {error}")


@pytest.mark.parametrize("no", NOES, ids=[f"{no.kind}={no.values[0]} with {no.ways[0]}" for no in NOES])
def test_what_a_no_names_instead_is_taken(no: No, plan_of: PlanOf, rows: str) -> None:
    for _, words in cells([no]):
        accepted([*SHAPE.split(), rows, *words.split()], plan_of)


@pytest.mark.parametrize(
    "words",
    [
        "model.num_hidden_layers=6 parallel=pp",
        "model.num_hidden_layers=3 parallel=fsdp parallel.pp=4",
        "model.num_hidden_layers=3 parallel=fsdp parallel.pp=4 parallel.dp_shard=2",
        "model.num_hidden_layers=3 parallel=pp parallel.tp=2",
        "model.tie_word_embeddings=true parallel=pp",
        "model.tie_word_embeddings=true model.num_hidden_layers=6 parallel=pp",
        "model.hidden_size=96 model.num_attention_heads=12 model.num_key_value_heads=6 parallel=tp",
        "model.hidden_size=96 model.num_attention_heads=12 model.num_key_value_heads=6 parallel=fsdp parallel.tp=4 parallel.dp_shard=2",
        "model.hidden_size=96 model.num_attention_heads=12 model.num_key_value_heads=6 parallel=3d parallel.tp=4",
        "model.intermediate_size=68 model.num_attention_heads=8 model.num_key_value_heads=8 parallel=tp",
        "model=gpt3_175b model.num_hidden_layers=8 model.hidden_size=768 parallel=tp",
        "model=gpt3_175b model.num_hidden_layers=8 model.hidden_size=768 parallel=fsdp parallel.pp=2 parallel.dp_shard=4",
        "parallel=fsdp parallel.cpu_offload=true parallel.devices=1",
        "parallel=pp parallel.micro_batch_size=64",
        "parallel=pp optimizer.global_batch_tokens=1024",
        "parallel=fsdp_pp optimizer.global_batch_tokens=28672 parallel.micro_batch_size=20",
        "parallel=fsdp_pp optimizer.global_batch_tokens=28672 parallel.micro_batch_size=28",
        "parallel=fsdp parallel.devices=3",
    ],
)
def test_what_a_shape_does_not_allow_names_what_it_does(words: str, plan_of: PlanOf, rows: str) -> None:
    accepted(retyped([*SHAPE.split(), rows, "stage=pretrain"], words.split()), plan_of)


def test_every_row_of_the_matrix_that_has_a_no_is_typed_here() -> None:
    """So a value that is new in the matrix cannot be forgotten."""
    typed = {value for value, _ in cells()}
    for row in list(table())[1:]:
        kind, _, value = row[0].partition("=")
        assert value in typed or not any(refused(kind, value, (way,)) for way in WAYS if way != "cp"), row[0]
