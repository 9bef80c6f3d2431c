"""MLflow as ledger and registry: where a model lies, and what a run did. Driver only.

Everything goes through `MlflowClient` with the URI of the plan: the tracking URI and the active run of a
notebook stay as they are. mlflow is imported on first use, because a plan may do without it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import posixpath
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
from pyarrow import csv

from lexplain.errors import ModelError, SessionError, redact
from lexplain.model_store import digest_folder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_RUN_ID = "lexplain.run_id"
_SPLIT = "lexplain.split"
_DIGEST = "lexplain.model_digest"
_LOGGED_MODEL = "lexplain.logged_model"
_MODEL_URI = "lexplain.model_uri"
_PARENT = "mlflow.parentRunId"
_MODEL_NAME = "model"
_ENTRIES_PER_CALL = 100
"""What MLflow's REST API takes of parameters and tags at once."""
_LONGEST_KEY = 250
"""Characters that MLflow takes of a name."""


@dataclass(frozen=True)
class ModelLocation:
    """Where a model is and which one it is.

    Attributes:
        uri: As the plan has it.
        folder: What executors read: an absolute path or a storage URI.
        digest: Of its content, see `model_store.digest_folder`.
    """

    uri: str
    folder: str
    digest: str


def locate_model(uri: str, tracking_uri: str | None) -> ModelLocation:
    """Resolve a model to the folder that executors read, and to its digest.

    Args:
        uri: A local folder, a storage URI (`s3://...`), or an address of MLflow: `models:/name/version`,
            `models:/name@alias`, `models:/id` or `runs:/run/name`.
        tracking_uri: Of the MLflow server that knows it. None: MLflow is off.

    Raises:
        ModelError: There is no such model, or executors could not read it.

    Note:
        Runs on: driver. Cost: reads every file of the model once.
    """
    folder = uri
    if uri.startswith(("models:/", "runs:/")):
        if tracking_uri is None:
            raise ModelError(
                f"model={uri!r} is an address of MLflow, and mlflow is off. There would be nobody to ask where it "
                "lies. Write mlflow.enabled: true, or the path of the folder."
            )
        folder = _storage_uri(_open_client(tracking_uri), uri)
    if folder.startswith("mlflow-artifacts:"):
        raise ModelError(
            f"model={uri!r} lies behind MLflow's artifact proxy, which executors cannot read. Every task would have "
            "failed while it loads the model. Start the server with --no-serve-artifacts and a "
            "--default-artifact-root that all nodes read, or write the path of a copy on shared storage."
        )
    if folder.startswith("dbfs:/"):
        folder = "/dbfs/" + folder.removeprefix("dbfs:/").lstrip("/")
    if "://" not in folder:
        # Executors have working directories of their own.
        folder = str(Path(folder).expanduser().absolute())
    return ModelLocation(uri, folder, digest_folder(folder))


