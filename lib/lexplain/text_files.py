"""Reading csv, tsv and JSON lines through Spark so that no byte is altered and no row is lost.

Spark's readers put U+FFFD for a broken byte, null for a missing field and nothing for a superfluous one, without a word.
So csv and tsv are read as ISO-8859-1, in which every byte is a character, and turned back into bytes; a line of JSON
is parsed beside its bytes. What is broken is marked in a column of its own.

Driver only; the reading itself is Spark's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lexplain.errors import CorpusError
from lexplain.plan import Source
from lexplain.tables import quote_identifier, quote_list, quote_text

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

BROKEN = "__broken"
"""Column beside the user's: STRUCT<reason STRING, record BINARY> of a row that is no document, else null."""

_RECORD = "__record"  # Spark's own column of what it could not parse
_SHOWN_CHARACTERS = 80
_END_CHARACTERS = 200
_MOST_FILES = 100  # looked into for an open quote

_SPACE = " \t\r\n"
_BOM = b"\xef\xbb\xbf".decode("latin-1")
_NOT_BLANK = "RLIKE '\\\\S'"
# A quote that was left open runs to the next one: what follows that quote is the next field's text, so the reader keeps
# the value with its quotes. Between the two lie a line break, and then a quote where only a field's own can be.
_SWALLOWED = r'^"[^"]*\n([^"]*,"|"[^"\n]*",)'
# Half of a surrogate pair, escaped: Java would write it as a question mark.
_LONE_SURROGATE = (
    r"(?<!\\)(\\\\)*+\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    r"|(?<!\\)(?<!\\u[dD][89abAB][0-9a-fA-F]{2})(\\\\)*+\\u[dD][c-fC-F]"
)
# After a closing brace JSON has a comma, another bracket, or nothing; the reader ignores all that follows an object.
_TRAILING = r"\}\s*+[^\s,\}\]]"

_ADVICE = {
    "csv": "Check header, the separator (a comma) and the quotes (doubled inside quotes); write format: tsv for tabs",
    "tsv": "Check header and the separator (a tab); write format: csv for commas",
    "json": "Write JSON lines, one object a line: `jq -c '.[]' file` makes them of an array, `jq -c .` of printed objects",
}


def read_text_file(spark: SparkSession, source: Source, path: str) -> DataFrame:
    """Return the columns of a csv, tsv or JSON lines source, and `BROKEN`.

    Strings hold the bytes of the file, which may be invalid UTF-8.

    Args:
        spark: The session.
        source: What to read; its kind is csv, tsv or json.
        path: Its path, as Spark takes it.

    Raises:
        CorpusError: It is no UTF-8 text, no line of it is a JSON object, or a quote is open to the end of a csv file.

    Note:
        Cost: csv and tsv, a header; csv also one reading of its lines; JSON one reading to find the types.
    """
    # \n alone: of a line break inside quotes Spark would otherwise drop the \r, and a lone \r would end a line of tsv.
    lines = spark.read.text(path, lineSep="\n").where(f"value {_NOT_BLANK}")
    _check_encoding(lines, source)
    partitions = sorted(set(lines.columns) - {"value"})
    if source.kind == "json":
        return _read_json(spark, source, path, lines, partitions)
    return _read_fields(spark, source, path, lines, partitions)


def refuse_rows(source: Source, malformed: int, total: int, example: bytes) -> CorpusError:
    """Return the error to raise where a source as a whole is not what the plan says."""
    shown = example.decode("utf-8", "replace")[:_SHOWN_CHARACTERS]
    return CorpusError(
        f"{source.origin!r} cannot be read as {source.kind}: {malformed} of {total} rows are malformed, as {shown!r}. "
        f"They would have been rejected, and the keywords be those of the rest. {_ADVICE[str(source.kind)]}."
    )


def _check_encoding(lines: DataFrame, source: Source) -> None:
    """Refuse UTF-16, UTF-32, what is no text, and an empty file, by the first line."""
    row = lines.selectExpr("CAST(value AS BINARY) AS line").head()
    if row is None:
        raise CorpusError(
            f"{source.origin!r} holds no line, or its name starts with '_' or '.', which Spark passes over. Nothing would "
            "have been explained. Write the path of a file with documents, or rename it."
        )
    first = bytes(row["line"])
    if first.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in first:
        raise CorpusError(
            f"{source.origin!r} is no UTF-8 text: it starts with {first[:16]!r}, as UTF-16 or a binary file does. Its "
            "columns would not have been found. Convert it, as with `iconv -f UTF-16 -t UTF-8`, or write its true format."
        )


# --- csv and tsv --------------------------------------------------------------------------------------------------


