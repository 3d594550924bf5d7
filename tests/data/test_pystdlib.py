"""`data=pystdlib` on the real standard library, run once, and on a small planted one."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import shutil
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lmforge.data import stdlib
from lmforge.data.mutate import KINDS
from lmforge.data.nodes import MUTATIONS, Data, PyStdlib
from lmforge.data.overlap import groups
from lmforge.data.pairs import Rules
from lmforge.data.split import unit
from lmforge.errors import ConfigError, DataError
from lmforge.formats import corpus, manifest
from lmforge.step import Context

ROOT = Path(sysconfig.get_paths()["stdlib"])
Make = Callable[..., Data]
RULES = Rules(
    docstring_paragraphs=1,
    min_body_chars=10,
    max_body_chars=400,
    max_pair_chars=600,
    negatives=1,
    mutations=MUTATIONS,
    mutation_fraction=0.5,
    mutation_edits=1,
    length_tolerance=0.2,
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory, data: Make) -> Path:
    folder = tmp_path_factory.mktemp("library")
    out = folder / "corpus"
    data("pystdlib").run(Context(step="data", folder=folder, out=out, inputs={}))
    return out


def rows(folder: Path, view: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for split in corpus.SPLITS:
        for row in corpus.read(folder, view, split):
            yield split, row


def test_the_account_adds_up_and_is_what_was_written(library: Path, data: Make) -> None:
    account = corpus.account(library)
    exclude = data("pystdlib").exclude  # type: ignore[attr-defined]
    assert account.rows.entered == len(manifest.walk(ROOT, (".py",), exclude)) > 400
    for view in corpus.views(library):
        written = [split for split, _ in rows(library, view)]
        tally = account.views[view]
        assert (written.count("train"), written.count("heldout")) == (tally.train, tally.heldout)
        assert tally.kept == len(written)
        assert tally.heldout > 30
    assert account.views["preference"].entered == account.views["chat"].kept > 2000


def test_the_text_is_the_files_without_tests_and_without_duplicates(library: Path) -> None:
    texts = {row["source"]: row["text"] for _, row in rows(library, "text")}
    assert texts["json/decoder.py"] == (ROOT / "json" / "decoder.py").read_text(encoding="utf-8")
    assert len(set(texts.values())) == len(texts)
    assert not [name for name in texts if {"test", "tests", "site-packages", "idle_test", "_bundled"} & set(name.split("/"))]


def test_held_out_files_are_the_same_in_every_view(library: Path) -> None:
    side = {row["source"]: split for split, row in rows(library, "text")}
    for view in ("chat", "preference"):
        for split, row in rows(library, view):
            assert side[row["source"].partition(":")[0]] == split


def test_a_pair_is_the_function_that_stands_in_the_file(library: Path) -> None:
    found = {row["source"]: row["messages"] for _, row in rows(library, "chat")}
    user, assistant = found["shlex.py:quote"]
    assert user == {"role": "user", "content": 'def quote(s):\n    """Return a shell-escaped version of the string *s*."""'}
    assert assistant["role"] == "assistant"
    assert assistant["content"].startswith("    if not s:\n        return \"''\"\n")


def test_prompt_and_body_make_the_original_function(library: Path) -> None:
    """Oracle: the function's own ast, docstring aside, found again in the file that `source` names."""
    trees = {row["source"]: ast.parse(row["text"]) for _, row in rows(library, "text")}
    bodies: dict[str, set[str]] = {}
    for name, tree in trees.items():
        functions = (one for one in ast.walk(tree) if isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef)))
        bodies[name] = {_shape(one) for one in functions}
    checked = 0
    for _, row in rows(library, "chat"):
        prompt, body = (message["content"] for message in row["messages"])
        function = ast.parse(f"{prompt}\n{body}").body[0]
        assert isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        assert ast.get_docstring(function)
        assert _shape(function) in bodies[row["source"].partition(":")[0]], row["source"]
        assert 24 <= len(body) <= 400
        assert len(prompt) + len(body) <= 600
        checked += 1
    assert checked > 2000


