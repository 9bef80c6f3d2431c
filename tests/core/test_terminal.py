"""What reaches a terminal: chatter is diverted, and nothing of the corpus steers the terminal."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

import lexplain
from lexplain.errors import CorpusError
from lexplain.terminal import (
    StageProgress,
    divert_chatter,
    format_cell,
    format_seconds,
    print_error,
    print_explanation,
    print_keywords,
    print_methods,
    print_rows,
)

NASTY = "[red]x[/red] [/] \x1b[31m\x1b]0;title\x07 \x9b2J \r\x08 :heart: \u202ebidi\u2066 \\[ line\nline\tend"
CONTROLS = {character for character in map(chr, range(0xA0)) if not character.isprintable()} - {"\n"} | {
    "\u202e",
    "\u2066",
}


def on_console(write: Callable[[Console], object], *, terminal: bool, width: int = 200) -> str:
    """What `write` writes, without the styles of a terminal."""
    stream = io.StringIO()
    write(
        Console(
            file=stream,
            force_terminal=terminal,
            no_color=True,
            color_system=None,
            width=width,
            highlight=False,
            emoji=False,
        )
    )
    return stream.getvalue()


# --- divert_chatter --------------------------------------------------------------------------------------------

CHATTER = """
import logging, os, subprocess, sys, warnings
from pathlib import Path
from lexplain.terminal import divert_chatter

def chatter(when):
    print(f"print {when}")
    print(f"error {when}", file=sys.stderr)
    os.write(1, f"native {when}\\n".encode())
    subprocess.run(["sh", "-c", f"echo child {when}; echo child error {when} >&2"], check=True)
    warnings.warn(f"warning {when}")

root = logging.getLogger()
state = lambda: (list(root.handlers), root.level, warnings.showwarning, len(os.listdir("/proc/self/fd")))
chatter("before")
before = state()
for name in ("first", "second"):
    try:
        with divert_chatter(Path(sys.argv[1]) / "logs" / f"{name}.log") as console:
            console.print(f"person {name}: räksmörgås :heart:")
            chatter(name)
            logging.getLogger("py4j").info("logged %s", name)
            logging.getLogger("x").error("half \\ud800 of a pair")
            if name == "first":
                raise KeyError(name)
    except KeyError:
        pass
    assert state() == before, (state(), before)