def _read_fields(spark: SparkSession, source: Source, path: str, lines: DataFrame, partitions: list[str]) -> DataFrame:
    if source.header:
        _check_headers(source, lines)
    frame = _open_fields(spark, source, path)
    names = [name for name in frame.columns if name not in (*partitions, _RECORD)]
    malformed = f"{_RECORD} IS NOT NULL"
    if source.kind == "csv":
        _check_quotes(source, frame, names, lines)
        malformed = " OR ".join(
            [
                malformed,
                *(f"coalesce({quote_identifier(name)} RLIKE {quote_text(_SWALLOWED)}, FALSE)" for name in names),
            ]
        )
    record = f"coalesce({_RECORD}, concat_ws(',', {', '.join(map(quote_identifier, names)) or quote_text('')}))"
    broken = f"named_struct('reason', 'malformed_row', 'record', encode({record}, 'ISO-8859-1'))"
    values = {name: quote_identifier(name) for name in names}
    if names and not source.header:
        first = values[names[0]]
        values[names[0]] = f"if(startswith({first}, {quote_text(_BOM)}), substring({first}, 4), {first})"
    if names:  # of the file's own \r\n the \r is left over
        last = values[names[-1]]
        values[names[-1]] = f"if(endswith({last}, '\\r'), substring({last}, 1, length({last}) - 1), {last})"
    return frame.where(f"{_RECORD} IS NULL OR {_RECORD} {_NOT_BLANK}").selectExpr(
        *[f"CAST(encode({value}, 'ISO-8859-1') AS STRING) AS {quote_identifier(_restore_name(name))}"
          for name, value in values.items()],
        *map(quote_identifier, partitions),
        f"CASE WHEN {malformed} THEN {broken} END AS {BROKEN}",
    )  # fmt: skip


def _open_fields(spark: SparkSession, source: Source, path: str) -> DataFrame:
    """Return the columns as characters of ISO-8859-1, and the record where the number of fields is not the header's."""
    from pyspark.sql.types import StringType, StructField, StructType

    options: dict[str, bool | str] = {"header": source.header, "encoding": "ISO-8859-1", "lineSep": "\n"}
    if source.kind == "csv":
        # RFC 4180: a quote inside quotes is doubled, and a quoted field may hold line breaks.
        options |= {"multiLine": True, "quote": '"', "escape": '"'}
    else:
        # One document a line, quotes are text: what corpora are shipped as.
        options |= {"sep": "\t", "quote": ""}
    # A header is one line. Looking for several, Spark would take a file's name for a pattern.
    multi_line = source.kind == "csv" and not source.header
    fields = spark.read.options(**options | {"multiLine": multi_line}).csv(path).schema.fields
    schema = StructType([*fields, StructField(_RECORD, StringType())])
    return spark.read.options(**options, columnNameOfCorruptRecord=_RECORD).schema(schema).csv(path)


def _check_headers(source: Source, lines: DataFrame) -> None:
    """Refuse files whose first lines differ: columns are told by their place. Not Spark's own check, which takes a BOM for text."""
    from pyspark.sql.functions import expr

    if len(lines.inputFiles()) < 2:
        return
    heads = (
        lines.selectExpr(
            "_metadata.file_path AS file", "rtrim('\\r', decode(CAST(value AS BINARY), 'ISO-8859-1')) AS line",
            "struct(_metadata.file_block_start, monotonically_increasing_id()) AS place",
        )
        .groupBy("file").agg(expr("min_by(line, place) AS head"))
        .groupBy("head").agg(expr("min(file) AS file")).orderBy("file").limit(2).collect()
    )  # fmt: skip
    if len(heads) > 1:
        shown = [f"{row['file']!r} ({row['head'][:_SHOWN_CHARACTERS]!r})" for row in heads]
        raise CorpusError(
            f"the first lines of {shown[0]} and {shown[1]} differ. Columns would have been taken for one another. Give all "
            "files of a folder the same header, or write header: false if they have none."
        )


def _restore_name(name: str) -> str:
    """Return a column's name as the file has it."""
    if name.startswith(_BOM):
        name = name.removeprefix(_BOM).strip('"')
    name = name.removesuffix("\r")
    try:
        return name.encode("latin-1").decode("utf-8")
    except UnicodeError:  # a header in ISO-8859-1
        return name


