"""MLflow as registry and ledger, on a real SQLite store."""

from __future__ import annotations

import csv
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import mlflow.transformers
import pyarrow as pa
import pytest
import torch
from mlflow import MlflowClient

from core.models import save_classifier
from lexplain.errors import ModelError, SessionError
from lexplain.model_store import digest_folder, fetch_model
from lexplain.tracking import ModelLocation, RunTracker, locate_model


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture(scope="module")
def tracking_uri(store: Path) -> str:
    return f"sqlite:///{store}/mlflow.db"


@pytest.fixture(scope="module")
def client(tracking_uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri, tracking_uri)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_classifier(tmp_path_factory.mktemp("model") / "bert", "bert")
    (folder / "fine_tuning.json").write_text("{}")
    return folder


@pytest.fixture
def tracker(store: Path, tracking_uri: str, request: pytest.FixtureRequest) -> RunTracker:
    return open_run(store, tracking_uri, request.node.name)


def open_run(store: Path, tracking_uri: str, run_id: str) -> RunTracker:
    return RunTracker.open(
        tracking_uri=tracking_uri,
        artifact_root=str(store / "artifacts"),
        experiment="lexplain",
        run_id=run_id,
        name="demo",
    )


def children(client: MlflowClient, tracker: RunTracker) -> list[mlflow.entities.Run]:
    experiment = client.get_run(tracker.mlflow_run_id).info.experiment_id
    return client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{tracker.mlflow_run_id}'")


def log(tracker: RunTracker, model: Path, split: int = 0, register_as: str | None = "classifier") -> str:
    return tracker.log_split(
        split, model, parameters={"epochs": 3}, metrics={"macro_f1": 0.9, "f1/Q&A: a//b": 0.5}, register_as=register_as
    )


def test_a_registered_split_is_found_by_every_address(
    store: Path, tracking_uri: str, client: MlflowClient, tracker: RunTracker, model: Path, tmp_path: Path
) -> None:
    uri = log(tracker, model, register_as="found")
    assert uri == "models:/found/1"
    client.set_registered_model_alias("found", "champion", "1")
    (child,) = children(client, tracker)
    model_id = child.outputs.model_outputs[0].model_id
    addresses = [uri, "models:/found@champion", f"runs:/{child.info.run_id}/model", f"models:/{model_id}"]
    locations = [locate_model(address, tracking_uri) for address in addresses]
    assert {location.digest for location in locations} == {digest_folder(model)}
    assert len({location.folder for location in locations}) == 1
    assert [location.uri for location in locations] == addresses
    assert locations[0].folder.startswith((store / "artifacts").as_uri())
    fetched = fetch_model(locations[0].folder, locations[0].digest, tmp_path)
    assert digest_folder(fetched) == digest_folder(model)


def test_mlflow_loads_what_was_logged(tracking_uri: str, tracker: RunTracker, model: Path) -> None:
    location = locate_model(log(tracker, model, register_as="loaded"), tracking_uri)
    loaded = mlflow.transformers.load_model(location.folder)
    from transformers import pipeline

    text = "The party said the bank warned of a new tax."
    assert loaded(text) == pipeline("text-classification", str(model))(text)