def _shape(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return function.name + ast.dump(function.args) + "".join(ast.dump(one) for one in function.body[1:])


def test_rejected_bodies_parse_differ_and_match_in_length(library: Path) -> None:
    kinds = {"mutation": 0, "other": 0}
    held_bodies = {row["chosen"] for split, row in rows(library, "preference") if split == "heldout"}
    for split, row in rows(library, "preference"):
        chosen, rejected = row["chosen"], row["rejected"]
        kinds[row["kind"]] += 1
        assert ast.dump(ast.parse(f"async def _():\n{rejected}")) != ast.dump(ast.parse(f"async def _():\n{chosen}"))
        assert abs(len(chosen) - len(rejected)) <= 0.1 * len(chosen)
        if row["kind"] == "other" and split == "heldout":
            assert rejected in held_bodies
    assert min(kinds.values()) > 0.3 * sum(kinds.values())


@pytest.mark.parametrize("kind", ["mutation", "other"])
def test_length_does_not_tell_chosen_from_rejected(library: Path, kind: str) -> None:
    found = [row for _, row in rows(library, "preference") if row["kind"] == kind]
    difference = [len(row["rejected"]) - len(row["chosen"]) for row in found]
    mean_length = statistics.mean(len(row["chosen"]) for row in found)
    assert abs(statistics.mean(difference)) < 0.01 * mean_length
    longer, shorter = sum(one > 0 for one in difference), sum(one < 0 for one in difference)
    assert abs(longer - shorter) < 0.1 * len(found)


def test_content_is_fast_once_cached(tmp_path: Path, data: Make) -> None:
    node, cache = data("pystdlib"), tmp_path / "manifest.json"
    first = node.content(cache)
    took = []
    for _ in range(5):
        start = time.perf_counter()
        assert node.content(cache) == first
        took.append(time.perf_counter() - start)
    assert min(took) < 0.2  # 0.03 s on an idle machine
    assert node.content(None) == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heldout_fraction": 0}, "data.heldout_fraction: 0.0 must be > 0"),
        ({"min_body_chars": 500}, "data.min_body_chars: 500 is above max_body_chars=400"),
        ({"mutations": ["typo"]}, "data.mutations: 'typo' is not one of operator"),
        ({"mutations": []}, "data.mutations: empty; name at least one kind"),
        ({"length_tolerance": float("nan")}, "data.length_tolerance: nan is not a finite number"),
    ],
)
def test_bad_keys(change: dict[str, Any], message: str, data: Make) -> None:
    with pytest.raises(ConfigError) as caught:
        data("pystdlib", **change)
    assert message in str(caught.value)


def test_nodes_and_code_name_the_same_mutations(data: Make) -> None:
    assert MUTATIONS == KINDS
    assert isinstance(data("pystdlib"), PyStdlib)