def _check_quotes(source: Source, frame: DataFrame, names: list[str], lines: DataFrame) -> None:
    """Refuse a file in which a quote is open to the end: all rows from there would have become one.

    A file with an even number of quotes has none. In another, a value or record of several lines must end as the file.
    """
    from pyspark.sql.functions import expr

    files = (
        lines.selectExpr(
            "_metadata.file_path AS file",
            "octet_length(value) - octet_length(replace(value, '\"', '')) AS quotes",
            "decode(CAST(value AS BINARY), 'ISO-8859-1') AS line",
            "struct(_metadata.file_block_start, monotonically_increasing_id()) AS place",
        )
        .groupBy("file").agg(expr("sum(quotes) AS quotes"), expr("max_by(line, place) AS line"))
        .where("quotes % 2 = 1").limit(_MOST_FILES)
    )  # fmt: skip
    last = [row["line"].rstrip(_SPACE) for row in files.collect()]
    if not last or not names:
        return
    ends = quote_list([line[-_END_CHARACTERS:] if len(line) > _END_CHARACTERS else f"\n{line}" for line in last])
    record, columns = quote_identifier(_RECORD), [quote_identifier(name) for name in names]
    # Within a value a doubled quote is one.
    texts = [(record, "end"), *((column, "replace(end, '\"\"', '\"')") for column in columns)]
    runs_to_end = " OR ".join(
        f"exists(array({ends}), end -> coalesce(endswith(trim(TRAILING {quote_text(_SPACE)} FROM {text}), {end}), FALSE))"
        for text, end in texts
    )
    open_quote = (
        f"({record} IS NULL OR length({record}) % 2 != length(replace({record}, '\"', '')) % 2) AND ({runs_to_end})"
    )
    found = frame.where(open_quote).selectExpr(
        "_metadata.file_path AS file", f"left(coalesce({record}, concat_ws(',', {', '.join(columns)})), {_SHOWN_CHARACTERS}) AS start"
    ).head()  # fmt: skip
    if found is not None:
        start = found["start"].encode("latin-1").decode("utf-8", "replace")
        raise CorpusError(
            f"{source.origin!r}: a quote is opened and never closed in {found['file']!r}, in the record that starts "
            f"{start!r}. All rows from there would have been read as one. Close it; a quote that is text is doubled, in "
            "a quoted field (RFC 4180)."
        )


# --- JSON lines ---------------------------------------------------------------------------------------------------


def _read_json(spark: SparkSession, source: Source, path: str, lines: DataFrame, partitions: list[str]) -> DataFrame:
    from pyspark.sql.functions import col, expr, from_json
    from pyspark.sql.types import StringType, StructField, StructType

    inferred = spark.read.option("columnNameOfCorruptRecord", _RECORD).json(path).schema.fields
    fields = [field for field in inferred if field.name not in (*partitions, _RECORD)]
    bom = quote_text("\ufeff")
    lines = lines.withColumn("value", expr(f"if(startswith(value, {bom}), substring(value, 2), value)"))
    array = "startswith(ltrim(value), '[')"
    # An object's line never ends with a bracket: one that does closes an array over several lines.
    closing = f"endswith(rtrim(value), ']') AND NOT {array}"
    counts = lines.selectExpr(
        "count(*) AS n", f"count_if({array}) AS opened", f"count_if({closing}) AS closed",
        f"CAST(first(if({array} OR {bool(not fields)}, value, NULL), TRUE) AS BINARY) AS example",
    ).collect()[0]  # fmt: skip
    if counts["n"] and (not fields or (counts["opened"] and counts["closed"])):
        broken = counts["opened"] if fields else counts["n"]
        raise refuse_rows(source, broken, counts["n"], bytes(counts["example"]))
    schema = StructType([*fields, StructField(_RECORD, StringType())])
    parsed = lines.withColumn("row", from_json("value", schema, {"columnNameOfCorruptRecord": _RECORD}))
    # Braces in strings are text. Escapes and strings go in two steps: one pattern for both would recurse.
    outside = "regexp_replace(regexp_replace(value, '\\\\\\\\.', ''), '\"[^\"]*\"', '\"\"')"
    trailing = f"if(value RLIKE {quote_text(_TRAILING)}, {outside} RLIKE {quote_text(_TRAILING)}, FALSE)"
    reason = expr(
        f"CASE WHEN NOT is_valid_utf8(value) THEN 'invalid_utf8' WHEN value RLIKE {quote_text(_LONE_SURROGATE)} THEN 'lone_surrogate'"
        f" WHEN row IS NULL OR {array} OR row.{_RECORD} IS NOT NULL OR {trailing} THEN 'malformed_row' END"
    )
    return parsed.select(
        *[col("row").getField(field.name).alias(field.name) for field in fields],
        *[col(quote_identifier(name)) for name in partitions],
        reason.alias("reason"), col("value").cast("binary").alias("record"),
    ).selectExpr(
        *[quote_identifier(name) for name in [*(field.name for field in fields), *partitions]],
        f"CASE WHEN reason IS NOT NULL THEN named_struct('reason', reason, 'record', record) END AS {BROKEN}",
    )  # fmt: skip
