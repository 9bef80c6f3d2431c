"""Model folders that an attacker has made: nothing in them runs, and a folder that is not sound is a ModelError."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from core.models import Shelf
from lexplain.classifier import Classifier
from lexplain.errors import ModelError
from lexplain.model_store import check_folder, digest_folder, fetch_model
from lexplain.tracking import locate_model


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file that nobody must make; a pickle that is opened does."""
    mark = tmp_path / "was-run"
    pickle.loads(pickle.dumps(Payload(mark)))
    mark.unlink()  # it would have worked
    return mark


@pytest.fixture
def folder(shelf: Shelf, tmp_path: Path) -> Path:
    return shutil.copytree(shelf.folder("bert"), tmp_path / "model")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


PICKLES = (
    "pytorch_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "model.pkl",
    "adapter_model.bin",
    "tf_model.h5",
    "vocab.pkl",
)


def test_pickles_beside_safetensors_are_never_opened(folder: Path, mark: Path, tmp_path: Path) -> None:
    sound = digest_folder(folder)
    for name in PICKLES:
        torch.save(Payload(mark), folder / name)
    assert digest_folder(folder) == sound
    Classifier.load(folder, allow_pickle=True)
    copy = fetch_model(folder.as_uri(), sound, tmp_path / "cache")
    assert not {path.name for path in copy.iterdir()} & set(PICKLES)
    assert not mark.exists()