class RunTracker:
    """One parent run of MLflow for one run of lexplain, and a child run for each split.

    Made by `open`. Secrets in URIs are blotted out of everything that is written.
    """

    def __init__(self, client: MlflowClient, run: Run) -> None:
        self._client = client
        self._experiment_id: str = run.info.experiment_id
        self.mlflow_run_id: str = run.info.run_id

    @classmethod
    def open(
        cls, *, tracking_uri: str, artifact_root: str | None, experiment: str, run_id: str, name: str
    ) -> RunTracker:
        """Resume the parent run that carries `run_id`, or create it.

        Args:
            tracking_uri: MLflow server, or `sqlite:///PATH` for a database file, which is created.
            artifact_root: Where the files of a new experiment go, a path or storage URI. None: the server's choice.
            experiment: Name; created if it is not there.
            run_id: Of lexplain: a second call with the same one continues the same run.
            name: Shown by MLflow.

        Raises:
            SessionError: mlflow is not installed, or the server does not answer.

        Note:
            Runs on: driver. Cost: a new SQLite file takes seconds, once.
        """
        client = _open_client(tracking_uri)
        from mlflow.exceptions import MlflowException

        try:
            experiment_id = _find_experiment(client, experiment, artifact_root)
            runs = client.search_runs(
                [experiment_id],
                f"tags.`{_RUN_ID}` = '{run_id}'",
                order_by=["attributes.start_time ASC"],
                max_results=1,
            )
            if runs:
                client.update_run(runs[0].info.run_id, status="RUNNING")
                return cls(client, runs[0])
            return cls(client, client.create_run(experiment_id, tags={_RUN_ID: run_id}, run_name=name))
        except MlflowException as error:
            raise SessionError(
                f"mlflow.tracking_uri={tracking_uri!r} did not open the experiment {experiment!r}: "
                f"{_first_line(error)}. The run would have left no record. Write the URI of a server that answers, "
                "restore the experiment if it was deleted, or write mlflow.enabled: false."
            ) from None  # its message may hold the secrets of the URI

    def log_plan(self, text: str) -> None:
        """Store the plan's YAML as `plan.yaml`."""
        self._client.log_text(self.mlflow_run_id, redact(text), "plan.yaml")

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Set tags of the parent run, as versions of the tables that it wrote."""
        self._log(self.mlflow_run_id, tags=tags)

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Log numbers of the parent run; characters that MLflow refuses in a name are replaced by their code."""
        self._log(self.mlflow_run_id, metrics=metrics)

    def log_table(self, name: str, rows: pa.Table) -> None:
        """Store rows as `tables/NAME.csv`; columns of lists and structs are not for CSV."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.csv"
            csv.write_csv(rows, path)
            self._client.log_artifact(self.mlflow_run_id, str(path), "tables")

    def log_split(
        self,
        split: int,
        folder: Path,
        *,
        parameters: Mapping[str, object],
        metrics: Mapping[str, float],
        register_as: str | None,
    ) -> str:
        """Record one split's model in a child run, and register it.

        A model that was logged before, in this run or in another of the experiment, is not stored twice: its
        address is returned. What was interrupted is continued.

        Args:
            split: Its number.
            folder: Hugging Face folder. Its files are stored byte for byte, so the digest stays the same.
            parameters: How the model was made.
            metrics: How good it is.
            register_as: Name in the model registry. None: not registered.

        Returns:
            `models:/NAME/VERSION`, or `runs:/RUN/model` if it is not registered.

        Note:
            Runs on: driver. Cost: loads and writes the model, about a second for 90 MB, then uploads it.
        """
        digest = digest_folder(folder)
        runs = self._client.search_runs(
            [self._experiment_id], f"tags.`{_DIGEST}` = '{digest}'", order_by=["attributes.start_time ASC"]
        )
        mine = [
            run
            for run in runs
            if run.data.tags.get(_PARENT) == self.mlflow_run_id and run.data.tags.get(_SPLIT) == str(split)
        ]
        if mine:
            child = mine[0].info.run_id
        else:
            tags = {_PARENT: self.mlflow_run_id, _SPLIT: str(split), _DIGEST: digest}
            child = self._client.create_run(self._experiment_id, tags=tags, run_name=f"split {split}").info.run_id
            self._log(child, parameters=parameters, metrics=metrics)
        uri = self._find_logged([*mine, *runs], register_as)
        if uri is None:
            model_id = mine[0].data.tags.get(_LOGGED_MODEL) if mine else None
            uri = self._log_model(child, model_id, folder, register_as)
        self._log(child, tags={_MODEL_URI: uri})
        self._client.set_terminated(child, "FINISHED")
        return uri

    def finish(self, status: Literal["FINISHED", "FAILED"]) -> None:
        """End the parent run; `open` with the same run_id takes it up again."""
        self._client.set_terminated(self.mlflow_run_id, status)

    def _find_logged(self, runs: list[Run], register_as: str | None) -> str | None:
        """Return the address under which one of the runs has stored its model, if that is still there."""
        prefix = "runs:/" if register_as is None else f"models:/{register_as}/"
        for run in runs:
            uri = run.data.tags.get(_MODEL_URI, "")
            if uri.startswith(prefix):
                try:
                    _storage_uri(self._client, uri)
                except ModelError:
                    continue
                return str(uri)
        return None

    def _log_model(self, run: str, model_id: str | None, folder: Path, register_as: str | None) -> str:
        """Upload the model unless `model_id` says that it was, and register it."""
        from mlflow.entities import LoggedModelOutput
        from mlflow.exceptions import MlflowException

        if model_id is None:
            model = self._client.create_logged_model(self._experiment_id, name=_MODEL_NAME, source_run_id=run)
            model_id = str(model.model_id)
            with tempfile.TemporaryDirectory() as temporary:
                artifact = Path(temporary) / _MODEL_NAME
                _write_artifact(folder, artifact, run, model)
                self._client.log_model_artifacts(model_id, str(artifact))
            self._client.finalize_logged_model(model_id, "READY")
            self._client.log_outputs(run, [LoggedModelOutput(model_id, step=0)])
            self._log(run, tags={_LOGGED_MODEL: model_id})
        if register_as is None:
            return f"runs:/{run}/{_MODEL_NAME}"
        try:
            self._client.create_registered_model(register_as)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        # Not models:/ID: a database store would look that up in the store of the process, not in this client's.
        source = self._client.get_logged_model(model_id).artifact_location
        registered = self._client.create_model_version(register_as, source, run, model_id=model_id)
        return f"models:/{register_as}/{registered.version}"

    def _log(
        self,
        run: str,
        *,
        parameters: Mapping[str, object] | None = None,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, object] | None = None,
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        now = int(time.time() * 1000)
        entries: list[Any] = [Param(_valid_key(name), redact(str(value))) for name, value in (parameters or {}).items()]
        entries += [Metric(_valid_key(name), float(value), now, 0) for name, value in (metrics or {}).items()]
        entries += [RunTag(_valid_key(name), redact(str(value))) for name, value in (tags or {}).items()]
        for start in range(0, len(entries), _ENTRIES_PER_CALL):
            part = entries[start : start + _ENTRIES_PER_CALL]
            self._client.log_batch(
                run,
                metrics=[entry for entry in part if isinstance(entry, Metric)],
                params=[entry for entry in part if isinstance(entry, Param)],
                tags=[entry for entry in part if isinstance(entry, RunTag)],
            )


def log_file(tracking_uri: str, mlflow_run_id: str, path: Path, folder: str) -> None:
    """Store a file as an artefact of a run that is there, whatever its status.

    Args:
        tracking_uri: Of the MLflow server that knows the run.
        mlflow_run_id: Of the run.
        path: The file; its name stays.
        folder: Of the run's artefacts, where it goes.

    Raises:
        SessionError: mlflow is not installed, or the server does not take the file.

    Note:
        Runs on: driver. Cost: one upload.
    """
    client = _open_client(tracking_uri)
    from mlflow.exceptions import MlflowException

    try:
        client.log_artifact(mlflow_run_id, str(path), folder)
    except MlflowException as error:
        raise SessionError(
            f"mlflow.tracking_uri={tracking_uri!r} did not take {str(path)!r} for the run {mlflow_run_id}: {_first_line(error)}. "
            "The file is there, its run does not show it. Write the URI of the server that has the run, or mlflow.enabled: false."
        ) from None  # its message may hold the secrets of the URI


def _open_client(tracking_uri: str) -> MlflowClient:
    """Import mlflow, quietly, and return a client."""
    # Read while mlflow is imported: it would write to the terminal by itself, and report its use to its makers.
    os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "false")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("mlflow", "alembic"):
        # Without any handler, Python prints warnings to the terminal.
        logging.getLogger(name).addHandler(logging.NullHandler())
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        raise SessionError(
            "mlflow.enabled=True needs the package mlflow, which is not installed. The run would have left no record. "
            "Install lexplain[mlflow], or write mlflow.enabled: false."
        ) from error
    try:
        return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
    except MlflowException as error:
        raise SessionError(
            f"mlflow.tracking_uri={tracking_uri!r} cannot be opened: {_first_line(error)}. The run would have "
            "left no record. Write sqlite:///PATH, the URI of a server, or mlflow.enabled: false."
        ) from None  # its message may hold the secrets of the URI


def _find_experiment(client: MlflowClient, name: str, artifact_root: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    if artifact_root is not None and "://" not in artifact_root:
        # A relative path would mean another folder in every working directory.
        artifact_root = Path(artifact_root).expanduser().absolute().as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=artifact_root))
    except MlflowException as error:
        found = client.get_experiment_by_name(name)
        if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
            raise
        return str(found.experiment_id)  # another run was quicker


def _storage_uri(client: MlflowClient, uri: str) -> str:
    """Ask MLflow where the model `models:/...` or `runs:/...` is stored."""
    from mlflow.exceptions import MlflowException

    scheme, _, rest = uri.partition(":/")
    try:
        if scheme == "runs":
            return _run_model_uri(client, *rest.lstrip("/").split("/", 1))
        if match := re.fullmatch(r"(.+)@([^@/]+)", rest):
            found = client.get_model_version_by_alias(match[1], match[2])
            return str(client.get_model_version_download_uri(match[1], found.version))
        if match := re.fullmatch(r"(.+)/(\d+)", rest):
            return str(client.get_model_version_download_uri(match[1], match[2]))
        if "/" not in rest:
            return str(client.get_logged_model(rest).artifact_location)
        reason = "neither a version number nor an alias"
    except (MlflowException, TypeError) as error:
        reason = _first_line(error)
    raise ModelError(
        f"model={uri!r} cannot be found in MLflow: {reason}. There would be nothing to explain. "
        "Write models:/NAME/VERSION, models:/NAME@ALIAS or runs:/RUN/PATH of a model that is there, or a folder."
    )


def _run_model_uri(client: MlflowClient, run_id: str, path: str) -> str:
    """A run names models it has logged; older ones lie among its own files."""
    run = client.get_run(run_id)
    for output in run.outputs.model_outputs if run.outputs else []:
        model = client.get_logged_model(output.model_id)
        if model.name == path:
            return str(model.artifact_location)
    return f"{run.info.artifact_uri}/{path}"


def _write_artifact(folder: Path, artifact: Path, run: str, model: Any) -> None:
    """Write an MLflow transformers model that holds the very files of `folder`."""
    import mlflow.transformers
    from mlflow.models import Model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from lexplain.finetune import quiet_transformers

    with quiet_transformers():
        mlflow.transformers.save_model(
            {
                "model": AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True),
                "tokenizer": AutoTokenizer.from_pretrained(folder, local_files_only=True),
            },
            str(artifact),
            task="text-classification",
            mlflow_model=Model(
                artifact_path=model.artifact_location, run_id=run, model_uuid=model.model_id, model_id=model.model_id
            ),
            # Left to itself it imports torchvision to find out.
            pip_requirements=[f"{name}=={version(name).split('+')[0]}" for name in ("torch", "transformers")],
        )
    # A text that says there is no licence at an address made from our path.
    (artifact / "LICENSE.txt").unlink(missing_ok=True)
    # transformers writes some files anew in other words: with the originals the digest stays.
    shutil.rmtree(artifact / "model")
    shutil.copytree(folder, artifact / "model")


def _valid_key(name: str) -> str:
    """Replace what MLflow refuses in a key by its code point: a label may hold any character."""
    key = re.sub(r"[^\w\-./ ]", lambda match: f"_{ord(match[0]):x}_", name)
    if posixpath.normpath(key) != key or key.startswith((".", "/")):
        key = re.sub(r"[./]", lambda match: f"_{ord(match[0]):x}_", key)
    if len(key) > _LONGEST_KEY:
        key = f"{key[: _LONGEST_KEY - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return key


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