def test_a_local_folder_is_located_without_mlflow(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate_model(str(model), None) == ModelLocation(str(model), str(model), digest_folder(model))
    monkeypatch.chdir(model.parent)
    assert locate_model(model.name, None).folder == str(model), "executors have other working directories"


def test_a_child_run_tells_how_the_split_was_made(client: MlflowClient, tracker: RunTracker, model: Path) -> None:
    log(tracker, model, split=7)
    (child,) = children(client, tracker)
    assert child.data.params == {"epochs": "3"}
    assert child.data.metrics == {"macro_f1": 0.9, "f1_2f_Q_26_A_3a_ a_2f__2f_b": 0.5}
    assert child.data.tags["lexplain.split"] == "7"
    assert child.data.tags["lexplain.model_digest"] == digest_folder(model)
    assert child.info.status == "FINISHED"
    assert child.info.run_name == "split 7"


def test_a_split_is_logged_once(client: MlflowClient, tracker: RunTracker, model: Path) -> None:
    first = log(tracker, model, register_as="once")
    assert log(tracker, model, register_as="once") == first
    assert len(children(client, tracker)) == 1
    assert len(client.search_model_versions("name = 'once'")) == 1


def test_another_run_with_the_same_model_shares_it(
    store: Path, tracking_uri: str, client: MlflowClient, tracker: RunTracker, model: Path
) -> None:
    first = log(tracker, model, register_as="shared")
    other = open_run(store, tracking_uri, "another plan")
    assert log(other, model, register_as="shared") == first
    assert len(children(client, other)) == 1
    assert len(client.search_model_versions("name = 'shared'")) == 1


def test_a_deleted_version_is_logged_again(client: MlflowClient, tracker: RunTracker, model: Path) -> None:
    log(tracker, model, register_as="deleted")
    client.delete_model_version("deleted", "1")
    assert log(tracker, model, register_as="deleted") == "models:/deleted/2"


def test_an_interrupted_split_is_continued(
    client: MlflowClient, tracker: RunTracker, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_model_version", kill)
        with pytest.raises(KeyboardInterrupt):
            log(tracker, model, register_as="interrupted")
    (before,) = children(client, tracker)
    assert log(tracker, model, register_as="interrupted") == "models:/interrupted/1"
    (after,) = children(client, tracker)
    assert after.info.run_id == before.info.run_id
    assert [output.model_id for output in after.outputs.model_outputs] == [
        output.model_id for output in before.outputs.model_outputs
    ], "uploaded twice"


def test_unregistered_models_have_the_address_of_their_run(
    client: MlflowClient, tracking_uri: str, tracker: RunTracker, model: Path, tmp_path: Path
) -> None:
    other = save_classifier(tmp_path / "other", "bert", seed=5)
    uri = log(tracker, other, register_as=None)
    (child,) = children(client, tracker)
    assert uri == f"runs:/{child.info.run_id}/model"
    assert locate_model(uri, tracking_uri).digest == digest_folder(other)
    assert log(tracker, other, register_as=None) == uri


def test_a_pipeline_logged_by_somebody_else(
    client: MlflowClient, tracking_uri: str, tracker: RunTracker, model: Path, tmp_path: Path
) -> None:
    """A run may hold a model among its own files, as older versions of MLflow put it."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    parts = {
        "model": AutoModelForSequenceClassification.from_pretrained(model),
        "tokenizer": AutoTokenizer.from_pretrained(model),
    }
    mlflow.transformers.save_model(
        parts, str(tmp_path / "saved"), task="text-classification", pip_requirements=["torch"]
    )
    client.log_artifacts(tracker.mlflow_run_id, str(tmp_path / "saved"), "old/place")
    location = locate_model(f"runs:/{tracker.mlflow_run_id}/old/place", tracking_uri)
    fetched = fetch_model(location.folder, location.digest, tmp_path / "cache")
    found = AutoModelForSequenceClassification.from_pretrained(fetched).state_dict()
    assert all(torch.equal(weight, found[name]) for name, weight in parts["model"].state_dict().items())
    assert AutoTokenizer.from_pretrained(fetched).vocab == parts["tokenizer"].vocab


def test_the_parent_run_is_resumed(store: Path, tracking_uri: str, client: MlflowClient, tracker: RunTracker) -> None:
    tracker.finish("FAILED")
    assert client.get_run(tracker.mlflow_run_id).info.status == "FAILED"
    again = open_run(store, tracking_uri, client.get_run(tracker.mlflow_run_id).data.tags["lexplain.run_id"])
    assert again.mlflow_run_id == tracker.mlflow_run_id
    assert client.get_run(tracker.mlflow_run_id).info.status == "RUNNING"
    again.finish("FINISHED")
    assert client.get_run(tracker.mlflow_run_id).info.status == "FINISHED"
    assert open_run(store, tracking_uri, "a different run").mlflow_run_id != tracker.mlflow_run_id


def test_plan_tags_metrics_and_tables(client: MlflowClient, tracker: RunTracker, tmp_path: Path) -> None:
    tracker.log_plan("name: demo\nmlflow: {tracking_uri: 'https://me:hunter2@host'}\n")
    tracker.set_tags(
        {"table.keywords": 12, "source": "https://me:hunter2@host/x", **{f"tag{n}": n for n in range(150)}}
    )
    tracker.log_metrics({"rows.explained": 3, "f1/köpa": 0.25})
    tracker.log_table("keywords", pa.table({"word": ['say "hi", twice', "köpa"], "score": [0.5, 1.0]}))
    run = client.get_run(tracker.mlflow_run_id)
    assert run.data.tags["table.keywords"] == "12"
    assert run.data.tags["tag149"] == "149"
    assert run.data.metrics == {"rows.explained": 3.0, "f1/köpa": 0.25}
    plan = Path(client.download_artifacts(tracker.mlflow_run_id, "plan.yaml", str(tmp_path)))
    assert plan.read_text() == "name: demo\nmlflow: {tracking_uri: 'https://***@host'}\n"
    assert "hunter2" not in str(run.data.tags)
    table = client.download_artifacts(tracker.mlflow_run_id, "tables/keywords.csv", str(tmp_path))
    with open(table, encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [["word", "score"], ['say "hi", twice', "0.5"], ["köpa", "1"]]


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("models:/nothing/1", "not found"),
        ("models:/nothing@best", "not found"),
        ("models:/nothing/latest", "neither a version number nor an alias"),
        ("models:/nothing", "not found"),
        ("runs:/0123456789abcdef0123456789abcdef/model", "not found"),
        ("runs:/0123456789abcdef0123456789abcdef", ""),
    ],
)
def test_addresses_that_lead_nowhere(tracking_uri: str, tracker: RunTracker, uri: str, reason: str) -> None:
    with pytest.raises(ModelError, match=f"(?s)cannot be found in MLflow: .*{reason}.*Write models:/NAME/VERSION"):
        locate_model(uri, tracking_uri)


def test_a_run_without_a_model(tracking_uri: str, tracker: RunTracker) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        locate_model(f"runs:/{tracker.mlflow_run_id}/model", tracking_uri)


def test_mlflow_addresses_need_mlflow() -> None:
    with pytest.raises(ModelError, match=r"mlflow is off.*mlflow\.enabled: true"):
        locate_model("models:/name/1", None)


def test_proxied_artifacts_are_refused() -> None:
    with pytest.raises(ModelError, match=r"executors cannot read.*--no-serve-artifacts"):
        locate_model("mlflow-artifacts:/1/models/m-1/artifacts", None)


def test_a_store_that_cannot_be_opened_tells_no_password(tmp_path: Path) -> None:
    with pytest.raises(SessionError) as caught:
        RunTracker.open(
            tracking_uri="nosuchscheme://me:hunter2@host/db", artifact_root=None, experiment="x", run_id="r", name="n"
        )
    assert "hunter2" not in str(caught.value)
    assert "nosuchscheme://***@host/db" in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_a_deleted_experiment(store: Path, tracking_uri: str, client: MlflowClient) -> None:
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(SessionError, match=r"did not open the experiment 'gone'.*restore the experiment"):
        RunTracker.open(tracking_uri=tracking_uri, artifact_root=None, experiment="gone", run_id="r", name="n")


def test_the_callers_mlflow_is_left_alone(tracker: RunTracker, model: Path, tracking_uri: str, store: Path) -> None:
    before = mlflow.get_tracking_uri()
    with_own = mlflow.active_run()
    log(tracker, model)
    assert mlflow.get_tracking_uri() == before != tracking_uri
    assert mlflow.active_run() is with_own is None


SCRIPT = """
import sys
from pathlib import Path
from lexplain.tracking import RunTracker, locate_model
assert not any(name == "mlflow" or name.startswith("mlflow.") for name in sys.modules), "imported before it is used"
folder, root = Path(sys.argv[1]), Path(sys.argv[2])
uri = f"sqlite:///{root}/fresh.db"
tracker = RunTracker.open(tracking_uri=uri, artifact_root=str(root / "art"), experiment="e", run_id="r", name="n")
address = tracker.log_split(0, folder, parameters={}, metrics={}, register_as="quiet")
locate_model(address, uri)
tracker.finish("FINISHED")
"""


def test_nothing_reaches_the_terminal(model: Path, tmp_path: Path) -> None:
    """In a fresh process, whose mlflow would set up its own handlers and create the database aloud."""
    library = str(Path(__file__).parents[2] / "lib")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(model), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": library},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["art", "fresh.db"]


def test_chatter_goes_to_logging(
    tracker: RunTracker, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("mlflow"), "propagate", True)  # imported by the tests, it kept its handlers
    shutil.copytree(model, tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text((model / "config.json").read_text() + "\n")
    with caplog.at_level(logging.INFO):
        log(tracker, tmp_path / "copy")
    assert any(record.name.startswith("mlflow") for record in caplog.records)
