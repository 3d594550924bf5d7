"""Named weights as an artifact: content is identity, and a folder arrives whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from lmforge.codec import encode
from lmforge.errors import CheckpointError
from lmforge.model.fetch import FetchWeights, folder_digest
from lmforge.model.fetch_tokenizer import FetchTokenizer
from lmforge.step import Context

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "modeling.py").write_text("raise SystemExit")
    return folder


def run(node: FetchWeights, out: Path) -> Path:
    node.run(Context(step="weights", folder=out.parent, out=out, inputs={}))
    return out


def refusal(node: FetchWeights, out: Path) -> str:
    with pytest.raises(CheckpointError) as refused:
        run(node, out)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_local_folder_arrives_without_pickles_and_code(source: Path, tmp_path: Path) -> None:
    out = run(FetchWeights.of(str(source), None, None), tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert (out / "model.safetensors").read_bytes() == b"weights"
    assert run(FetchWeights.of(str(source), None, None), out) == out  # what an interrupted run left is no obstacle


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_are_copied_where_links_fail(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    out = run(FetchWeights.of(str(source), None, None), tmp_path / "out")
    assert not os.path.samefile(out / "model.safetensors", source / "model.safetensors")
    assert contents(out)["model.safetensors"] == b"weights"
    assert contents(run(FetchWeights.of(str(source), None, None), out)) == contents(out)


def test_a_done_step_outlives_its_source(source: Path, tmp_path: Path) -> None:
    """Weights take no second place on the disk, and yet the source may be moved, deleted, or saved over as transformers and safetensors do it."""
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(4, np.float32)}, source / "model.safetensors")
    out = run(FetchWeights.of(str(source), None, None), tmp_path / "out")
    before = contents(out)
    assert os.path.samefile(out / "model.safetensors", source / "model.safetensors")
    save_file({"a": np.ones(4, np.float32)}, source / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        (source / name).write_text("others")  # in place
    assert contents(out) == before
    source.rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved")
    assert contents(out) == before


def hub(cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model folder as huggingface_hub leaves `org/small` in its cache: a blob each, and links to them. Nobody answers beyond it."""
    import huggingface_hub.constants as constants

    repository = cache / "models--org--small"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / COMMIT
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(source.iterdir())):
        (blobs / str(number)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


@pytest.mark.parametrize("name", ["org/small", f"org/small@{COMMIT}"])
def test_weights_of_the_hub_outlive_its_cache_and_name_their_commit(name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(tmp_path / "hub", source, monkeypatch)
    out = tmp_path / "out"
    metrics = FetchWeights.of(name, None, None).run(Context(step="weights", folder=tmp_path, out=out, inputs={}))
    assert metrics == {"files": 4, "weight_bytes": 7, "commit": COMMIT}
    assert not any(path.is_symlink() for path in out.iterdir())
    shutil.rmtree(tmp_path / "hub")
    assert contents(out)["model.safetensors"] == b"weights"


def test_a_local_folder_has_no_commit_to_record(source: Path, tmp_path: Path) -> None:
    context = Context(step="weights", folder=tmp_path, out=tmp_path / "out", inputs={})
    assert FetchWeights.of(str(source), None, None).run(context) == {"files": 4, "weight_bytes": 7}


def test_a_tokenizer_of_the_hub_names_its_commit(tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(tmp_path / "hub", tokenizer_folder, monkeypatch)
    for name in ("org/small", f"org/small@{COMMIT}"):
        metrics = FetchTokenizer(source=name, revision=None).run(Context(step="tokenizer", folder=tmp_path, out=tmp_path / "out", inputs={}))
        assert metrics == {"entries": 270, "commit": COMMIT}


def test_content_not_place_is_identity(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "elsewhere")
    here, there = (encode(FetchWeights.of(str(folder), None, None), identity=True) for folder in (source, tmp_path / "elsewhere"))
    assert here == there
    (source / "model.safetensors").write_bytes(b"Weights")
    assert encode(FetchWeights.of(str(source), None, None), identity=True) != here


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_every_file_counts(source: Path, name: str) -> None:
    before = folder_digest(source, None)
    (source / name).write_bytes((source / name).read_bytes() + b" ")
    assert folder_digest(source, None) != before


def test_files_that_are_not_taken_do_not_count(source: Path) -> None:
    before = folder_digest(source, None)
    (source / "README.md").write_text("hello")
    assert folder_digest(source, None) == before


def test_the_cache_spares_hashing_and_never_lies(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "weights.json"
    first = folder_digest(source, cache)
    remembered = json.loads(cache.read_text())
    assert len(remembered) == 4
    cache.write_text(json.dumps(dict.fromkeys(remembered, "0" * 64)))
    assert folder_digest(source, cache) != first  # so the cache was believed
    os.utime(source / "model.safetensors", ns=(1, 1))
    assert len(json.loads(cache.read_text())) == 4
    folder_digest(source, cache)
    assert len(json.loads(cache.read_text())) == 5  # and a touched file hashed again
    cache.write_text("{broken")
    assert folder_digest(source, cache) == first


def test_a_folder_changed_after_planning_is_refused(source: Path, tmp_path: Path) -> None:
    node = FetchWeights.of(str(source), None, None)
    (source / "model.safetensors").write_bytes(b"others")
    assert "changed after the plan was made" in refusal(node, tmp_path / "out")


def test_a_hub_id_is_its_name_and_commit() -> None:
    node = FetchWeights.of("org/small", "abc", None)
    assert encode(node, identity=True)["fingerprint"] == "org/small@abc"
    pinned = FetchWeights.of(f"org/small@{COMMIT}", None, None)
    assert pinned == FetchWeights.of("org/small", COMMIT, None)
    assert pinned.fingerprint == f"org/small@{COMMIT}"
    contents = {FetchTokenizer(source=f"org/small@{COMMIT}", revision=None).content(None), FetchTokenizer(source="org/small", revision=COMMIT).content(None)}
    assert contents == {f"org/small@{COMMIT}"}
    assert FetchWeights.of("gpt2", None, None).fingerprint == "gpt2@main"


def test_incomplete_folders_are_named(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (source / "model.safetensors").unlink()
    assert "has no model.safetensors" in refusal(FetchWeights.of(str(source), None, None), out)
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    assert "names 'model-00001-of-00002.safetensors', which is not in the folder" in refusal(FetchWeights.of(str(source), None, None), out)
    index.write_text(json.dumps({"weight_map": {"a": "../source/tokenizer.json"}}))
    assert "not in the folder" in refusal(FetchWeights.of(str(source), None, None), out)
    index.write_text("[]")
    assert "is not an index" in refusal(FetchWeights.of(str(source), None, None), out)
    (source / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        FetchWeights.of(str(source), None, None)
    with pytest.raises(CheckpointError, match="no such folder"):
        FetchWeights.of("./nowhere", None, None)


def test_offline_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    said = refusal(FetchWeights.of("org/unseen", "abc", None), tmp_path / "out")
    assert "not in the local cache and the hub did not answer" in said


def test_hub_weights_of_another_model_than_planned_are_refused_when_they_arrive(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(tmp_path / "hub", source, monkeypatch)
    theirs = {"model_type": "llama", "num_hidden_layers": 32}  # what the family has where a config is silent
    for expected, refused in ((theirs, False), (theirs | {"num_hidden_layers": 2}, True)):
        node = FetchWeights.of("org/small", None, None, expected)
        context = Context(step="weights", folder=tmp_path, out=tmp_path / "checkpoint", inputs={})
        if refused:
            with pytest.raises(CheckpointError, match="num_hidden_layers"):
                node.run(context)
        else:
            assert node.run(context)["files"] > 1