chatter("after")
"""


@pytest.fixture(scope="module")
def diverted(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Path]:
    """Output, errors and log folder of a process that diverts its chatter twice, the first time leaving by an error."""
    folder = tmp_path_factory.mktemp("diverted")
    environment = os.environ | {"PYTHONPATH": str(Path(lexplain.__file__).parents[1]), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", CHATTER, str(folder)], capture_output=True, check=True, env=environment, timeout=60
    )
    return done.stdout.decode(), done.stderr.decode(), folder / "logs"


def test_the_person_sees_only_what_is_meant_for_them(diverted: tuple[str, str, Path]):
    out, err, _ = diverted
    assert sorted(out.splitlines()) == sorted([
        "print before", "native before", "child before", "person first: räksmörgås :heart:",
        "person second: räksmörgås :heart:", "print after", "native after", "child after",
    ])  # fmt: skip
    shown = [line for line in err.splitlines() if "warnings.warn" not in line]
    assert [line.split(": ")[-1] for line in shown] == [
        "error before", "child error before", "warning before", "error after", "child error after", "warning after",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["first", "second"])
def test_the_log_holds_all_the_rest(diverted: tuple[str, str, Path], name: str):
    log = (diverted[2] / f"{name}.log").read_text(encoding="utf-8")
    for source in ("print", "error", "native", "child", "child error", "warning", "logged"):
        assert log.count(f"{source} {name}") == 1 + (source == "error"), source  # "child error" ends like "error"
    assert "py4j INFO logged" in log
    assert r"half \ud800 of a pair" in log
    assert "person" not in log


def test_log_grows_when_its_name_comes_again(tmp_path: Path):
    for _ in range(2):
        with divert_chatter(tmp_path / "a.log"):
            os.write(1, b"once\n")
    assert (tmp_path / "a.log").read_bytes() == b"once\n" * 2


def test_no_secret_reaches_the_log_whoever_writes_it(tmp_path: Path):
    """The JVM and the workers inherit the descriptors; a part of a line waits for the rest."""
    with divert_chatter(tmp_path / "a.log"):
        os.write(1, b"WARN cannot list https://me:hid")
        os.write(2, b"den@host/x?sig=hidden\n\xff\xfe broken")
        subprocess.run(["sh", "-c", "echo ' PASSWORD=hidden'; printf unfinished"], check=True)
        logging.getLogger("x").warning("retrying %s", "ftp://me:hidden@host")
        child = subprocess.Popen(["sh", "-c", "read line; echo later s3://me:hidden@b"], stdin=subprocess.PIPE)
    before = (tmp_path / "a.log").read_bytes()
    assert before.startswith(b"WARN cannot list https://***@host/x?sig=***\n\xff\xfe broken PASSWORD=***\nunfinished")
    assert b"retrying ftp://***@host" in before
    child.communicate(b"go\n")  # a JVM that outlives the command writes on
    deadline = time.monotonic() + 30
    while b"later s3://***@b" not in (tmp_path / "a.log").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert b"hidden" not in (tmp_path / "a.log").read_bytes()


def test_reader_that_goes_away_leaves_the_descriptors_as_they_were(tmp_path: Path):
    """`lexplain sql ... | head -1`: the failing flush used to leave the process's output diverted."""
    code = """
import os, sys
from pathlib import Path
from lexplain.terminal import divert_chatter
with divert_chatter(Path(sys.argv[1])) as console:
    console.file.write("x" * 100)
    os.write(2, b"diverted")
os.write(2, b"shown")
"""
    read_end, write_end = os.pipe()
    os.close(read_end)
    environment = os.environ | {"PYTHONPATH": str(Path(lexplain.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.log")], stdout=write_end, stderr=subprocess.PIPE, env=environment,
        timeout=60, check=True,
    )  # fmt: skip
    os.close(write_end)
    assert done.stderr == b"shown"


# --- what comes from the corpus -------------------------------------------------------------------------------


def keyword_row(**changes: object) -> dict[str, object]:
    return {"label": "sports", "word": "goal", "score_mean": 0.5, "ci_low": 0.4, "ci_high": 0.6,
            "selection_frequency": 2 / 3, "n_documents": 7, "document_frequency": 12} | changes  # fmt: skip


WRITERS: dict[str, Callable[[Console], object]] = {
    "rows": lambda console: print_rows(console, [NASTY, "b"], [(NASTY, 1), (None, [NASTY])]),
    "keywords": lambda console: print_keywords(console, [keyword_row(label=NASTY, word=NASTY)], n_splits=3),
    "explanation": lambda console: print_explanation(console, NASTY, NASTY, [(0, 9, 1.0), (10, 30, -0.5)], signed=True),
    "methods": lambda console: print_methods(console, ["id", "cost"], [(NASTY, "3")], [NASTY]),
    "error": lambda console: print_error(console, CorpusError(NASTY), Path("/logs/[red]a[/red].log")),
    "progress": lambda console: StageProgress(console).finish(NASTY),
}


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("name", WRITERS)
def test_words_do_not_steer_the_terminal(name: str, terminal: bool):
    written = on_console(WRITERS[name], terminal=terminal)
    own = {"\t"} if name == "rows" and not terminal else set()  # between the columns
    assert not CONTROLS.intersection(written) - own
    for part in ("[red]x[/red] [/]", "[31m", ":heart:", "\\[ line"):
        assert part in written
    if name == "error":
        assert "/logs/[red]a[/red].log" in written


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        (None, "null"), ("", ""), (0.123456789, "0.1235"), (float("nan"), "nan"), (12345678, "12345678"), (True, "True"),
        ("a\nb\tc\0d", "a b c d"), ("\ud800", " "), ("räksmörgås 今日 👍", "räksmörgås 今日 👍"),
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"),
        ("soft\u00adhyphen\u200b\u2028\ufeff", "soft hyphen   "),
        ([1, None, "köp\n"], '[1, null, "köp\\n"]'), ({"a": (0.5, True)}, '{"a": [0.5, true]}'),
    ],
)  # fmt: skip
def test_format_cell(cell: object, shown: str):
    assert format_cell(cell) == shown


def test_a_nested_row_is_shown_as_json():
    row = pytest.importorskip("pyspark.sql").Row
    answer = row(status="explained", reason=None, words=[row(word="bank", score=0.25)])
    assert format_cell(answer) == '{"status": "explained", "reason": null, "words": [{"word": "bank", "score": 0.25}]}'


