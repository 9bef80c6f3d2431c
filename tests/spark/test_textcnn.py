"""TextCNN from the command line to a keyword table: made from a corpus, fine-tuned on splits, explained by its own LRP."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest
from pyspark.sql import SparkSession
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from core.models import CLUES
from lexplain.cli import app
from lexplain.pipeline import Run
from lexplain.textcnn import TextCNNForSequenceClassification
from spark.planted import make_plan, plant, run_plan, write_json

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("textcnn")
    write_json(folder / "training.jsonl", plant(240, seed=1))
    return folder


def make_textcnn(*arguments: str) -> int:
    return CliRunner().invoke(app, ["textcnn", *arguments]).exit_code


@pytest.fixture(scope="module")
def run(spark: SparkSession, folder: Path) -> Run:
    base, texts = folder / "base", folder / "training.jsonl"
    assert make_textcnn(str(base), "--texts", str(texts)) == 0
    models = {"base": str(base), "splits": 2, "epochs": 6, "patience": 6, "learning_rate": 1e-2, "batch_size": 16}
    method = {"id": "lrp", "preset": "arras-2016", "options": {}}
    return run_plan(spark, make_plan(folder, models=models, method=method))


def test_its_keywords_are_the_planted_words(run: Run) -> None:
    rows = run.tables.read("keywords_current").where("rank = 1").collect()
    assert {row["label"]: row["word"] for row in rows} == CLUES
    explained = run.tables.read("explanations").where("status = 'explained'")
    assert explained.where("completeness_gap_relative <= 1e-4").count() == explained.count() > 0  # it conserves


def test_mlflow_has_it(run: Run) -> None:
    uri = run.tables.read("models").where("split = 0").collect()[0]["mlflow_uri"]
    mlflow.set_tracking_uri(f"sqlite:///{run.plan.sink.path}/mlflow.db")
    stored = Path(mlflow.artifacts.download_artifacts(uri))
    (config,) = stored.rglob("config.json")
    assert isinstance(
        AutoModelForSequenceClassification.from_pretrained(config.parent), TextCNNForSequenceClassification
    )


def test_given_vectors_stay_and_a_folder_that_is_there_is_left_alone(spark: SparkSession, folder: Path) -> None:
    vectors = folder / "vectors.txt"
    vectors.write_text("Striker 0.5 0.1 -0.2\n", encoding="utf-8")
    arguments = (str(folder / "given"), "--texts", str(folder / "training.jsonl"), "--vectors", str(vectors))
    assert make_textcnn(*arguments) == 0
    model = AutoModelForSequenceClassification.from_pretrained(folder / "given")
    assert not model.config.train_embeddings
    assert (model.embeddings.weight == model.embeddings.weight.new_tensor([0.5, 0.1, -0.2])).all(1).sum() == 1
    assert make_textcnn(*arguments) == 1
    assert make_textcnn(str(folder / "other"), "--texts", str(folder / "training.jsonl"), "--column", "body") == 1
    assert not (folder / "other").exists()
