"""stage=sample: draws by an own loop, held to transformers' forward pass and warpers; the artifact; prompts read back from their ids."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lmforge.data.nodes import Text
from lmforge.errors import DataError, RunError
from lmforge.formats import corpus
from lmforge.formats import samples as format_
from lmforge.formats.tokens import Tokens, read_meta
from lmforge.inference.checkpoint import open_model, open_tokenizer
from lmforge.inference.generate import stop_tokens
from lmforge.inference.rollout import rollout, uniforms
from lmforge.stage.readback import Reader, contents
from lmforge.stage.sample import sample
from lmforge.stage.sampling import Sample
from lmforge.step import Context, Report
from lmforge.tokenizer.markers import END, SPECIAL_TOKENS
from lmforge.tokenizer.templates import Renderer
from lmforge.tokenizer.tokenize import write
from lmforge.training.rl.rollouts import seed_of

PROMPTS = ["def add(a, b):", "def sub(a, b):\n    'less'", "Say  hello\n", "def one():", "class Point:", "import os", "x = [1, 2]", "for i in range(3):"]
TEXTS = [*PROMPTS, "    return a + b\n", "    return a - b\n", "print(i)\n"]
TURNS = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "x"))
CHAT = [{"role": role, "content": text} for role, text in TURNS]
HEADED = (
    "{{ bos_token }}{% if messages[0].role != 'system' %}<|h|>system\nYou help.<|e|>{% endif %}"
    "{% for m in messages %}<|h|>{{ m.role }}\n{{ m.content | trim }}<|e|>{% endfor %}{% if add_generation_prompt %}<|h|>assistant\n{% endif %}"
)


def tokenizer(template: str | None, *special: str) -> Any:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS, vocab_size=300, special_tokens=["<|endoftext|>", *special], show_progress=False)
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>", additional_special_tokens=list(special)
    )
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tokens of prompts with our template, and a Llama of 0.03M parameters with random weights."""
    root = tmp_path_factory.mktemp("inputs")
    tokenizer(None, *SPECIAL_TOKENS[1:]).save_pretrained(root / "tokenizer")
    with corpus.Writer(root / "corpus") as writer:
        rows = [{"prompt": text, "answer": f"answer {number}" if number % 2 else None} for number, text in enumerate(PROMPTS)]
        rows.append({"prompt": CHAT, "answer": None})
        for number, row in enumerate(rows):
            writer.account.rows.entered += 1
            writer.account.rows.kept += 1
            writer.account.view("prompt").entered += 1
            writer.account.view("prompt").kept += 1
            writer.write("prompt", "heldout" if number == 0 else "train", row | {"source": f"rows.jsonl:{number}"})
    (root / "tokens").mkdir()
    write(root / "corpus", root / "tokenizer", root / "tokens", "prompt", 40, 300, Report())
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=300, max_position_embeddings=64, initializer_range=0.2, bos_token_id=None, eos_token_id=0, pad_token_id=0, **shape)
    LlamaForCausalLM(config).save_pretrained(root / "checkpoint")
    open_tokenizer(root / "tokens" / "tokenizer").save_pretrained(root / "checkpoint")
    return {"tokens:prompt": root / "tokens", "checkpoint": root / "checkpoint"}


class Heard(Report):
    def __init__(self) -> None:
        self.tables: list[Any] = []

    def table(self, *given: Any) -> None:
        self.tables.append(given)


