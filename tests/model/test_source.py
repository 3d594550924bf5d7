"""config.json by local folder or hub id: the hub's cache rules, and one line for whatever is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmforge.errors import ConfigError
from lmforge.formats.store import checkpoint_of, hub_id
from lmforge.model.source import hub_cache, local_folder, read_config

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LLAMA = {"model_type": "llama", "hidden_size": 64}


def cached(cache: Path, commit: str = COMMIT, config: Any = LLAMA, name: str = "org--small") -> Path:
    """A repository as huggingface_hub leaves it in its cache."""
    repository = cache / f"models--{name}"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text(json.dumps(config))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return repository


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test may depend on what this machine has, nor reach out: the hub is an address nobody listens on."""
    for name in ("HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))


def refusal(source: str, revision: str | None = None) -> str:
    with pytest.raises(ConfigError) as refused:
        read_config(source, revision, "model.pretrained")
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_local_folder_needs_only_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "auto_map": {"AutoConfig": "code.Config"}}))
    assert read_config(str(tmp_path), None, "model.pretrained") == LLAMA


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_hub_id_is_read_from_the_cache_without_a_network(tmp_path: Path, revision: str | None) -> None:
    cached(tmp_path / "home" / "hub")
    assert read_config("org/small", revision, "model.pretrained") == LLAMA


def test_a_pinned_hub_id_is_read_at_its_commit(tmp_path: Path) -> None:
    repository = cached(tmp_path / "home" / "hub")
    other = "f" * 40
    (repository / "snapshots" / other).mkdir()
    (repository / "snapshots" / other / "config.json").write_text(json.dumps({**LLAMA, "hidden_size": 128}))
    assert read_config(f"org/small@{COMMIT}", None, "model.pretrained")["hidden_size"] == 64
    assert read_config(f"org/small@{other}", None, "model.pretrained")["hidden_size"] == 128
    assert f"org/small at {'0' * 40} is no local folder" in refusal(f"org/small@{'0' * 40}")


@pytest.mark.parametrize(
    ("source", "means"),
    [
        ("org/name", ("org/name", None)),
        (f"org/name@{COMMIT}", ("org/name", COMMIT)),
        ("gpt2", ("gpt2", None)),
        (f"gpt2@{COMMIT}", ("gpt2", COMMIT)),
        ("org/name@main", None),
        (f"org/name@{COMMIT[:7]}", None),
        (f"org/name@{COMMIT.upper()}", None),
        ("a/b/c", None),
        ("../name", None),
        ("", None),
    ],
)
def test_what_a_hub_id_is(source: str, means: tuple[str, str | None] | None) -> None:
    assert hub_id(source) == means


def test_init_from_asks_the_hub_only_for_what_cannot_be_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for asked in ("org/unseen", f"org/unseen@{COMMIT}", f"unseen@{COMMIT}"):
        assert checkpoint_of(asked, "outputs") == asked
    for word in ("tiny", "beef", "org/unseen@main"):
        with pytest.raises(ConfigError, match=r"no such run, step or digest; .*a hub id reads org/name, or org/name@<commit>"):
            checkpoint_of(word, "outputs")
    for word in ("tiny", "beef"):
        cached(tmp_path / "home" / "hub", name=word)
        assert checkpoint_of(word, "outputs") == word  # a bare word is a hub id once the cache has it
    step = tmp_path / "outputs" / "steps" / "sft-beef0123"
    (step / "checkpoint").mkdir(parents=True)
    for file in (step / "step.json", step / "checkpoint" / "config.json"):
        file.write_text("{}")
    assert checkpoint_of("beef", "outputs") == str(Path("outputs/steps/sft-beef0123/checkpoint"))  # but a digest comes first
    (tmp_path / "org").mkdir()
    with pytest.raises(ConfigError, match="no such run"):
        checkpoint_of("org/unseen", "outputs")  # a path mistyped, since its folder is there


def test_the_cache_is_where_huggingface_hub_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert hub_cache() == tmp_path / "home" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "mine"))
    assert hub_cache() == tmp_path / "mine"
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert hub_cache() == tmp_path / "xdg" / "huggingface" / "hub"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert hub_cache() == Path.home() / ".cache" / "huggingface" / "hub"


def test_offline_and_not_cached_says_what_was_tried(tmp_path: Path) -> None:
    said = refusal("org/unseen")
    assert "org/unseen is no local folder, is not in" in said
    assert str(tmp_path / "home" / "hub") in said
    assert "give a local folder" in said


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot be read"),
        ("[]", "names no model_type"),
        ('{"hidden_size": 8}', "names no model_type"),
        ('{"model_type": "llama", "rope_theta": NaN}', "NaN is not a number"),
        ('{"model_type": "phantom", "auto_map": {"AutoConfig": "code.Config"}}', "needs code of its own (auto_map)"),
    ],
)
def test_a_bad_config_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "config.json").write_text(text)
    said = refusal(str(tmp_path))
    assert says in said
    assert str(tmp_path) in said


def test_no_config_and_no_such_thing(tmp_path: Path) -> None:
    assert "has no config.json" in refusal(str(tmp_path))
    assert "has no config.json" in refusal("./nowhere")
    assert "neither a folder that exists nor a hub id" in refusal("a/b/c")
    assert "neither a folder that exists nor a hub id" in refusal("org/../../etc")


def test_a_folder_that_exists_wins_over_a_hub_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_folder("org/small") is None
    (tmp_path / "org" / "small").mkdir(parents=True)
    assert local_folder("org/small") == Path("org/small")