SOURCE = '''class A:
  def {name}(self, a, b):
    """Add {name}.

    More words.
    """

    # why {name}
    text = """one
two"""
    return a + b - len(text)
'''


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A library of 20 good files, a copy, and three bad ones."""
    folder = tmp_path / "lib"
    (folder / "pkg" / "tests").mkdir(parents=True)
    for index in range(20):
        (folder / "pkg" / f"m{index}.py").write_text(SOURCE.format(name=f"f{index}"))
    shutil.copy(folder / "pkg" / "m1.py", folder / "again.py")
    (folder / "latin.py").write_bytes(b"# one\n# caf\xe9\n")
    (folder / "broken.py").write_text("x = 1\ndef f(:\n")
    (folder / "nothing.py").write_text("\n")
    (folder / "pkg" / "tests" / "t.py").write_text("x = 1\n")
    return folder


def write(folder: Path, out: Path, negatives: int = 1) -> corpus.Account:
    rules = dataclasses.replace(RULES, negatives=negatives)
    return stdlib.write(folder, manifest.walk(folder, (".py",), ["tests"]), 0.2, rules, out, lambda done, total, text: None)


def test_bad_files_are_counted_and_quarantined_by_line(small: Path, tmp_path: Path) -> None:
    account = write(small, tmp_path / "out")
    assert account.rows.plain() == {"in": 24, "kept": 20, "dropped": {"duplicate": 1, "empty": 1, "not_utf8": 1, "unparsable": 1}}
    bad = {(row["file"], row["line"]) for row in corpus.quarantined(tmp_path / "out")}
    assert bad == {("latin.py", 2), ("broken.py", 2)}


def test_a_method_comes_out_at_column_0_and_its_strings_stay(small: Path, tmp_path: Path) -> None:
    write(small, tmp_path / "out")
    row = next(row for _, row in rows(tmp_path / "out", "chat") if row["source"].endswith("A.f7"))
    assert [message["content"] for message in row["messages"]] == [
        'def f7(self, a, b):\n    """Add f7."""',
        '    # why f7\n    text = """one\ntwo"""\n    return a + b - len(text)',
    ]


def test_two_runs_are_byte_for_byte_the_same_and_place_does_not_count(small: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "library"
    write(small, tmp_path / "a")
    shutil.copytree(small, moved)
    write(moved, tmp_path / "b")
    names = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(names) == 8
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_library_without_pairs_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "lib"
    folder.mkdir()
    for index in range(3):
        (folder / f"{index}.py").write_text(f"x = {index}\n")
    with pytest.raises(DataError, match="no train rows for the chat view"):
        write(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_are_plain_json_lines(library: Path) -> None:
    lines = (library / "preference" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    assert set(json.loads(lines[0])) == {"prompt", "chosen", "rejected", "source", "kind"}


def test_no_held_out_pair_stands_in_training(library: Path) -> None:
    """Oracle: plain text search over all training files and pairs, indentation and blank lines aside."""
    files = "\n\n".join(f"\n{flat(row['text'])}\n" for split, row in rows(library, "text") if split == "train")
    pairs = [(split, *(flat(message["content"]) for message in row["messages"])) for split, row in rows(library, "chat")]
    prompts = {prompt for split, prompt, _ in pairs if split == "train"}
    held = [(prompt, body) for split, prompt, body in pairs if split == "heldout"]
    assert [prompt for prompt, _ in held if prompt in prompts or f"\n{prompt}\n" in files] == []
    assert [body for _, body in held if f"\n{body}\n" in files] == []
    assert corpus.account(library).views["chat"].dropped["in_training"] > 0


def flat(text: str) -> str:
    return "\n".join(line.strip() for line in text.split("\n") if line.strip())


def test_held_out_files_are_not_half_seen_in_training(library: Path) -> None:
    def telling(text: str) -> set[str]:
        return {line for line in flat(text).split("\n") if len(line) > 20}

    seen: set[str] = set().union(*(telling(row["text"]) for split, row in rows(library, "text") if split == "train"))
    held = [(telling(row["text"]), len(row["text"])) for split, row in rows(library, "text") if split == "heldout"]
    mostly_seen = sum(size for lines, size in held if len(lines & seen) > 0.5 * len(lines))
    assert mostly_seen < 0.01 * sum(size for _, size in held)


PAIR = '''def {name}({argument}):
    """{text}"""
{indent}total = {argument} * {number}
{indent}return [total, {number}, "{number}"]
'''


def planted(folder: Path, files: int) -> None:
    folder.mkdir()
    for index in range(files):
        text = PAIR.format(name=f"own{index}", argument=f"value{index}", text=f"Scale by {index}.", number=index, indent="    ")
        (folder / f"m{index:02}.py").write_text(text)


def chats(out: Path) -> dict[str, str]:
    return {row["source"]: split for split, row in rows(out, "chat")}


@pytest.mark.parametrize("what", ["body", "prompt"])
def test_a_planted_copy_of_a_training_function_is_dropped_from_the_held_out_side(tmp_path: Path, what: str) -> None:
    """Every file gets a function whose body (at another indent) or prompt (of a function too long to be a pair itself) it shares with all the others."""
    folder = tmp_path / "lib"
    planted(folder, 20)
    for index, file in enumerate(sorted(folder.iterdir())):
        own = f"{index:03}"
        if what == "body":
            text = f'if True:\n    def copy{own}(first):\n        """Copy {own}."""\n\n        return first + [3, 1, 4]\n'
        else:
            long = "".join(f"    first = {number}{own}\n" for number in range(100)) if index % 2 else ""
            text = f'def copy(first):\n    """Copy.\n\n    More of {own}.\n    """\n{long}    return first * {own[-1]}{index}1.5\n'
        file.write_text(file.read_text() + text)
    account = write(folder, tmp_path / "out")
    found = chats(tmp_path / "out")
    held_files = account.views["text"].heldout
    assert {name.partition(":")[2].startswith("copy") for name, split in found.items() if split == "heldout"} == {False}
    assert sum(split == "heldout" for split in found.values()) == held_files
    assert any(":copy" in name for name, split in found.items() if split == "train")
    assert 0 < account.views["chat"].dropped["in_training"] <= held_files


def test_near_duplicates_are_on_one_side_and_a_large_group_is_trained_on(tmp_path: Path) -> None:
    """Pairs of files that share most lines, and one group of a third of all files, whatever their names."""
    folder = tmp_path / "lib"
    planted(folder, 20)
    for index, file in enumerate(sorted(folder.iterdir())):
        table = "".join(f"TABLE_{index // 2}_{number} = '{number:08}'\n" for number in range(10))
        file.write_text(file.read_text() + table)
    for index in range(10):
        rest = "".join(f"MAPPING_{number} = 'the same in all {number}'\n" for number in range(10))
        (folder / f"cp{index}.py").write_text(f"number = {index}\n{rest}")
    write(folder, tmp_path / "out")
    side = {row["source"]: split for split, row in rows(tmp_path / "out", "text")}
    assert [side[f"m{index:02}.py"] for index in range(0, 20, 2)] == [side[f"m{index:02}.py"] for index in range(1, 20, 2)]
    assert {side[f"cp{index}.py"] for index in range(10)} == {"train"}
    assert set(side.values()) == {"train", "heldout"}


@pytest.mark.parametrize(("count", "kinds"), [(9, 1), (9, 2)])
def test_nothing_but_near_duplicates(tmp_path: Path, count: int, kinds: int) -> None:
    modules = [
        stdlib.Module(str(index), "".join(f"{index % kinds} {line} is one of many lines\n" for line in range(9)), ast.parse(""), f"{index:064x}")
        for index in range(count)
    ]
    if kinds == 1:
        with pytest.raises(DataError, match="all near-duplicates"):
            stdlib._held(modules, 0.1, tmp_path)
    else:
        held = stdlib._held(modules, 0.1, tmp_path)
        assert held in [{module.digest for module in modules[kind::2]} for kind in range(2)]


def test_a_large_group_is_held_out_no_more_often_than_its_share() -> None:
    """The smallest of 60 digests is below 0.1 nearly always; the key of the group must not be."""
    digests = [hashlib.sha256(str(index).encode()).hexdigest() for index in range(60 * 300)]
    keys = [stdlib._group_key(digests[start : start + 60], large=False) for start in range(0, len(digests), 60)]
    assert 0.04 < sum(unit(key) < 0.1 for key in keys) / len(keys) < 0.17


def test_groups_follow_chains_and_short_overlaps_do_not_count() -> None:
    lines = [f"a telling line of some length, number {index}" for index in range(12)]
    texts = ["\n".join(lines[:6]), "\n".join("    " + line for line in lines[3:9]), "\n".join(lines[6:]), "\n".join([*lines[:2], "x = 1"])]
    assert groups(texts) == [0, 0, 0, 3]


def preferences(out: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {split: [] for split in corpus.SPLITS}
    for split, row in rows(out, "preference"):
        found[split].append(row)
    return found


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, data: Make) -> Path:
    folder = tmp_path_factory.mktemp("three")
    data("pystdlib", negatives=3).run(Context(step="data", folder=folder, out=folder / "corpus", inputs={}))
    return folder / "corpus"


def test_more_negatives_are_different_wrong_bodies_and_the_first_stays_what_it_was(library: Path, three: Path) -> None:
    one, more = preferences(library), preferences(three)
    assert one["heldout"] == more["heldout"]
    assert len({row["prompt"] + row["chosen"] for row in more["heldout"]}) == len(more["heldout"])
    groups_of: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in more["train"]:
        groups_of.setdefault((row["prompt"], row["chosen"]), []).append(row)
    assert [rows_[0] for rows_ in groups_of.values()] == one["train"]
    assert sum(len(rows_) == 3 for rows_ in groups_of.values()) > 0.98 * len(one["train"])
    for (_, chosen), rows_ in groups_of.items():
        assert len({row["rejected"] for row in rows_} | {chosen}) == len(rows_) + 1
        assert all(abs(len(row["rejected"]) - len(chosen)) <= 0.1 * len(chosen) for row in rows_)
    later = [row for rows_ in groups_of.values() for row in rows_[1:]]
    assert 0.3 < sum(row["kind"] == "mutation" for row in later) / len(later) < 0.7
    differences = [len(row["rejected"]) - len(row["chosen"]) for row in later]
    assert abs(statistics.mean(differences)) < 0.01 * statistics.mean(len(row["chosen"]) for row in later)
    tally = corpus.account(three).views["preference"]
    assert tally.entered == 3 * len(one["train"]) + len(one["heldout"])
    assert (library / "chat" / "train.jsonl").read_bytes() == (three / "chat" / "train.jsonl").read_bytes()


def test_negatives_that_do_not_exist_are_counted(tmp_path: Path) -> None:
    """One function a file, whose body has few mutants, and as many others of its length as there are files."""
    planted(tmp_path / "lib", 12)
    account = write(tmp_path / "lib", tmp_path / "out", negatives=100)
    tally = account.views["preference"]
    assert tally.train < 100 * account.views["chat"].train
    assert tally.dropped == {"no_wrong_body_of_that_length": 100 * account.views["chat"].train - tally.train}
    assert preferences(tmp_path / "out")["heldout"] == (write(tmp_path / "lib", tmp_path / "one") and preferences(tmp_path / "one")["heldout"])


def test_one_negative_is_what_it_has_always_been(tmp_path: Path) -> None:
    """Figures of one version are compared with those of another: the pairs may not change by themselves."""
    planted(tmp_path / "lib", 20)
    write(tmp_path / "lib", tmp_path / "out")
    digest = hashlib.sha256(b"".join((tmp_path / "out" / "preference" / f"{split}.jsonl").read_bytes() for split in corpus.SPLITS))
    assert digest.hexdigest()[:16] == "6b7bc5f171b72e59"
