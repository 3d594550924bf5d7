"""A folder of lm-evaluation-harness tasks that is data and nothing else.

The harness imports the function that a `!function` names, so a folder that holds one, or Python, is refused before the harness sees it.
YAML has several spellings of one tag (`!<...>`, `%TAG`): the parsed tags are compared, not the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from lmforge.errors import Problem

PLAIN_TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "timestamp", "merge"))
INSTEAD = "task folders hold plain YAML; install tasks that need code as a package"


def problems(folder: Path, where: str) -> Iterator[Problem]:
    """Why the folder may not be given to the harness; nothing where it may."""
    if not folder.is_dir():
        yield Problem(where, f"{folder} is not a folder", "give a folder of task YAMLs")
        return
    root = folder.resolve()
    # The harness reads *.yaml; *.yml is looked at too, since a rename would be enough to have it read.
    files = sorted(path for pattern in ("**/*.yaml", "**/*.yml") for path in folder.glob(pattern))
    if not files:
        yield Problem(where, f"{folder} has no task YAML", "give a folder with *.yaml files")
    for path in sorted(folder.glob("**/*.py")):
        yield Problem(where, f"{path} is Python code", INSTEAD)
    seen: set[Path] = set()
    for path in files:
        yield from _file(path, root, where, seen)


def _file(path: Path, root: Path, where: str, seen: set[Path]) -> Iterator[Problem]:
    if path.resolve() in seen:
        return
    seen.add(path.resolve())
    if not path.resolve().is_relative_to(root):
        yield Problem(where, f"{path} is outside the folder", "keep every task file inside it")
        return
    try:
        tree = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        yield Problem(where, f"{path} cannot be read as YAML ({str(error).splitlines()[0]})", "mend it or take it out of the folder")
        return
    for one in _walk(tree):
        if one.tag not in PLAIN_TAGS:
            yield Problem(where, f"{path}:{one.start_mark.line + 1} has the tag {one.tag}", INSTEAD)
    entries = {key.value: value for key, value in tree.value if isinstance(key.value, str)} if isinstance(tree, yaml.MappingNode) else {}
    yield from _metrics(entries.get("metric_list"), path, where)
    for included in _texts(entries.get("include")):
        yield from _file(path.parent / included, root, where, seen)  # an absolute path stays absolute, and is then outside


def _metrics(tree: yaml.Node | None, path: Path, where: str) -> Iterator[Problem]:
    """`hf_evaluate: true` loads a metric's Python from the hub or from a path."""
    for one in _walk(tree):
        if isinstance(one, yaml.MappingNode) and any(key.value == "hf_evaluate" for key, _ in one.value):
            yield Problem(where, f"{path}:{one.start_mark.line + 1} asks for an hf_evaluate metric, which is code", "use one of the harness's own, such as acc")


def _texts(tree: yaml.Node | None) -> list[str]:
    nodes = tree.value if isinstance(tree, yaml.SequenceNode) else [tree] if tree is not None else []
    return [node.value for node in nodes if isinstance(node, yaml.ScalarNode)]


def _walk(tree: yaml.Node | None) -> Iterator[yaml.Node]:
    """Every node once: an alias is visited where it is defined, so a nest of aliases costs nothing."""
    stack, seen = [tree] if tree is not None else [], set()
    while stack:
        one = stack.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        if isinstance(one, yaml.MappingNode):
            stack.extend(part for pair in one.value for part in pair)
        elif isinstance(one, yaml.SequenceNode):
            stack.extend(one.value)
