"""The demo, smaller: BBC News and MiniLM through the installed command line, in processes of their own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lexplain.demo import PLAN, read_bbc_news, write_demo
from lexplain.words import segment

TOPICS = {"business", "entertainment", "politics", "sports", "tech"}
SPORT = {"match", "cup", "coach", "win", "england", "club", "team", "players", "game", "season", "champion", "final",
         "rugby", "olympic", "chelsea", "league", "ireland", "wales", "united", "football", "arsenal", "injury", "tennis",
         "liverpool", "title", "victory", "athens"}  # fmt: skip


def lexplain(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    script = Path(sys.executable).parent / "lexplain"
    return subprocess.run([str(script), *arguments], capture_output=True, text=True, cwd=cwd, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's folder with a smaller plan: two splits, fewer documents, shorter texts, fewer nodes."""
    folder = tmp_path_factory.mktemp("demo")
    plan = write_demo(folder)
    text = plan.read_text(encoding="utf-8")
    smaller = {"limit: 450 ": "limit: 150 ", "limit: 960 ": "limit: 360 ", "splits: 3": "splits: 2", "nodes: 16": "nodes: 8",
               "max_tokens: 128": "max_tokens: 64", "min_df: 5": "min_df: 3", "epochs: 1": "epochs: 20\n  train: head",
               "learning_rate: 2.0e-4": "learning_rate: 3.0e-3"}  # fmt: skip
    for before, after in smaller.items():
        assert before in text
        text = text.replace(before, after)
    (folder / "small.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def printed(folder: Path) -> str:
    done = lexplain("run", "small.yaml", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


def test_the_corpus_is_what_the_readme_says() -> None:
    documents = read_bbc_news()
    assert len(documents) == 2125
    assert {document["topic"] for document in documents} == TOPICS
    assert len({document["doc_id"] for document in documents}) == 2125


def test_it_prints_keywords_of_each_class(printed: str) -> None:
    titles = {match[1] for match in re.finditer(r"^(\w+)\s+\(\d+ keywords\)", printed, flags=re.MULTILINE)}
    assert len(titles & TOPICS) >= 4
    assert "95 % interval" in printed
    for chatter in ("WARN", "Traceback", "Setting default log level", "INFO"):
        assert chatter not in printed
    log = re.search(r"^log: (.*)$", printed, flags=re.MULTILINE)
    assert log is not None
    assert "NativeCodeLoader" in Path(log[1]).read_text(encoding="utf-8")


def test_sport_shows_its_words_and_no_fragments(printed: str, folder: Path) -> None:
    done = lexplain(
        "sql", "--tables", "tables", "SELECT label, word FROM keywords_current ORDER BY label, rank", cwd=folder
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()[1:]]
    sport = {word for label, word in rows if label == "sports"}
    assert len(sport & SPORT) >= 3, sport
    vocabulary = {word.key for document in read_bbc_news() for word in segment(document["text"])}
    assert {word for _, word in rows} <= vocabulary


def test_a_second_run_makes_nothing(printed: str, folder: Path) -> None:
    done = lexplain("run", "small.yaml", cwd=folder)
    assert done.returncode == 0
    assert "nothing has changed since the run finished: nothing is left to do" in done.stdout
    assert "trained now" not in done.stdout
    assert "made now" not in done.stdout
    tables = [text[text.index("keywords)") :].split("tables  ")[0] for text in (printed, done.stdout)]
    assert tables[0] == tables[1]


def test_explain_is_there_in_sql(printed: str, folder: Path) -> None:
    query = "SELECT answer.status, answer.explanations[0].label FROM (SELECT explain('The striker scored twice in the cup final') AS answer)"
    done = lexplain("sql", "--tables", "tables", query, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[1].split("\t") == ["explained", "sports"]


def test_a_bad_plan_stops_before_spark(folder: Path) -> None:
    (folder / "bad.yaml").write_text("name: x y\ncorpus: {path: none.csv}\nmodel: {}\n", encoding="utf-8")
    done = lexplain("run", "bad.yaml", cwd=folder)
    assert done.returncode == 2
    assert "did you mean" in done.stderr or "Write 'models'" in done.stderr
    assert done.stdout == ""


def test_the_demo_plan_says_what_it_does() -> None:
    """The sizes that the README's running time rests on."""
    for part in (
        "limit: 450",
        "limit: 960",
        "splits: 3",
        "epochs: 1",
        "nodes: 16",
        "rule: midpoint",
        "max_tokens: 128",
    ):
        assert part in PLAN
