"""What a person sees in a terminal: progress, tables, errors. Everything else goes to a log file."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from lexplain.errors import redact

# A log's last lines are there in milliseconds; a pipe ends when nobody is left who writes, which a JVM may outlive.
_LAST_LINES_SECONDS = 5.0
_END_OF_PIPE_SECONDS = 0.2

# Both spell words, in Persian as in Hindi; every other unseen character is kept from the terminal.
_JOINERS = "\u200c\u200d"


@contextmanager
def divert_chatter(log_file: Path) -> Iterator[Console]:
    """Send all output of this process, its JVM and its workers to a file; yield a console for the person.

    Works on file descriptors, so that what the JVM and native libraries print is diverted too. Secrets of URIs, which
    they all print, never reach the file. Everything is as before when the block is left.
    """
    log_file.parent.mkdir(parents=True, exist_ok=True)
    log = _RedactedLog(log_file)
    kept = os.dup(1), os.dup(2)
    stream = os.fdopen(os.dup(kept[0]), "w", encoding="utf-8", errors="replace")
    handler = logging.StreamHandler(log.stream)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    level = root.level
    _point_output_at(log.stream.fileno(), log.stream.fileno())
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield Console(file=stream, highlight=False, emoji=False, soft_wrap=not stream.isatty())
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()
        with suppress(BrokenPipeError):  # the reader of a pipe may have gone
            stream.close()
        _point_output_at(*kept)
        for descriptor in kept:
            os.close(descriptor)
        log.close()


class _RedactedLog:
    """A file that is written through a pipe, line by line and without secrets.

    Attributes:
        stream: What is written here, or by a process that was given its descriptor, comes to the file.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        reading, writing = os.pipe()
        self._lines = os.fdopen(reading, "rb")
        self.stream = os.fdopen(writing, "w", encoding="utf-8", errors="backslashreplace", buffering=1)
        self._mark = os.urandom(16).hex().encode()
        self._marked = Event()
        self._copying = Thread(target=self._copy, name="log", daemon=True)
        self._copying.start()

    def close(self) -> None:
        """Return when everything that was written is in the file; a JVM that lives on may go on writing."""
        self.stream.write(f"{self._mark.decode()}\n")
        self.stream.close()
        self._marked.wait(_LAST_LINES_SECONDS)
        self._copying.join(_END_OF_PIPE_SECONDS)

    def _copy(self) -> None:
        """Copy until the last process that writes has gone: with nobody to read, they would stop at a full pipe."""
        with self._lines, self._file:
            for line in self._lines:
                written, mark, _ = line.partition(self._mark)
                text = redact(written.decode("utf-8", "surrogateescape"))
                with suppress(OSError):  # no room for a log is no reason to stop a job
                    self._file.write(text.encode("utf-8", "surrogateescape"))
                if mark:
                    self._marked.set()


def _point_output_at(out: int, err: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(out, 1)
    os.dup2(err, 2)


# Units of which there are so many that their rate tells something.
_RATED = ("documents", "pairs")


class StageProgress:
    """Shows how far a stage is: a bar with rate and time left in a terminal, plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._stage, self._unit = "", ""
        self._total = self._done = self._before = 0
        self._started = 0.0

    def start(self, stage: str, total: int, unit: str, done: int = 0) -> None:
        """A stage begins; `done` of `total` units are there already."""
        self.close()
        self._stage, self._unit, self._total, self._done, self._before = stage, unit, total, done, done
        self._started = time.monotonic()
        if self._console.is_terminal:
            self._bar = Progress(
                SpinnerColumn(), TextColumn("{task.description:<14}"), BarColumn(24), MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}"), TimeElapsedColumn(), TextColumn("{task.fields[pace]}"),
                console=self._console, transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task(stage, total=total, completed=done, unit=unit, pace="")
            self._bar.start()

    def advance(self, units: int) -> None:
        """So many more units are done."""
        self._done += units
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=units, pace=self._pace())
        elif self._done < self._total:
            self._console.print(f"{self._stage}: {self._done} of {self._total} {self._unit}, {self._pace()}")

    def finish(self, summary: str) -> None:
        """The stage is over."""
        self.close()
        seconds = time.monotonic() - self._started
        made = self._done - self._before
        rate = f", {made / seconds:.1f} {self._unit}/s" if made > 1 and seconds > 0 and self._unit in _RATED else ""
        took = f"({format_seconds(seconds)}{rate})"
        # Text, not markup: rich's escape() loses a backslash before a bracket
        self._console.print(Text.assemble(("✓", "green"), f" {self._stage:<14} {_clean(summary)} ", (took, "dim")))

    def close(self) -> None:
        """Take the bar away, whatever happened."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _pace(self) -> str:
        made, seconds = self._done - self._before, time.monotonic() - self._started
        if made <= 0 or seconds <= 0:
            return ""
        rate = made / seconds
        pace = f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.0f} s each"
        return f"{pace}, {format_seconds((self._total - self._done) / rate)} left"


