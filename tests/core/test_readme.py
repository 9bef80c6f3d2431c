"""What README.md claims about plans, commands, tables and exit codes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

import lexplain.plan
from lexplain import cli
from lexplain.demo import PLAN
from lexplain.methods import find_method
from lexplain.plan import Plan
from lexplain.schema import TABLES
from lexplain.views import VIEWS

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_the_ten_lines_are_a_plan(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    assert len(text.splitlines()) <= 10
    (tmp_path / "documents.csv").write_text("text,label\nThe bank said,business\n", encoding="utf-8")
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "config.json").write_text('{"model_type": "bert"}')
    for name in ("tokenizer.json", "model.safetensors"):
        (tmp_path / "my-model" / name).touch()
    plan = Plan.parse(text, find_method, folder=tmp_path)
    assert plan.models.splits == 5
    assert plan.evidence == "true_positives"


def test_every_command_is_there() -> None:
    known = {command.name for command in cli.app.registered_commands} | {
        group.name for group in cli.app.registered_groups
    }
    named = set(re.findall(r"(?:^|`|bin/)lexplain ([a-z][a-z-]*)", README, flags=re.MULTILINE))
    assert {"run", "sql", "plan"} <= named
    assert named <= known
    makefile = (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8")
    assert all(
        f"\n{target}:" in makefile for target in set(re.findall(r"(?:^|`)make ([a-z-]+)", README, flags=re.MULTILINE))
    )


def test_every_table_and_view_is_there() -> None:
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", README, flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert {"keywords_current", "explanations", "runs"} <= named <= {*TABLES, *VIEWS}


@pytest.mark.parametrize(
    "part", ["uris: [...], corpus: unseen", "columns: {split: ...}", "train: head", "schema: catalog.schema"]
)
def test_every_inline_key_is_a_key_of_a_plan(part: str) -> None:
    assert part in README
    keys = yaml.safe_load("{" + part.replace("...", "x") + "}")
    fields = {name for section in ("corpus", "models", "sink") for name in _names(section)} | {"columns"}
    assert set(keys) <= fields


def _names(section: str) -> set[str]:
    hint = {"corpus": "Source", "models": "Models", "sink": "Sink"}[section]
    return {field.name for field in dataclasses.fields(getattr(lexplain.plan, hint))}


def test_exit_codes_are_those_of_the_command_line() -> None:
    assert "0 done, 1 failure, 2 bad plan, 3 partly done" in README
    assert (cli.DONE, cli.FAILED, cli.BAD_PLAN, cli.PARTLY_DONE) == (0, 1, 2, 3)


def test_the_demo_shown_is_the_demo_that_runs() -> None:
    plan = yaml.safe_load(PLAN % {"base": "x"})
    assert f"{plan['training']['limit']} documents staged" in README
    assert f"{plan['corpus']['limit']} documents staged" in README
    assert f"{plan['models']['splits']} models" in README
