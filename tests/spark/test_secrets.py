"""Passwords and tokens planted wherever a run meets them, and looked for in every file that it leaves."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
import yaml

from core.models import save_classifier
from spark.planted import make_plan, plant, write_json

pytestmark = pytest.mark.slow

SECRETS = {
    "corpus": "c0rpus-S3cret-7f3a",
    "model": "m0del-S3cret-81bd",
    "tracking": "tr4cking-S3cret-92ce",
    "server": "s3rver-S3cret-a3df",
    "condition": "dapi0123456789abcdef0123456789abcdef",
    "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyz",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENGbPxRfiCY3xampleKey",
    "DATABRICKS_TOKEN": "dapifedcba9876543210fedcba9876543210",
    "PGPASSWORD": "pg-S3cret-b4e0",
}


COMMANDS = """
import sys
from pathlib import Path
from lexplain.cli import main
from lexplain.session import open_session, stop_session
from lexplain.terminal import divert_chatter

given = Path(sys.argv[1])
with divert_chatter(given.parent / "jvm.log"):  # where the JVM writes from now on, as under each command alone
    spark = open_session("lexplain secrets", master="local[2]", settings={"spark.sql.shuffle.partitions": "2"})
for name in sys.argv[2:]:
    plan = str(given / f"{name}.yaml")
    print(f"== {name}", flush=True)
    try:
        main(["report", plan, "--out", str(given.parent / "report.html")] if name == "report" else ["run", plan])
        code = 0
    except SystemExit as end:
        code = end.code
    print(f"== {name}: {code}", flush=True)
stop_session(spark)
"""


class Made(NamedTuple):
    folder: Path
    said: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Commands in a process of their own, whose JVM and workers write what they write; each by a plan with secrets."""
    folder = tmp_path_factory.mktemp("secrets")
    (folder / "given").mkdir()
    # In files of this machine a query is part of a name, or passed over: what it stands for is a signed URL.
    corpus = f"documents.jsonl?sv=1&sig={SECRETS['corpus']}"
    write_json(
        folder / "given" / corpus, [{**one, "url": f"https://host/{n}"} for n, one in enumerate(plant(40, seed=3))]
    )
    models = [
        save_classifier(folder / "given" / f"model {n}", "bert", labels=("NA", "politics", "sport"), seed=n)
        for n in range(2)
    ]
    source = {
        "path": f"file://{folder}/given/{corpus}", "format": "json", "columns": {"doc_id": "doc_id", "labels": "labels"},
        "where": f"url != 'https://host/{SECRETS['condition']}'",
    }  # fmt: skip
    plan = make_plan(
        folder, name="secret", training=None, models={"uris": [f"{model.as_uri()}?token={SECRETS['model']}" for model in models], "corpus": "unseen"},
        method={"id": "gradient_x_input", "options": {}}, keywords={"min_df": 0, "probability": 0.1},
        mlflow={"tracking_uri": f"sqlite:///file:{folder}/mlflow.db?uri=true&password={SECRETS['tracking']}"},
    ) | {"corpus": source}  # fmt: skip
    server = {"path": f"ftp://reader:{SECRETS['server']}@127.0.0.1:1/documents.csv"}
    plans: dict[str, dict[str, Any]] = {
        "run": plan,
        "report": plan,
        "no source": plan | {"corpus": server, "name": "unreachable"},
        "no tracking": plan
        | {"mlflow": {"tracking_uri": f"http://me:{SECRETS['server']}@127.0.0.1:1"}, "name": "untracked"},
        "no model": plan
        | {
            "models": {"uris": [f"{folder.as_uri()}/given?token={SECRETS['model']}"], "corpus": "unseen"},
            "name": "modelless",
        },
        "no plan": plan | {"corpus": server | {"limit": 0}, "mlflow": {"tracking_uri": 5}},
    }
    environment = {name: secret for name, secret in SECRETS.items() if name.isupper()}
    environment = os.environ | environment | {"TMPDIR": str(folder / "tmp"), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    (folder / "tmp").mkdir()
    for name, one in plans.items():
        (folder / "given" / f"{name}.yaml").write_text(yaml.safe_dump(one))
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, str(folder / "given"), *plans], capture_output=True, text=True, env=environment, cwd=folder,
        check=False, timeout=840,
    )  # fmt: skip
    return Made(folder, done.stdout + done.stderr)


def read_files(folder: Path) -> Iterator[tuple[Path, str]]:
    """What each file holds, as text: tables and databases row by row, for they compress and cut their values."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.is_relative_to(folder / "given"):
            continue
        if path.suffix == ".parquet":
            yield path, repr(pq.read_table(path, partitioning=None).to_pylist())
        elif path.suffix == ".db":
            with sqlite3.connect(path) as database:
                yield path, "\n".join(database.iterdump())
        else:
            yield path, path.read_bytes().decode("latin-1")


def test_the_commands_did_what_they_should(made: Made) -> None:
    codes = dict(re.findall(r"^== (.+): (\d)$", made.said, flags=re.MULTILINE))
    assert codes == {
        "run": "0",
        "report": "0",
        "no source": "1",
        "no tracking": "1",
        "no model": "1",
        "no plan": "2",
    }, made.said[-3000:]
    for shown in ("ftp://***@127.0.0.1:1/documents.csv", "http://***@127.0.0.1:1", "?token=***"):
        assert shown in made.said


def test_no_secret_is_in_any_file(made: Made) -> None:
    files = list(read_files(made.folder))
    kinds = {path.suffix for path, _ in files}
    assert {".parquet", ".json", ".db", ".log", ".html", ".yaml", ".csv", ".sql"} <= kinds
    found = {
        (str(path.relative_to(made.folder)), name)
        for path, text in files
        for name, secret in SECRETS.items()
        if secret in text
    }
    assert found == set()
    assert any("sig=***" in text for path, text in files if path.suffix == ".parquet"), (
        "the plan that was kept names its source"
    )
    assert any("ftp://***@127.0.0.1:1" in text for path, text in files if path.suffix == ".log"), (
        "the logs say what was not there"
    )


def test_no_secret_is_said(made: Made) -> None:
    assert {name for name, secret in SECRETS.items() if secret in made.said} == set()