def format_seconds(seconds: float) -> str:
    """Return a duration as people say it: 12 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def print_error(console: Console, error: BaseException, log_file: Path) -> None:
    """Say what went wrong; where it went wrong is in the log."""
    logging.getLogger("lexplain").error(redact("".join(traceback.format_exception(error))))
    said = "\n".join(_clean(line) for line in redact(_summarise(error)).splitlines())
    console.print(Text.assemble(("✗", "red"), f" {said}\n", (f"details: {_clean(str(log_file))}", "dim")))


def _summarise(error: BaseException) -> str:
    """Return an error's own words; of a worker's traceback only its last line, which says what happened."""
    text = str(error).strip() or type(error).__name__
    if "Traceback (most recent call last)" in text:
        raised = re.findall(r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*: .*$", text, flags=re.MULTILINE)
        text = raised[-1] if raised else text
        text = re.sub(r"^lexplain\.errors\.\w+: ", "", text)
    text = text.split("\n\nJVM stacktrace", 1)[0]
    # Spark adds the query's plan to what it says of a wrong query; that is for the log.
    return re.split(r"\n(?=['+=:])", text, maxsplit=1)[0].rstrip("; \n")


def print_finding(console: Console, subject: str, said: str, remedy: str | None) -> None:
    """Print what was found of a thing on a line; where it is unfit, what mends it on the next."""
    mark = ("✓", "green") if remedy is None else ("✗", "red")
    console.print(Text.assemble(mark, f" {_clean(subject):<12} {_clean(said)}"))
    if remedy is not None:
        console.print(Text.assemble(f"  {'':<12} ", (_clean(remedy), "bold")))


def print_rows(console: Console, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows as an aligned table in a terminal, and as tab-separated lines elsewhere."""
    if not console.is_terminal:
        for row in [columns, *rows]:
            # not console.print, which turns tabs into spaces
            # every digit of a number, for the program that reads it
            cells = [repr(cell) if isinstance(cell, float) else format_cell(cell) for cell in row]
            console.file.write("\t".join(cells) + "\n")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(Text(format_cell(column)))
    for row in rows:
        table.add_row(*[Text(format_cell(cell)) for cell in row])
    console.print(table)


def format_cell(cell: object) -> str:
    """Return a cell as text on one line: control characters of the corpus never reach the terminal."""
    if cell is None:
        return "null"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    if isinstance(cell, tuple | list | dict):
        return _clean(json.dumps(_nest(cell), ensure_ascii=False, default=str))
    return _clean(str(cell))


def _nest(cell: object) -> object:
    """Return a nested cell as JSON types; a row of Spark has names for its fields."""
    if hasattr(cell, "asDict"):
        cell = cell.asDict()
    if isinstance(cell, dict):
        return {str(name): _nest(value) for name, value in cell.items()}
    return [_nest(value) for value in cell] if isinstance(cell, tuple | list) else cell


def _clean(text: str) -> str:
    return "".join(character if character.isprintable() or character in _JOINERS else " " for character in text)