def test_secrets_reach_neither_the_terminal_nor_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    stream = io.StringIO()
    try:
        raise OSError("no answer of https://me:hidden@host/x?sig=hidden")
    except OSError as error:
        print_error(Console(file=stream, width=200), error, tmp_path / "a.log")
    assert "https://***@host/x?sig=***" in stream.getvalue()
    assert "https://***@host/x?sig=***" in caplog.text
    assert "hidden" not in stream.getvalue() + caplog.text


def test_rows_are_separated_by_tabs_where_nobody_looks():
    """Rich turns tabs into spaces, and wraps at 80 columns."""
    long = "word " * 50
    written = on_console(
        lambda console: print_rows(console, ["a", "b"], [(1, long), (2.5, "x")]), terminal=False, width=80
    )
    assert written == f"a\tb\n1\t{long}\n2.5\tx\n"


def test_no_digit_of_a_number_is_lost_in_a_pipe():
    written = on_console(lambda console: print_rows(console, ["a"], [(123456.0,), (0.1 + 0.2,)]), terminal=False)
    assert written == "a\n123456.0\n0.30000000000000004\n"


def test_rows_are_aligned_in_a_terminal():
    written = on_console(lambda console: print_rows(console, ["label", "n"], [("a", 1), ("long", 2)]), terminal=True)
    assert [line.rstrip() for line in written.splitlines()] == ["label  n", "a      1", "long   2"]


def test_keywords_by_class():
    rows = [
        keyword_row(), keyword_row(word="team", ci_low=None, ci_high=None, selection_frequency=1.0),
        keyword_row(label="business", word="bank", score_mean=-0.25),
    ]  # fmt: skip
    written = on_console(lambda console: print_keywords(console, rows, n_splits=3, top=1), terminal=False)
    lines = [line.split() for line in written.splitlines() if line.strip()]
    assert lines[0] == ["business", "(1", "keywords)"]
    assert lines[2] == ["bank", "-0.250", "0.400", "..", "0.600", "2", "of", "3", "7", "12"]
    assert lines[3] == ["sports", "(2", "keywords)"]
    assert lines[5][:2] == ["goal", "0.500"]
    assert "team" not in written


# --- errors, progress -----------------------------------------------------------------------------------------


def test_error_of_a_worker_is_told_by_its_last_line():
    text = (
        "[PYTHON_EXCEPTION] An exception was thrown:\nTraceback (most recent call last):\n"
        "  File \"worker.py\", line 1, in main\n    process()\nlexplain.errors.ModelError: model='x' is broken. So it is.\n"
        "\n\nJVM stacktrace:\n\tat org.apache.spark"
    )
    written = on_console(lambda console: print_error(console, RuntimeError(text), Path("a.log")), terminal=False)
    assert written == "✗ model='x' is broken. So it is.\ndetails: a.log\n"


def test_error_keeps_its_lines_and_goes_to_the_log(caplog: pytest.LogCaptureFixture):
    written = on_console(lambda console: print_error(console, CorpusError("one\n  two"), Path("a.log")), terminal=False)
    assert written.splitlines()[:2] == ["✗ one", "  two"]
    assert "CorpusError: one" in caplog.text
    assert on_console(lambda console: print_error(console, KeyError(), Path("a")), terminal=False).startswith(
        "✗ KeyError\n"
    )


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_of_two_stages(terminal: bool):
    def work(console: Console) -> None:
        progress = StageProgress(console)
        for stage in ("read", "attribute"):
            progress.start(stage, 4, "documents", done=1)
            progress.advance(1)
            progress.start(stage, 4, "documents", done=2)  # again, after an error in between
            progress.advance(2)
            progress.finish("4 documents")
        progress.close()
        progress.close()

    written = on_console(work, terminal=terminal)
    assert written.count("✓") == 2
    if not terminal:
        assert "read: 2 of 4 documents, " in written
        assert " left" in written


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 s"), (0.4, "0 s"), (12, "12 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (60, "1 min 00 s"),
        (185, "3 min 05 s"), (3599.4, "59 min 59 s"), (3599.6, "1 h 00 min"), (3600, "1 h 00 min"),
        (7800, "2 h 10 min"), (7859, "2 h 10 min"), (360000, "100 h 00 min"),
    ],
)  # fmt: skip
def test_format_seconds(seconds: float, shown: str):
    assert format_seconds(seconds) == shown