@pytest.mark.parametrize("save", [torch.save, lambda payload, path: path.write_bytes(pickle.dumps(payload))])
def test_a_pickle_that_is_no_weights_runs_nothing_even_where_it_is_allowed(
    folder: Path, mark: Path, save: Callable[..., object]
) -> None:
    (folder / "model.safetensors").unlink()
    save(Payload(mark), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="Pickled weights can run code"):
        Classifier.load(folder)
    with pytest.raises(ModelError, match="cannot be loaded"):
        Classifier.load(folder, allow_pickle=True)
    assert not mark.exists()


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "../outside.safetensors", "/etc/passwd", "sub/model.safetensors"]
)
def test_an_index_names_safetensors_of_its_folder_only(folder: Path, mark: Path, name: str) -> None:
    """transformers reads what the index names, wherever it lies, and unpickles what has another name."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    torch.save(Payload(mark), folder / "pytorch_model.bin")
    shutil.copy(folder / "other.safetensors", folder.parent / "outside.safetensors")
    (folder / "sub").mkdir()
    shutil.copy(folder / "other.safetensors", folder / "sub" / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ModelError, match=r"model\.safetensors\.index\.json.*must name safetensors files of its own folder"
    ):
        Classifier.load(folder, allow_pickle=True)
    assert not mark.exists()


def test_weights_in_parts_are_loaded(folder: Path, shelf: Shelf) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {f"model-0000{part + 1}-of-00002.safetensors": dict(list(weights.items())[part::2]) for part in range(2)}
    for name, some in parts.items():
        save_file(some, folder / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, some in parts.items() for key in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found, expected = Classifier.load(folder), shelf.classifier("bert")
    for key, value in expected.model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[key], value)


def test_an_adapter_is_refused(folder: Path) -> None:
    """Where peft is installed transformers would load it, or the base that it names; elsewhere it would be passed over."""
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "evil/base"})
    )
    with pytest.raises(ModelError, match=r"adapter_config\.json.*merge_and_unload"):
        Classifier.load(folder)


def write_code(folder: Path, mark: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": {"AutoModelForSequenceClassification": "evil.Evil", "AutoConfig": "evil.Evil"}},
        {"auto_map": {"AutoConfig": "other/repository--evil.Evil"}},
        {"auto_map": "evil.Evil"},
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "evil/kernel", "_attn_implementation_internal": "evil/kernel"},
        {"experts_implementation": "evil/kernel"},
        {"quantization_config": {"quant_method": "evil", "modules_to_not_convert": "evil.Evil"}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"_name_or_path": "https://host/evil", "base_model_name_or_path": "evil/base", "transformers_version": "999"},
        {"torch_dtype": "__import__('os')", "dtype": "evil.Evil"},
        {"hidden_act": "__import__('os').system"},
        {"custom_pipelines": {"text-classification": {"impl": "evil.Evil", "pt": ["evil.Evil"]}}},
    ],
    ids=str,
)
def test_a_poisoned_config_runs_nothing(folder: Path, mark: Path, changes: dict[str, Any]) -> None:
    write_code(folder, mark)
    edit(folder / "config.json", **changes)
    load_or_refuse(folder)
    assert not mark.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}},
        {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}},
        {"tokenizer_class": "../evil.Evil"},
        {"chat_template": "{{ cycler.__init__.__globals__.os.mkdir('x') }}"},
        {"tokenizer_file": "/etc/passwd", "vocab_file": "/etc/passwd"},
        {"processor_class": "evil.Evil", "extra_special_tokens": {"evil": "x"}},
    ],
    ids=str,
)
def test_a_poisoned_tokenizer_runs_nothing(folder: Path, mark: Path, changes: dict[str, Any]) -> None:
    write_code(folder, mark)
    edit(folder / "tokenizer_config.json", **changes)
    load_or_refuse(folder)
    assert not mark.exists()


def load_or_refuse(folder: Path) -> Classifier | None:
    try:
        return Classifier.load(folder)
    except ModelError:
        return None


def test_pickles_of_an_mlflow_model_are_left_where_they_are(folder: Path, mark: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    shutil.copytree(folder, artifact / "model")
    (artifact / "MLmodel").write_text(
        "flavors: {python_function: {loader_module: evil, python_model: python_model.pkl}}"
    )
    for place in (artifact, artifact / "model", artifact / "code"):
        place.mkdir(exist_ok=True)
        (place / "python_model.pkl").write_bytes(pickle.dumps(Payload(mark)))
        write_code(place, mark)
    location = locate_model(str(artifact), None)
    assert location.digest == digest_folder(folder)
    copy = fetch_model(location.folder, location.digest, tmp_path / "cache")
    Classifier.load(copy)
    assert not [path.name for path in copy.iterdir() if path.suffix in (".pkl", ".py")]
    assert not mark.exists()


def test_an_mlflow_model_that_is_a_pickle_is_refused(mark: Path, tmp_path: Path) -> None:
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "MLmodel").write_text("flavors: {sklearn: {pickled_model: model.pkl}}")
    (tmp_path / "artifact" / "model.pkl").write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(ModelError, match=r"must hold a config\.json"):
        locate_model(str(tmp_path / "artifact"), None)
    assert not mark.exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 64) | st.floats() | st.text(max_size=8) | st.sampled_from(["bert", "textcnn", "gelu", "auto"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.sampled_from(["0", "1", "2"]), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


@settings(max_examples=max(1, settings().max_examples // 2))
@given(st.data())
def test_any_config_is_a_model_or_a_model_error(
    shelf: Shelf, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """By the file names and JSON, which is checked with the plan, and by loading it."""
    sound = shelf.folder("bert")
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    if not folder.exists():
        shutil.copytree(sound, folder)
    name = data.draw(st.sampled_from(["config.json", "config.json", "tokenizer_config.json"]))
    document = json.loads((sound / name).read_text(encoding="utf-8"))
    for key in data.draw(st.lists(st.sampled_from(sorted(document)), min_size=1, max_size=2, unique=True)):
        document[key] = data.draw(JSON)
    for each in ("config.json", "tokenizer_config.json"):
        shutil.copy(sound / each, folder / each)
    (folder / name).write_text(json.dumps(document), encoding="utf-8")
    for explained in (True, False):
        for problem in check_folder(
            "models.uris[0]", str(folder), max_tokens=64, explained=explained, allow_pickle=False
        ):
            assert str(problem)
    load_or_refuse(folder)