def stage(**keys: Any) -> Sample:
    values = {"prompts": 5, "split": "train", "answers": 3, "max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0, "batch_size": 6, "seed": 1}
    data = Text(path=None, text_field="text", heldout_fraction=0.1, txt_document_chars=64)
    return Sample(**{**values, "init_from": None, "data": data, **keys})  # type: ignore[arg-type]


def ran(inputs: dict[str, Path], out: Path, **keys: Any) -> tuple[dict[str, Any], list[format_.Sampled], Heard]:
    out.mkdir(parents=True, exist_ok=True)
    heard = Heard()
    metrics = sample(stage(**keys), Context(step="sample", folder=out.parent, out=out, inputs=inputs, report=heard))
    return metrics, format_.read(out), heard


def test_the_artifact_holds_readable_prompts_spread_over_the_split(inputs: dict[str, Path], tmp_path: Path) -> None:
    metrics, rows, heard = ran(inputs, tmp_path / "samples")
    total = len(Tokens(inputs["tokens:prompt"], "train"))
    assert total == 8
    assert [row.id for row in rows] == [f"train-{number * total // 5}" for number in range(5)]
    assert [row.prompt for row in rows] == [PROMPTS[1:][number * total // 5] for number in range(5)]
    numbers = [PROMPTS.index(str(row.prompt)) for row in rows]
    assert [row.reference for row in rows] == [f"answer {number}" if number % 2 else None for number in numbers]
    assert metrics["prompts"] == 5
    assert metrics["answers"] == sum(len(row.answers) for row in rows)
    meta = json.loads((tmp_path / "samples" / "meta.json").read_text())
    assert meta["drawn"] == 15 == meta["kept"] + meta["duplicates"] + meta["empty"]
    assert metrics["distinct_share"] == meta["kept"] / 15
    assert open_tokenizer(tmp_path / "samples" / "tokenizer").chat_template
    _, columns, table = heard.tables[0]
    assert len(columns) == len(table[0])
    assert len(table) == metrics["answers"]
    assert not [path for path in (tmp_path / "samples").iterdir() if path.name.startswith(".")]


def test_a_conversation_comes_back_as_messages(inputs: dict[str, Path], tmp_path: Path) -> None:
    _, rows, _ = ran(inputs, tmp_path / "samples", prompts=100)
    assert len(rows) == 8
    assert rows[-1].prompt == CHAT


def test_answers_do_not_depend_on_the_batch_and_do_depend_on_the_seed(inputs: dict[str, Path], tmp_path: Path) -> None:
    texts = {}
    for name, keys in {"6": {}, "1": {"batch_size": 1}, "64": {"batch_size": 64}, "other": {"seed": 2}}.items():
        _, rows, _ = ran(inputs, tmp_path / name, **keys)
        texts[name] = [[answer.text for answer in row.answers] for row in rows]
    assert texts["6"] == texts["1"] == texts["64"] != texts["other"]


def test_equal_answers_are_kept_once_and_counted(inputs: dict[str, Path], tmp_path: Path) -> None:
    metrics, rows, _ = ran(inputs, tmp_path / "samples", temperature=1e-4)
    meta = json.loads((tmp_path / "samples" / "meta.json").read_text())
    assert all(len(row.answers) <= 1 for row in rows)
    assert meta["duplicates"] == 2 * meta["kept"]
    assert metrics["rankable_prompts"] == 0


def test_each_answer_has_its_draw_and_the_logprob_of_one_plain_forward_pass(inputs: dict[str, Path], tmp_path: Path) -> None:
    """Each prompt drawn again by itself gives the ids; their log-probs are summed at temperature 1, whatever they were drawn at, end token included."""
    model: Any = open_model(inputs["checkpoint"])
    opened = open_tokenizer(inputs["tokens:prompt"] / "tokenizer")
    model.generation_config.eos_token_id = stops = sorted({0, *range(4, 300, 17)})  # so many that some answers end
    model.save_pretrained(tmp_path / "checkpoint")
    opened.save_pretrained(tmp_path / "checkpoint")
    _, rows, _ = ran(inputs | {"checkpoint": tmp_path / "checkpoint"}, tmp_path / "samples", temperature=1.3, top_p=0.9)
    stops = sorted({*stops, *read_meta(inputs["tokens:prompt"])["stop_token_ids"]})
    for row in rows:
        place = int(row.id.removeprefix("train-"))
        prompt = Tokens(inputs["tokens:prompt"], "train").example(place)[0].tolist()
        noise = uniforms(seed_of(1, "sample", place), 3, 12)
        drawn = rollout(model, [prompt] * 3, max_new_tokens=12, temperature=1.3, top_p=0.9, stop_ids=stops, pad_id=0, noise=noise)
        found = {}
        for ids, length, ended in zip(drawn.ids.tolist(), drawn.lengths.tolist(), drawn.ended.tolist(), strict=True):
            with torch.inference_mode():
                logprobs = model(torch.tensor([prompt + ids[:length]])).logits[0].log_softmax(-1)
            total = sum(logprobs[len(prompt) + at - 1, token].item() for at, token in enumerate(ids[:length]))
            text = opened.decode(ids[: length - ended], skip_special_tokens=True)
            found.setdefault(text, (length, ended, pytest.approx(total, abs=1e-3)))
        assert {answer.text: (answer.tokens, answer.ended, answer.logprob) for answer in row.answers} == {
            text: one for text, one in found.items() if text.strip()
        }
    assert {answer.ended for row in rows for answer in row.answers} == {True, False}


def test_a_prompt_without_room_is_one_line(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="exceed the context of 64"):
        ran(inputs, tmp_path / "samples", max_new_tokens=60)


def test_prompts_that_cannot_be_read_back_are_refused_where_all_are_such(inputs: dict[str, Path], tmp_path: Path) -> None:
    """A template that drops the text: rendering what is read would not give the ids that were answered."""
    folder = shutil.copytree(inputs["tokens:prompt"], tmp_path / "tokens")
    opened = open_tokenizer(folder / "tokenizer")
    opened.chat_template = "{{ bos_token }}{% if add_generation_prompt %}>{% endif %}"
    opened.save_pretrained(folder / "tokenizer")
    with pytest.raises(DataError, match="no prompt can be read back"):
        ran(inputs | {"tokens:prompt": folder}, tmp_path / "samples")


def test_the_end_of_a_turn_ends_an_answer(inputs: dict[str, Path]) -> None:
    """Our template's end token, which nothing in a prompt shows to be one."""
    opened = open_tokenizer(inputs["tokens:prompt"] / "tokenizer")
    ends = sorted(opened.convert_tokens_to_ids([END, "<|endoftext|>"]))
    assert read_meta(inputs["tokens:prompt"])["stop_token_ids"] == ends
    model: Any = open_model(inputs["checkpoint"])
    assert stop_tokens(model, ends) == ends
    model.generation_config.eos_token_id = [0, 299]
    assert stop_tokens(model, ends) == [*ends, 299]
    assert stop_tokens(model, [None]) == [0, 299]


@pytest.mark.parametrize("messages", [[{"role": "user", "content": "Say  hello\n\nnow"}], CHAT, CHAT[1:]])
@pytest.mark.parametrize("own", [True, False], ids=["our template", "one with a head and trimming"])
def test_prompts_are_read_back_from_their_ids(inputs: dict[str, Path], own: bool, messages: list[dict[str, str]], tmp_path: Path) -> None:
    if own:
        opened = open_tokenizer(inputs["tokens:prompt"] / "tokenizer")
    else:
        tokenizer(HEADED, "<|h|>", "<|e|>").save_pretrained(tmp_path / "tokenizer")
        opened = open_tokenizer(tmp_path / "tokenizer")
    with Renderer(opened) as renderer:
        [text] = renderer.render([(messages, True)])
        ids = opened(text, add_special_tokens=False)["input_ids"]
        reader = Reader(opened, renderer)
        assert reader.read(ids) == (messages if len(messages) > 1 else messages[0]["content"])
        assert reader.read(ids[:-1]) is None
        assert reader.read([*ids, *opened(END if own else "<|e|>")["input_ids"]]) is None


MARKED = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


def test_contents_stand_between_what_the_template_writes() -> None:
    assert contents("<u>a b<e>", ["<u>", "<e>"], [0, 6]) == ["a b"]
    assert contents("<u>a<e>b<e>", ["<u>", "<e>"], [0, 4, 8]) is None
    assert contents("<u>a<e>b<e>", ["<u>", "<e>", "<e>"], [0, 4, 8]) == ["a", "b"]
    assert contents("u:a\nu:b\nx\n", ["u:", "\nu:", "\n"], []) == ["a", "b\nx"]
    assert contents("u:\n", ["u:", "\nu:", "\n"], []) is contents("u:a", ["u:", "\n"], []) is contents("a", [], []) is None
    assert contents("ab", ["ab", "b"], []) is None  # the parts would overlap


def test_a_long_prompt_full_of_what_the_template_writes_is_read_in_time(tmp_path: Path) -> None:
    """Every separator, thousands of times, without special tokens: a regular expression with 16 groups would try them in every combination."""
    tokenizer(MARKED, "<|h|>").save_pretrained(tmp_path / "tokenizer")
    opened = open_tokenizer(tmp_path / "tokenizer")
    hard = "user: x\nassistant: y\n" * 5000
    with Renderer(opened) as renderer:
        reader = Reader(opened, renderer)
        reader.read(opened("user: a\nassistant: ")["input_ids"])  # what a role set looks like is rendered once
        for text in (hard, f"system: {hard}<|h|>", f"user: {hard}\n<|h|>\nassistant: "):
            ids = opened(text, add_special_tokens=False)["input_ids"]
            start = time.perf_counter()
            assert reader.read(ids) is None
            assert time.perf_counter() - start < 2
        ids = opened(f"user: {hard}\nassistant: ", add_special_tokens=False)["input_ids"]
        start = time.perf_counter()
        assert reader.read(ids) == hard
        assert time.perf_counter() - start < 2
