"""Plans and the files that they name: all of them are looked at before Spark starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from core.test_plan import FINE_TUNED, READY, make_model, problems_of
from lexplain.errors import PlanError
from lexplain.methods import find_method
from lexplain.plan import Plan, Source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A plan's folder with a corpus and two models."""
    (tmp_path / "sub").mkdir()
    for name in ("model", "model[2]"):
        make_model(tmp_path / name)
    (tmp_path / "sub" / "corpus.csv").write_text("text\n")
    (tmp_path / "plan.yaml").write_text(
        "name: a\ncorpus: {path: sub/corpus.csv}\nmodels: {uris: [./model, 'model[2]'], corpus: unseen}\nsink: {path: ../tables}\n"
    )
    return tmp_path


def test_paths_count_from_the_plan(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir("/")
    plan = Plan.load(folder / "plan.yaml", find_method)
    assert plan.corpus.path == str(folder / "sub/corpus.csv")
    assert plan.models.uris == (str(folder / "model"), str(folder / "model[2]"))
    assert plan.sink.path == str(folder.parent / "tables")
    monkeypatch.chdir(folder)
    assert Plan.load("plan.yaml", find_method) == plan


def test_missing_files_are_named_before_spark(folder: Path):
    path = folder / "plan.yaml"
    text = path.read_text().replace("corpus.csv", "corpora.csv").replace("./model,", "~/no/such/model,")
    path.write_text(text)
    with pytest.raises(PlanError) as raised:
        Plan.load(path, find_method)
    first, second = raised.value.problems
    assert (first.field, first.value) == ("corpus.path", str(folder / "sub/corpora.csv"))
    assert (second.field, second.value) == ("models.uris[0]", str(Path.home() / "no/such/model"))


MODELS: list[tuple[tuple[str, ...], dict[str, Any], list[tuple[str, str]]]] = [
    ((), {}, []),
    (("vocab.txt", "model-00001-of-00002.safetensors"), {"architectures": None}, []),
    ((), {"id2label": None}, []),
    (("model.safetensors",), {}, [("models.uris[0]", "no tokenizer")]),
    (("tokenizer.json",), {}, [("models.uris[0]", "no weights")]),
    (("tokenizer.json", "pytorch_model.bin"), {}, [("models.uris[0]", "pickled weights only")]),
    ((), {"architectures": ["BertForMaskedLM"]}, [("models.uris[0]", "no sequence classifier but BertForMaskedLM")]),
    ((), {"model_type": None}, [("models.uris[0]", "cannot be read")]),
    ((), {"id2label": {"0": "stars"}, "problem_type": "regression"}, []),
    ((), {"problem_type": "regression"}, [("models.uris[0]", "a regression of 2 outputs")]),
    ((), {"id2label": {"0": "a", "1": "a"}}, [("models.uris[0]", "each class once")]),
    ((), {"id2label": {"0": "a", "2": "b"}}, [("models.uris[0]", "each class once")]),
    ((), {"id2label": ["a", "b"]}, [("models.uris[0]", "each class once")]),
    ((), {"id2label": {"0": ["a"], "1": "b"}}, []),
    ((), {"max_position_embeddings": 128}, [("text.max_tokens", "at most 128")]),
    ((), {"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, []),
    ((), {"model_type": "roberta", "max_position_embeddings": 512}, [("text.max_tokens", "at most 510")]),
    (("model.safetensors",), {"architectures": ["BertModel"], "max_position_embeddings": 64},
     [("models.uris[0]", "no tokenizer"), ("models.uris[0]", "no sequence classifier"), ("text.max_tokens", "at most 64")]),
]  # fmt: skip


@pytest.mark.parametrize(("files", "config", "expected"), MODELS)
def test_models_are_judged_with_the_plan(
    tmp_path: Path, files: tuple[str, ...], config: dict[str, Any], expected: list[tuple[str, str]]
):
    make_model(tmp_path / "model", *files, **config)
    text = READY.replace('"models:/a/1", "models:/b/1"', "./model")
    assert "./model" in text
    try:
        Plan.parse(text, find_method, folder=tmp_path)
        found = []
    except PlanError as error:
        found = list(error.problems)
    assert len(found) == len(expected)
    for problem, (field, rule) in zip(found, expected, strict=True):
        assert problem.field == field
        assert rule in problem.rule


def test_a_base_model_needs_no_classifier_but_safetensors(tmp_path: Path):
    make_model(tmp_path / "encoder", architectures=["BertModel"], id2label=None)
    make_model(
        tmp_path / "mlflow", "model/config.json", "model/model.safetensors", "components/tokenizer/tokenizer.json"
    )
    (tmp_path / "mlflow" / "model" / "config.json").write_text((tmp_path / "mlflow" / "config.json").read_text())
    (tmp_path / "mlflow" / "config.json").unlink()
    make_model(tmp_path / "pickle", "tokenizer.json", "pytorch_model.bin")
    for name in ("encoder", "mlflow"):
        assert Plan.parse(FINE_TUNED.replace("models:/base/1", f"./{name}"), find_method, folder=tmp_path)
    for allow in ("", "execution: {allow_pickle: true}\n"):
        with pytest.raises(PlanError, match=r"1 problem.*\n.*models.base=.* has pickled weights only"):
            Plan.parse(FINE_TUNED.replace("models:/base/1", "./pickle") + allow, find_method, folder=tmp_path)


def test_a_file_is_no_model(tmp_path: Path):
    (tmp_path / "base").write_text("x")
    with pytest.raises(PlanError, match=r"has no config\.json"):
        Plan.parse(FINE_TUNED.replace("models:/base/1", "./base"), find_method, folder=tmp_path)


def test_secrets_of_a_source_stay_in_the_plan():
    source = Source(path="s3://me:hidden@bucket/x.csv?X-Amz-Signature=hidden")
    assert source.origin == "s3://***@bucket/x.csv?X-Amz-Signature=***"


@pytest.mark.parametrize("path", ["~nobody-of-that-name/a.csv", "x" * 5000 + ".csv", "loop/a.csv", "[.csv"])
def test_paths_that_the_system_refuses_are_problems(folder: Path, path: str):
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "plan.yaml").write_text((folder / "plan.yaml").read_text().replace("sub/corpus.csv", f"'{path}'"))
    with pytest.raises(PlanError) as raised:
        Plan.load(folder / "plan.yaml", find_method)
    assert [problem.field for problem in raised.value.problems] == ["corpus.path"]


def test_patterns_and_remote_places_are_left_alone(folder: Path):
    text = (folder / "plan.yaml").read_text()
    (folder / "plan.yaml").write_text(text.replace("corpus.csv", "*.csv").replace("./model,", "'models:/a@champion',"))
    plan = Plan.load(folder / "plan.yaml", find_method)
    assert plan.corpus.path == str(folder / "sub/*.csv")
    assert plan.models.uris[0] == "models:/a@champion"


def test_sink_must_not_be_a_file(folder: Path):
    text = (folder / "plan.yaml").read_text().replace("../tables", "sub/corpus.csv")
    with pytest.raises(PlanError, match=r"sink.path=.* is a file"):
        Plan.parse(text, find_method, folder=folder)


@pytest.mark.parametrize(
    ("name", "content", "columns", "expected"),
    [
        ("a.csv", b"", {}, ("corpus.path", "is empty", "documents")),
        ("a.jsonl", b"", {}, ("corpus.path", "is empty", "documents")),
        ("a.csv", b"\xef\xbb\xbftext,label\n", {}, None),
        ("a.csv", b'id,"te\nxt",text\n1,2,3\n', {"doc_id": "id"}, None),
        ("a.csv", b"txet,label\nx,y\n", {}, ("corpus.columns.text", "is no column", "Write 'txet', or header: false")),
        ("a.tsv", b'te"xt\tlabel\r\n', {"text": 'te"xt', "doc_id": "nr"}, ("corpus.columns.doc_id", "is no column", "Write one of 'te\"xt', 'label'")),
        ("a.csv.gz", b"\x1f\x8b", {}, None),
        ("a.csv", b"\n \r\ntext,label\n", {}, None),
        ("a.tsv", "a\u2028b\x85c\rd\ttext\n".encode(), {"doc_id": "a\u2028b\x85c\rd"}, None),
        ("a.csv", b"id,text,text\n", {"text": "text1"}, None),
        ("a.csv", b",text\n", {"doc_id": "_c0"}, None),
        ("a.csv", b"caf\xe9,nothing\n", {}, None),
        ("a.csv", "text\n".encode("utf-16"), {}, None),
        ("a.csv", b"x" * 70_000 + b",text\n", {}, None),
        ("a.csv", b'"' + b"x\n" * 40_000 + b'",text\n', {}, None),
        ("a.tsv", b"x" * 70_000 + b"\ttext\n", {}, None),
    ],
)  # fmt: skip
def test_local_files_have_documents_and_columns(
    tmp_path: Path, name: str, content: bytes, columns: dict[str, str], expected: tuple[str, str, str] | None
):
    (tmp_path / name).write_bytes(content)
    plan = yaml.safe_dump(yaml.safe_load(READY) | {"corpus": {"path": str(tmp_path / name), "columns": columns}})
    if expected is None:
        assert Plan.parse(plan, find_method)
        return
    field, rule, remedy = expected
    with pytest.raises(PlanError) as raised:
        Plan.parse(plan, find_method)
    (problem,) = raised.value.problems
    assert (problem.field, rule in problem.rule, remedy in problem.remedy) == (field, True, True)


def test_columns_without_names_are_numbered(tmp_path: Path):
    (tmp_path / "a.tsv").write_text("x\ty\n")
    source = {"path": str(tmp_path / "a.tsv"), "header": False, "columns": {"text": "_c1", "doc_id": "_c2"}}
    with pytest.raises(PlanError, match=r"corpus\.columns\.doc_id='_c2' is no column of .*Write '_c\d'"):
        Plan.parse(yaml.safe_dump(yaml.safe_load(READY) | {"corpus": source}), find_method)


def test_sink_must_not_lie_in_a_file(folder: Path):
    text = (folder / "plan.yaml").read_text().replace("../tables", "sub/corpus.csv/tables")
    with pytest.raises(PlanError, match=r"sink.path=.* would lie in .*corpus.csv', which is a file"):
        Plan.parse(text, find_method, folder=folder)


def test_a_multi_label_model_is_explained_above_one_half(folder: Path):
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps(config | {"problem_type": "multi_label_classification"}))
    text = (folder / "plan.yaml").read_text()
    Plan.parse(text, find_method, folder=folder)
    with pytest.raises(
        PlanError, match=r"keywords.probability=0.3 must be >= 0.5 with the multi-label model models.uris\[0\]"
    ):
        Plan.parse(text + "\nkeywords: {probability: 0.3, evidence: predicted}", find_method, folder=folder)


@pytest.mark.parametrize("path", ["dbfs:/lexplain", "s3://bucket/lexplain"])
def test_a_sink_is_a_path_that_is_mounted(path: str):
    assert "/dbfs/" in problems_of(READY.replace("path: tables", f'path: "{path}"'))["sink.path"].remedy
