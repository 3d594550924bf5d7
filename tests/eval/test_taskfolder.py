from __future__ import annotations

from pathlib import Path

import pytest

from lmforge.codec import decode
from lmforge.errors import ConfigError
from lmforge.eval.nodes import Eval
from lmforge.eval.taskfolder import problems

TASK = "task: mine\ndataset_path: json\noutput_type: multiple_choice\nmetric_list:\n  - metric: acc\n"
BASE = {
    "type": "lm_eval",
    "after": "last",
    "tasks": ["mine"],
    "num_fewshot": None,
    "limit": None,
    "batch_size": 8,
    "include_path": None,
    "apply_chat_template": False,
}


def folder(tmp_path: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = tmp_path / "tasks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "tasks"


def test_plain_tasks_pass(tmp_path: Path) -> None:
    shared = "metric_list: [{metric: acc}]\n"
    made = folder(tmp_path, {"mine.yaml": TASK + "include: _shared\n", "_shared": shared, "sub/group.yaml": "group: g\ntask: [mine]\n", "data.jsonl": "{}\n"})
    assert list(problems(made, "eval.include_path")) == []


BAD = {
    "a function": ({"mine.yaml": TASK + "process_docs: !function utils.run\n"}, "has the tag !function"),
    "a function in full": ({"mine.yaml": TASK + "process_docs: !<!function> utils.run\n"}, "has the tag !function"),
    "a function in two halves": ({"mine.yaml": "%TAG !e! !func\n---\n" + TASK + "process_docs: !e!tion utils.run\n"}, "has the tag !function"),
    "a function in an included file": ({"mine.yaml": TASK + "include: notes\n", "notes": "doc_to_text: !function utils.run\n"}, "has the tag !function"),
    "an included file elsewhere": ({"mine.yaml": TASK + "include: ../outside.yaml\n"}, "is outside the folder"),
    "one by its absolute path": ({"mine.yaml": TASK + "include: [/etc/hostname]\n"}, "is outside the folder"),
    "a python object": ({"mine.yaml": TASK + "doc_to_text: !!python/object/apply:os.system [ls]\n"}, "python/object/apply"),
    "Python beside it": ({"mine.yaml": TASK, "deep/utils.py": "print(1)\n"}, "utils.py is Python code"),
    "a metric by code": ({"mine.yaml": "task: mine\nmetric_list:\n  - metric: ./evil\n    hf_evaluate: true\n"}, "hf_evaluate"),
    "broken YAML": ({"mine.yaml": "task: [\n"}, "cannot be read as YAML"),
    "no task": ({"readme.md": "x"}, "has no task YAML"),
}


@pytest.mark.parametrize("kind", BAD)
def test_anything_that_could_run_is_refused(tmp_path: Path, kind: str) -> None:
    files, says = BAD[kind]
    made = folder(tmp_path, files)
    (tmp_path / "outside.yaml").write_text(TASK)
    with pytest.raises(ConfigError, match=r"eval\.include_path") as caught:
        decode(Eval, BASE | {"include_path": str(made)}, "eval")
    assert says in str(caught.value)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    made = folder(tmp_path, {"mine.yaml": TASK})
    (tmp_path / "outside.yaml").write_text(TASK)
    (made / "linked.yaml").symlink_to(tmp_path / "outside.yaml")
    assert ["outside the folder" in one.what for one in problems(made, "here")] == [True]


def test_a_nest_of_aliases_takes_no_time(tmp_path: Path) -> None:
    nest = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
    assert list(problems(folder(tmp_path, {"mine.yaml": nest}), "here")) == []


SENSELESS = [{"tasks": []}, {"tasks": ["./evil.yaml"]}, {"limit": 2.5}, {"limit": 0}, {"batch_size": 0}, {"batch_size": "big"}, {"num_fewshot": -1}]


@pytest.mark.parametrize("change", [*SENSELESS, {"include_path": "/nowhere/at/all"}])
def test_keys_that_make_no_sense_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"eval.{next(iter(change))}"):
        decode(Eval, BASE | change, "eval")
    decode(Eval, BASE | {"limit": 0.1, "batch_size": "auto"}, "eval")
