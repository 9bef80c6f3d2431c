"""Model folders: one digest wherever they lie, and copies that are never half."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path

import pytest

from core.models import save_classifier
from lexplain import model_store
from lexplain.classifier import Classifier
from lexplain.errors import CorpusError, ModelError, redact
from lexplain.model_store import digest_folder, fetch_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("store") / "bert", "bert")


@pytest.fixture(autouse=True)
def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing verified yet, as in a worker that has just started."""
    monkeypatch.setattr(model_store, "_VERIFIED", set())


def copied(model: Path, target: Path) -> Path:
    return shutil.copytree(model, target)


def as_mlflow(model: Path, target: Path) -> Path:
    """The layout that MLflow gives a pipeline: weights and tokenizer apart."""
    weights, tokenizer = target / "model", target / "components" / "tokenizer"
    for folder in (weights, tokenizer):
        folder.mkdir(parents=True)
    for file in model.iterdir():
        shutil.copy(file, tokenizer if file.name.startswith(("tokenizer", "special")) else weights)
    (target / "MLmodel").write_text("flavors: {}")
    return target


def test_the_digest_is_of_what_changes_numbers(model: Path, tmp_path: Path) -> None:
    digest = digest_folder(model)
    folder = copied(model, tmp_path / "elsewhere")
    for noise in ("README.md", "fine_tuning.json", "optimizer.pt", "training_args.bin", "pytorch_model.bin"):
        (folder / noise).write_text("noise")
    (folder / ".git").mkdir()
    (folder / ".git" / "config.json").write_text("{}")
    assert digest_folder(folder) == digest
    assert digest_folder(folder.as_uri()) == digest


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_each_file_of_the_model_counts(model: Path, tmp_path: Path, name: str) -> None:
    folder = copied(model, tmp_path / "changed")
    with (folder / name).open("ab") as file:
        file.write(b" ")
    assert digest_folder(folder) != digest_folder(model)


def test_pickled_weights_count_where_there_are_no_others(model: Path, tmp_path: Path) -> None:
    folder = copied(model, tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    digest = digest_folder(folder)
    (folder / "pytorch_model.bin").write_bytes(b"other weights")
    assert digest_folder(folder) != digest


def test_a_local_folder_is_used_in_place(model: Path, tmp_path: Path) -> None:
    assert fetch_model(model, digest_folder(model), tmp_path) == model
    assert not any(tmp_path.iterdir())


def test_a_changed_folder_is_refused(model: Path, tmp_path: Path) -> None:
    folder = copied(model, tmp_path / "model")
    digest = digest_folder(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"must have the digest .*stored under one name"):
        fetch_model(folder, digest)
    with pytest.raises(ModelError, match="must have the digest"):
        fetch_model(folder.as_uri(), digest, tmp_path / "cache")
    left = [path.name for path in (tmp_path / "cache" / "lexplain-models").iterdir()]
    assert [name for name in left if not name.endswith(".lock")] == []


@pytest.mark.parametrize("layout", [copied, as_mlflow])
def test_a_storage_uri_is_copied_once(model: Path, tmp_path: Path, layout: object) -> None:
    source = layout(model, tmp_path / "source")  # type: ignore[operator]
    digest = digest_folder(source.as_uri())
    assert digest == digest_folder(model)
    fetched = fetch_model(source.as_uri(), digest, tmp_path / "cache")
    assert fetched == tmp_path / "cache" / "lexplain-models" / digest
    assert {file.name: file.read_bytes() for file in fetched.iterdir()} == {
        file.name: file.read_bytes() for file in model.iterdir()
    }
    assert Classifier.load(fetched).labels == Classifier.load(model).labels
    shutil.rmtree(source)
    assert fetch_model(source.as_uri(), digest, tmp_path / "cache") == fetched


def test_an_mlflow_folder_on_a_local_path_is_flattened(model: Path, tmp_path: Path) -> None:
    source = as_mlflow(model, tmp_path / "source")
    fetched = fetch_model(source, digest_folder(source), tmp_path / "cache")
    assert digest_folder(fetched) == digest_folder(model)
    assert (fetched / "tokenizer.json").is_file()


def test_a_damaged_copy_is_made_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cleaner of temporary files takes old files out of the cache, and leaves the rest."""
    digest = digest_folder(model)
    fetched = fetch_model(model.as_uri(), digest, tmp_path)
    (fetched / "model.safetensors").unlink()
    monkeypatch.setattr(model_store, "_VERIFIED", set())
    assert fetch_model(model.as_uri(), digest, tmp_path) == fetched
    assert digest_folder(fetched) == digest


def test_a_killed_copy_is_not_taken_for_a_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = digest_folder(model)

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", kill)
        with pytest.raises(KeyboardInterrupt):
            fetch_model(model.as_uri(), digest, tmp_path)
    assert not (tmp_path / "lexplain-models" / digest).exists()
    assert digest_folder(fetch_model(model.as_uri(), digest, tmp_path)) == digest


def test_workers_of_one_node_share_one_copy(model: Path, tmp_path: Path) -> None:
    digest = digest_folder(model)
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        folders = pool.starmap(fetch_model, [(model.as_uri(), digest, tmp_path)] * 6)
    assert set(folders) == {tmp_path / "lexplain-models" / digest}
    left = {path.name for path in (tmp_path / "lexplain-models").iterdir()}
    assert left - {f"{digest}.lock"} == {digest}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{tmp}/nowhere", "cannot be read"),
        ("{tmp}", "must hold a config.json"),
        ("file://{tmp}/nowhere", "cannot be read"),
        ("ftp://somebody:hunter2@host/model", r"'ftp://\*\*\*@host/model' cannot be read"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        digest_folder(source.format(tmp=tmp_path))
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("https://me:pw@host:5000/x", "https://***@host:5000/x"),
        ("tracking_uri: 'https://token@host'", "tracking_uri: 'https://***@host'"),
        ("s3://bucket/a@b/c", "s3://bucket/a@b/c"),
        ("postgresql://h/db?user=me&password=pw&x=1", "postgresql://h/db?user=me&password=***&x=1"),
        ("https://h/p?sv=1&sig=abc", "https://h/p?sv=1&sig=***"),
        ("models:/name@alias", "models:/name@alias"),
        ("abfss://container@account/x", "abfss://container@account/x"),
        (
            "'https://b/x?X-Amz-Credential=me&X-Amz-Signature=abc': no",
            "'https://b/x?X-Amz-Credential=***&X-Amz-Signature=***': no",
        ),
    ],
)
def test_redact(text: str, redacted: str) -> None:
    assert redact(text) == redacted
    assert str(CorpusError(text)) == redacted
