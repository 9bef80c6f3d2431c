"""Files as people have them: what is sound arrives byte for byte, what is broken is rejected with a reason or refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import Row, SparkSession

from core.models import save_classifier
from lexplain.corpus import stage
from lexplain.errors import CorpusError
from lexplain.plan import Columns, Sink, Source
from lexplain.sources import read_documents
from lexplain.tables import Tables
from spark.planted import run_plan


def read(spark: SparkSession, path: Path, data: bytes | None = None, **settings: Any) -> list[Row]:
    """Write a file and read it, ordered by text."""
    if data is not None:
        path.write_bytes(data)
    columns = Columns(**settings.pop("columns", {"doc_id": "id"}))
    frame = read_documents(spark, Source(path=str(path), columns=columns, **settings), "corpus")
    return frame.orderBy("text", "doc_id").collect()


def texts(rows: list[Row]) -> dict[str, bytes | None]:
    return {row["doc_id"]: None if row["text"] is None else bytes(row["text"]) for row in rows}


def defects(rows: list[Row]) -> dict[str, bytes]:
    return {bytes(row["text"]).decode("latin-1"): row["defect"] for row in rows if row["defect"] is not None}


LABELLED = {"doc_id": "id", "labels": "label"}
SOUND = [
    "plain",
    'a "quote"',
    "comma, tab\there",
    "two\r\nlines",
    "three\nlines\rand one",
    " blanks ",
    "räksmörgås 今日 😀",
    '"Hi", she said\nand "left"',
    "back\\slash\\",
    "'",
]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_csv_arrives_byte_for_byte(spark: SparkSession, tmp_path: Path, line_end: str, start: bytes) -> None:
    records = ["id,täxt,label"]
    records += [f'{n},"{text.replace(chr(34), chr(34) * 2)}",é' for n, text in enumerate(SOUND)]
    data = start + line_end.join([*records, ""]).encode()
    rows = read(spark, tmp_path / "a.csv", data, columns={**LABELLED, "text": "täxt"})
    assert texts(rows) == {str(n): text.encode() for n, text in enumerate(SOUND)}
    assert all(row["labels"] == ["é"] and row["defect"] is None for row in rows)


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_tsv_arrives_byte_for_byte(spark: SparkSession, tmp_path: Path, line_end: str) -> None:
    sound = ['"open quote', "lone\rreturn", "back\\slash", " x ", "café", '"a""b"']
    data = line_end.join(["id\ttext", *(f"{n}\t{text}" for n, text in enumerate(sound)), "", ""]).encode()
    assert texts(read(spark, tmp_path / "a.tsv", data)) == {str(n): text.encode() for n, text in enumerate(sound)}
    with gzip.open(tmp_path / "b.tsv.gz", "wb") as file:
        file.write(data)
    assert len(read(spark, tmp_path / "b.tsv.gz")) == len(sound)


def test_json_arrives_byte_for_byte(spark: SparkSession, tmp_path: Path) -> None:
    sound = [*SOUND, '} trailing { "}x" \\ud800', "\u2028 end"]
    lines = [json.dumps({"id": n, "text": text}, ensure_ascii=n % 2 == 0) for n, text in enumerate(sound)]
    rows = read(spark, tmp_path / "a.jsonl", b"\xef\xbb\xbf" + "\r\n".join([*lines, "", ""]).encode())
    assert texts(rows) == {str(n): text.encode() for n, text in enumerate(sound)}
    assert defects(rows) == {}


BROKEN_TEXTS = {
    "csv": (b"id,text,label\n1,caf\xe9 bar,a\n2,fine,a\n", b"caf\xe9 bar"),
    "tsv": (b"id\ttext\tlabel\n1\tcaf\xe9 bar\ta\n2\tfine\ta\n", b"caf\xe9 bar"),
    "jsonl": (
        b'{"id": 1, "text": "caf\xe9 \\u00e9", "label": "a"}\n{"id": 2, "text": "fine", "label": "a"}\n',
        b'{"id": 1, "text": "caf\xe9 \\u00e9", "label": "a"}',
    ),
}


@pytest.mark.parametrize("suffix", BROKEN_TEXTS)
def test_broken_bytes_of_a_text_arrive_under_its_id(spark: SparkSession, tmp_path: Path, suffix: str) -> None:
    data, expected = BROKEN_TEXTS[suffix]
    assert texts(read(spark, tmp_path / f"a.{suffix}", data, columns=LABELLED)) == {"1": expected, "2": b"fine"}


def test_broken_ids_and_labels_are_rejected_with_their_row(spark: SparkSession, tmp_path: Path) -> None:
    data = b"id,text,label\n\xe9,one,a\n2,two,b\xff c\n\xe9,three,a\n4,four,a\n"
    rows = read(spark, tmp_path / "a.csv", data, columns=LABELLED, label_separator=" ")
    assert defects(rows) == dict.fromkeys(["one", "two", "three"], "invalid_utf8")
    assert {bytes(row["text"]): row["labels"] for row in rows} == {b"one": [], b"two": [], b"three": [], b"four": ["a"]}
    assert len({row["doc_id"] for row in rows}) == 4
    assert texts(rows)["2"] == b"two"


def test_rows_of_another_width_are_rejected(spark: SparkSession, tmp_path: Path) -> None:
    sound = "".join(f"{n},text {n},a\n" for n in range(6))
    data = f"id,text,label\n{sound}only two,fields\none,too,many,fields\nonly two,fields\n\n".encode()
    rows = read(spark, tmp_path / "a.csv", data, columns=LABELLED, where="label = 'a'")
    assert len(rows) == 9
    assert len({row["doc_id"] for row in rows}) == 9
    assert defects(rows) == {"only two,fields": "malformed_row", "one,too,many,fields": "malformed_row"}
    assert [row["labels"] for row in rows if row["defect"]] == [[], [], []]
    again = read(spark, tmp_path / "a.csv", columns=LABELLED, where="label = 'a'")
    assert again == rows
    tabs = read(spark, tmp_path / "a.tsv", data.replace(b",", b"\t"), columns=LABELLED)
    assert defects(tabs) == {"only two\tfields": "malformed_row", "one\ttoo\tmany\tfields": "malformed_row"}


def test_rows_that_an_open_quote_swallowed_are_rejected(spark: SparkSession, tmp_path: Path) -> None:
    """The quote opened in row 1 is closed by the one that opens a field of row 3."""
    rows = read(
        spark, tmp_path / "a.csv", b'id,text,label\n1,"one,a\n2,two,a\n3,"three",a\n4,four,a\n5,5" disk,a\n6,x,a\n'
    )
    assert defects(rows) == {'1,"one,a\n2,two,a\n3,"three",a': "malformed_row"}
    assert {"4", "5", "6"} < set(texts(rows))


@pytest.mark.parametrize(
    "data",
    [
        b'id,text\n1,one\n2,"two ""x\n3,three\n4,four "" end\n',
        b'id,text\r\n1,one\r\n2,"two\r\n3,three\r\n4,four',
        b'id,text,label\n1,one,a\n2,"two,a\n3,three,a\n4,four,a\n\n',
    ],
)  # fmt: skip
def test_a_quote_open_to_the_end_stops_the_job(spark: SparkSession, tmp_path: Path, data: bytes) -> None:
    with pytest.raises(CorpusError, match=r"never closed in '\S+a.csv', in the record that starts '2,\"?two"):
        read(spark, tmp_path / "a.csv", data)


def test_an_odd_quote_in_a_sound_file_is_text(spark: SparkSession, tmp_path: Path) -> None:
    rows = read(spark, tmp_path / "a.csv", b'id,text\n1,5" disk\n2,"two\nlines"\n3,end\n')
    assert texts(rows) == {"1": b'5" disk', "2": b"two\nlines", "3": b"end"}


def test_lines_that_are_no_json_object_are_rejected(spark: SparkSession, tmp_path: Path) -> None:
    broken = [
        "{bad",
        '"text"',
        "null",
        '{"id": 8, "text": "x"}{"id": 9, "text": "y"}',
        '{"id": 8, "text": "x"} rest',
        "42",
    ]
    lone = [r'{"id": 20, "text": "half \ud83d of a pair"}', r'{"id": 21, "text": "\\\ude00"}']
    sound = [f'{{"id": {n}, "text": "' + r'\ud83d\ude00 \\ud83d"}' for n in range(8)]
    rows = read(spark, tmp_path / "a.jsonl", "\n".join([*sound, *broken, *lone, ""]).encode())
    assert defects(rows) == dict.fromkeys(broken, "malformed_row") | dict.fromkeys(lone, "lone_surrogate")
    assert {texts(rows)[str(n)] for n in range(8)} == {"😀 \\ud83d".encode()}
    assert {"20", "21"} < set(texts(rows))


ARRAY = '[{"id": 1, "text": "a"},\n{"id": 2, "text": "b"}]'
OBJECTS = json.dumps({"id": 1, "text": "a"}, indent=1)
REFUSED: list[tuple[str, bytes, dict[str, Any], str]] = [
    ("array.json", ARRAY.encode(), {}, r"1 of 2 rows are malformed, as '\[.*`jq -c"),
    ("line.json", ARRAY.replace("\n", "").encode(), {}, r"1 of 1 rows .*`jq -c"),
    ("printed.json", OBJECTS.encode(), {}, r"4 of 4 rows are malformed, as '\{'.*`jq -c"),
    ("tabs.csv", b"id\ttext\n1\ta, b\n", {}, r"corpus.columns.text='text'.*no such column.*'id\\ttext'"),
    ("wide.csv", b"id,text\n1,a,b\n2,c,d\n3,e\n", {}, r"2 of 3 rows are malformed, as '1,a,b'"),
    ("utf16.csv", "id,text\n1,a\n".encode("utf-16"), {}, "no UTF-8 text.*iconv"),
    ("utf16.jsonl", '{"id": 1, "text": "a"}\n'.encode("utf-16-le"), {}, "no UTF-8 text.*iconv"),
    ("case.csv", b" ID,Text\n1,a\n", {}, r"Write 'Text' for 'text'. Write ' ID' for 'id'"),
    ("header.csv", b"1,some text\n2,b\n", {}, r"Columns there: '1', 'some text'.*header: false"),
    ("noheader.csv", b"id,text\n1,a\n", {"header": False}, "header: true"),
    ("numbers.csv", b"1,some text\n2,b\n", {"columns": {"text": "_c1"}}, "write header: false"),
    ("empty.csv", b"", {}, "holds no line"),
    ("_hidden.csv", b"id,text\n1,a\n", {}, "passes over"),
    ("where.csv", b"id,text\n1,a\n", {"where": "nope > 1"}, r"corpus.where='nope > 1'.*nope.*columns: 'id', 'text'"),
    ("syntax.csv", b"id,text\n1,a\n", {"where": "id >"}, r"corpus.where='id >'"),
    ("cast.csv", b"id,text\n1,a\n", {"where": "text > 1"}, r"corpus.where='text > 1'.*CAST_INVALID_INPUT"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "data", "settings", "message"), REFUSED, ids=[case[0] for case in REFUSED])
def test_a_wrong_file_is_refused_in_one_sentence(
    spark: SparkSession, tmp_path: Path, name: str, data: bytes, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(CorpusError, match=message) as caught:
        read(spark, tmp_path / name, data, **settings)
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    assert "at org.apache" not in said
    assert "__" not in said.replace(str(tmp_path), "")


def test_an_array_among_json_lines_is_one_malformed_row(spark: SparkSession, tmp_path: Path) -> None:
    data = b'{"id": 0, "text": "c"}\n[1, 2]\n{"id": 1, "text": "d"}\n'
    found = read(spark, tmp_path / "mixed.json", data)
    assert {row["doc_id"] for row in found if row["defect"] is None} == {"0", "1"}
    assert [(bytes(row["text"]), row["defect"]) for row in found if row["defect"]] == [(b"[1, 2]", "malformed_row")]


def test_files_of_a_folder_must_agree_on_their_header(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"id,text\n1,a\n")
    (tmp_path / "b.csv").write_bytes(b"text,id\nb,2\n")
    with pytest.raises(CorpusError, match=r"first lines of '\S+a.csv' \('id,text'\) and .* differ"):
        read(spark, tmp_path, format="csv")
    (tmp_path / "b.csv").write_bytes(b"\xef\xbb\xbfid,text\r\n2,b\r\n")
    assert texts(read(spark, tmp_path, format="csv")) == {"1": b"a", "2": b"b"}


def test_names_that_spark_makes_up(spark: SparkSession, tmp_path: Path) -> None:
    assert texts(
        read(spark, tmp_path / "index.csv", b",id,text,text\n0,1,a,b\n", columns={"doc_id": "id", "text": "text2"})
    ) == {"1": b"a"}


def test_a_file_name_is_no_pattern(spark: SparkSession, tmp_path: Path) -> None:
    for name in ("a[1].csv", "b{2}.csv", "c*.csv"):
        path = tmp_path / name
        path.write_bytes(b"id,text\n1,a\n")
        assert texts(read(spark, path)) == {"1": b"a"}
        with Tables(spark, Sink(path=str(tmp_path / "tables"))).lock():
            tables = Tables(spark, Sink(path=str(tmp_path / "tables")))
            tables.create()
            assert (
                stage(
                    tables, Source(path=str(path), columns=Columns(doc_id="id")), name="corpus", chunk_documents=10
                ).n_documents
                == 1
            )
    assert texts(read(spark, tmp_path / "a*.csv")) == {"1": b"a"}


def test_columns_of_folders_stay(spark: SparkSession, tmp_path: Path) -> None:
    for year, text in ((2020, "a"), (2021, "b")):
        (tmp_path / f"year={year}").mkdir()
        (tmp_path / f"year={year}" / "x.jsonl").write_text(json.dumps({"id": year, "text": text}) + "\n")
    assert texts(read(spark, tmp_path, format="json", where="year = 2021")) == {"2021": b"b"}


def test_rejected_rows_are_counted_by_reason(spark: SparkSession, tmp_path: Path) -> None:
    """From a broken file to the table of explanations."""
    model = save_classifier(tmp_path / "model", "bert")
    data = (
        b"id,text\n" + b"".join(b"%d,the bank said\n" % n for n in range(5)) + b"5,caf\xe9 bank\nno field\nno field\n"
    )
    (tmp_path / "a.csv").write_bytes(data)
    plan = {
        "name": "broken",
        "corpus": {"path": str(tmp_path / "a.csv"), "columns": {"doc_id": "id"}},
        "models": {"uris": [str(model)], "corpus": "unseen"},
        "method": {"options": {"rule": "midpoint", "nodes": 2}},
        "text": {"max_tokens": 16, "overlap": 0},
        "limits": {"rejected_share": 0.5},
        "execution": {"device": "cpu"},
        "sink": {"path": str(tmp_path / "tables")},
        "mlflow": {"enabled": False},
    }
    run = run_plan(spark, plan, stages=["attribute"])
    rows = run.tables.read("explanations").where("status = 'rejected'").orderBy("reason", "doc_id").collect()
    assert [row["reason"] for row in rows] == ["invalid_utf8", "malformed_row", "malformed_row"]
    assert rows[0]["doc_id"] == "5"
    assert run.record["documents_by_status"]["explained"] == 5
