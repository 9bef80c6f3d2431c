"""One local Spark session with Delta for all Spark tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from lexplain.session import fetch_jars, open_session, stop_session

# For the sessions of this process and for the command lines and clients that tests start.
os.environ["SPARK_CONF_DIR"] = str(Path(__file__).parent / "conf")


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    """Two cores, few shuffle partitions; started once, since a JVM takes seconds."""
    fetch_jars()
    session = open_session("lexplain tests", master="local[2]", settings={"spark.sql.shuffle.partitions": "2"})
    yield session
    stop_session(session)