# Below this share of the largest score a word keeps the terminal's own colours.
_FAINT = 0.05


def print_explanation(
    console: Console, title: str, text: str, words: Sequence[tuple[int, int, float]], *, signed: bool, top: int = 8
) -> None:
    """Print one explanation: the text with its words coloured (in a terminal), and the largest scores.

    Args:
        console: Where to.
        title: What is explained by which method.
        text: The text.
        words: Start, end and score of each word, in any order: red speaks for the label, blue against it.
        signed: Whether scores have a sign; without one red says how much, not what for.
        top: How many scores are listed, largest first whatever their sign.
    """
    largest = max((abs(score) for *_, score in words), default=0.0) or 1.0
    console.print(Text(_clean(title), style="bold"))
    if console.is_terminal:
        shown, position = Text(), 0
        for start, end, score in sorted(words):
            shown.append(_clean(text[position:start]))
            shown.append(_clean(text[start:end]), style=_shade(score / largest, console.color_system))
            position = end
        console.print(shown.append(_clean(text[position:])))
    for start, end, score in sorted(words, key=lambda word: (-abs(word[2]), word[0]))[:top]:
        bar = ("*" if not signed else "+" if score > 0 else "-") * round(10 * abs(score) / largest)
        sign = "+" if signed and score >= 0 else ""
        value = f"{score:.4g}" if console.is_terminal else repr(score)  # a pipe gets every digit
        console.print(Text(f"  {sign + value:>11}  {bar:<10}  {_clean(text[start:end])}"))
    console.print()


def _shade(share: float, colours: str | None) -> str:
    """Return the style of a score from -1 to 1: black on white that turns red or blue; letters where shades are few."""
    if abs(share) < _FAINT:
        return ""
    if colours not in ("256", "truecolor"):
        return f"{'bold ' if abs(share) >= 0.5 else ''}{'red' if share > 0 else 'blue'}"
    rest = round(255 * (1 - 0.7 * abs(share)))
    return f"black on rgb(255,{rest},{rest})" if share > 0 else f"black on rgb({rest},{rest},255)"


def print_methods(
    console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]
) -> None:
    """Print a table whose first column is never broken, and what is to be known below it."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, no_wrap=number == 0, justify="right" if column == "cost" else "left")
    for row in rows:
        table.add_row(*[Text(format_cell(cell)) for cell in row])
    console.print(table)
    for note in notes:
        console.print(Text(f"\n{_clean(note)}", style="dim"), soft_wrap=False)


def print_keywords(console: Console, rows: Sequence[dict[str, object]], *, n_splits: int, top: int = 10) -> None:
    """Print the keywords of each class: word, mean score, interval, selection frequency, documents.

    Evidence is how many (split, document) pairs have the occurrences that the score is the mean of; documents are those
    of the class that hold the word.
    """
    labels = sorted({str(row["label"]) for row in rows})
    for label in labels:
        mine = [row for row in rows if row["label"] == label]
        title = Text(f"{format_cell(label)}  ({len(mine)} keywords)")
        table = Table(title=title, box=None, header_style="bold", title_justify="left", title_style="bold cyan",
                      pad_edge=False)  # fmt: skip
        for name, side in (("word", "left"), ("mean score", "right"), ("95 % interval", "right"),
                           ("selected", "right"), ("evidence", "right"), ("documents", "right")):  # fmt: skip
            table.add_column(name, justify=side, min_width=14 if name == "word" else 9)  # type: ignore[arg-type]
        for row in mine[:top]:
            interval = "" if row["ci_low"] is None else f"{row['ci_low']:.3f} .. {row['ci_high']:.3f}"
            share = round(float(str(row["selection_frequency"])) * n_splits)
            table.add_row(Text(format_cell(row["word"])), f"{row['score_mean']:.3f}", interval,
                          f"{share} of {n_splits}", str(row["n_documents"]), str(row["document_frequency"]))  # fmt: skip
        console.print(table)
        console.print()
