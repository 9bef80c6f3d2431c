"""What is written into SQL comes back the same, whatever it is."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession
from pyspark.sql.types import LongType, StructField, StructType

from lexplain.errors import TableError
from lexplain.tables import quote_identifier, quote_list, quote_text
from spark.hostile import BAD_LABELS, IDS, INJECTIONS, LABELS

PIECES = st.sampled_from(
    ["'", '"', "`", "\\", "$", "{", "}", "${", "}", ":", "env:PATH", "spark.app.name", "\n", "\r", "\t", "\x00", "--", "/*", "*/", ";", "%", "_", "\\'",
     "\\u0041", "\\101", "\\x41", "?", ":p", "{}", "N'", "r'", "X'41'", " ", "a", "é", "😀", "\u2028", "\ufeff", "\uffff", "\U0010ffff", "\x1a", "\x85"]
)  # fmt: skip
STRINGS = st.lists(PIECES, max_size=8).map("".join) | st.text(max_size=12)
KNOWN = [*IDS, *BAD_LABELS, *LABELS, *(one for some in INJECTIONS.values() for one in some)]


@settings(max_examples=6)
@given(st.lists(STRINGS, min_size=300, max_size=300))
def test_any_text_is_the_literal_that_was_written(spark: SparkSession, texts: list[str]) -> None:
    """Hundreds in one query: one that ended its literal would change all that follow it."""
    texts = [*texts, *KNOWN]
    rows = ", ".join(f"({number}, {quote_text(text)})" for number, text in enumerate(texts))
    found = spark.sql(f"SELECT * FROM VALUES {rows} AS t(number, text)").collect()
    assert {row["number"]: row["text"] for row in found} == dict(enumerate(texts))
    numbers = spark.createDataFrame(list(enumerate(texts)), "number INT, text STRING")
    listed = texts[::3]
    assert numbers.where(f"text IN ({quote_list(listed)})").count() == sum(text in set(listed) for text in texts)


@settings(max_examples=3)
@given(st.lists(STRINGS, min_size=100, max_size=100))
def test_any_name_is_the_column_that_was_written(spark: SparkSession, names: list[str]) -> None:
    names = [f"{number} {name}" for number, name in enumerate([*names, *KNOWN]) if "${" not in name]
    schema = StructType([StructField(name, LongType()) for name in names])
    frame = spark.createDataFrame([list(range(len(names)))], schema)
    found = frame.selectExpr(*[f"{quote_identifier(name)} AS {quote_identifier(f'x{name}')}" for name in names])
    assert found.columns == [f"x{name}" for name in names]
    assert list(found.collect()[0]) == list(range(len(names)))


def test_a_name_that_looks_like_a_variable_is_refused(spark: SparkSession) -> None:
    assert spark.sql("SELECT '${spark.sql.session.timeZone}' AS x").collect()[0]["x"] == "UTC", (
        "what is guarded against"
    )
    with pytest.raises(TableError, match="value of a setting or of an environment variable"):
        quote_identifier("${env:PATH}")
