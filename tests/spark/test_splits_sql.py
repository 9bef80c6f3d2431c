"""Splits as SQL: Spark puts every text on the side where Python puts it."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

from lexplain.splits import Split, digest_text

SPLITS = [Split(123_000, 0, 0, 0.33), Split(0, 19, 3, 0.5), Split(2**31 - 1, 999, 999, 0.01)]

# Runs in a process of its own: a JVM started here without Delta would be kept by every later test.
EVALUATE = """
import json, sys
from pyspark.sql import SparkSession
request = json.load(sys.stdin)
spark = (
    SparkSession.builder.master("local[1]")
    .config("spark.ui.enabled", "false")
    .config("spark.driver.bindAddress", "127.0.0.1")
    .config("spark.driver.host", "127.0.0.1")
    .getOrCreate()
)
rows = spark.createDataFrame([(text,) for text in request["texts"]], "text string")
rows = rows.selectExpr("sha2(text, 256) AS text_digest")
answers = rows.selectExpr("text_digest", *[f"({sql}) AS s{i}" for i, sql in enumerate(request["sql"])])
print("ANSWER" + json.dumps([list(row) for row in answers.collect()]))
spark.stop()
"""


def test_spark_agrees_with_python(tmp_path: Path) -> None:
    draw = random.Random(1)
    alphabet = "abcåäö 中文😀\n'"
    texts = ["".join(draw.choices(alphabet, k=draw.randint(0, 40))) for _ in range(1000)]
    request = {"texts": texts, "sql": [split.sql("text_digest") for split in SPLITS]}
    finished = subprocess.run(
        [sys.executable, "-c", EVALUATE],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        cwd=tmp_path,
    )
    assert finished.returncode == 0, finished.stderr
    answers = json.loads(finished.stdout.split("ANSWER", 1)[1])
    expected = []
    for text in texts:
        digest = digest_text(text.encode())
        expected.append([digest, *(split.trains_on(digest) for split in SPLITS)])
    assert answers == expected
    assert all(len({row[1 + number] for row in expected}) == 2 for number in range(len(SPLITS)))
