"""`lexplain methods` and `lexplain explain`: what is shown, in a terminal and in a pipe, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.color import ColorSystem

from core.models import Shelf
from lexplain import cli
from lexplain.methods import METHODS
from lexplain.methods.papers import name_paper

STYLE = re.compile(r"\x1b\[[0-9;]*m")

Shown = Callable[..., tuple[int, str, str]]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Shown:
    """Runs a command; returns its exit code, output and errors."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # for the log

    def run(*arguments: str, terminal: bool = False) -> tuple[int, str, str]:
        for name, value in {"FORCE_COLOR": "1", "COLORTERM": "truecolor", "TERM": "xterm", "COLUMNS": "100"}.items():
            if terminal:
                monkeypatch.setenv(name, value)
            else:
                monkeypatch.delenv(name, raising=False)
        capfd.readouterr()
        code = 0
        try:
            cli.main(list(arguments))
        except SystemExit as error:
            code = int(error.code or 0)
        out, err = capfd.readouterr()
        return code, out, err

    return run


# --- exit codes ---------------------------------------------------------------------------------------------------


def test_a_command_that_is_done_raises_nothing(tmp_path: Path) -> None:
    """Databricks takes a SystemExit for a failure, that of code 0 too."""
    cli.main(["methods", "saliency"])
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "check", str(tmp_path / "missing.yaml")])
    assert ended.value.code == cli.BAD_PLAN


# --- methods ------------------------------------------------------------------------------------------------------


def test_a_pipe_gets_one_line_a_method(shown: Shown) -> None:
    code, out, err = shown("methods")
    assert (code, err) == (0, "")
    head, *lines = (line.split("\t") for line in out.splitlines())
    assert head == ["id", "paper", "cost", "guarantees", "models", "note", "package"]
    rows = {line[0]: line[1:] for line in lines}
    assert set(rows) == set(METHODS)
    assert rows["saliency.v1"][:4] == ["Arras et al. 2016", "3", "unsigned", "any"]
    assert rows["captum.deep_lift.v1"][:4] == ["Shrikumar et al. 2017", "5", "complete, signed, not batched", "textcnn"]
    assert rows["occlusion.v1"][1] == "129"
    assert "patented" in rows["lrp.v1"][4]


def test_a_terminal_of_100_columns_gets_a_table(shown: Shown) -> None:
    code, out, _ = shown("methods", terminal=True)
    lines = STYLE.sub("", out).splitlines()
    assert code == 0
    assert max(map(len, lines)) <= 100
    assert lines[0].split() == ["id", "paper", "cost", "guarantees", "models"]
    for identity in METHODS:  # each whole, on a line of its own
        assert len([line for line in lines if line.startswith(f"{identity} ")]) == 1
    assert "LRP is patented: according to its authors" in out


def test_every_paper_has_a_readable_name() -> None:
    for method in METHODS.values():
        assert method.cite == "none" or re.search(r" (19|20)\d\d$", name_paper(method.cite)), method.id
    assert name_paper("mine2030") == "mine2030"


def test_one_method_is_shown_with_options_and_presets(shown: Shown) -> None:
    code, out, _ = shown("methods", "lrp")
    assert code == 0
    assert out.startswith(
        "lrp.v1  Bach et al. 2015\nReturn one score a token: its share of the target logit, by the rules"
    )
    for line in (
        "  guarantees  signed", "  models      textcnn, bert, roberta, xlm-roberta, distilbert, electra",
        '  rule         "auto"; one of auto, epsilon, attnlrp, cp_lrp', "  eps          null; a number or null; 0 to 1",
        '  arras-2016    rule: "epsilon", eps: 0.01, bias_factor: 1.0',
    ):  # fmt: skip
        assert f"\n{line}\n" in out
    assert "\n  note        LRP is patented" in out
    assert "\n  needs       captum, scikit-learn\n" in shown("methods", "captum.lime")[1]


def test_every_method_can_be_shown(shown: Shown) -> None:
    for identity in METHODS:
        code, out, _ = shown("methods", identity, terminal=True)
        assert code == 0
        assert max(len(line) for line in STYLE.sub("", out).splitlines()) <= 100


def test_an_unknown_method_is_refused(shown: Shown) -> None:
    code, out, err = shown("methods", "integrated_gradient")
    assert (code, out) == (2, "")
    assert "Write integrated_gradients, or another of:" in err


# --- explain ------------------------------------------------------------------------------------------------------

NASTY = "The minister [red]said[/red] :tada: \\[x] the tax \x1b[31m fell"


def test_a_pipe_gets_the_largest_scores(shown: Shown, shelf: Shelf) -> None:
    code, out, err = shown(
        "explain",
        NASTY,
        "--model",
        str(shelf.folder("bert")),
        "--methods",
        "integrated_gradients, saliency,lrp:cp-lrp-2022",
    )
    assert (code, err) == (0, "")
    assert re.findall(r"^(\S+.*?)  \w+  probability [01]\.\d{3}$", out, flags=re.MULTILINE) == [
        "integrated_gradients.v1", "saliency.v1  (no sign: how much, not for or against)", "lrp.v1 cp-lrp-2022",
    ]  # fmt: skip
    assert "\x1b" not in out
    blocks = [block.splitlines()[1:] for block in out.strip().split("\n\n")]
    for block in blocks:
        listed = [re.fullmatch(r" +([+-]?\d\S*)  ([+*-]*) +(\S+)", line) for line in block]
        assert len(listed) == 8
        sizes = []
        for found in listed:
            assert found is not None
            assert set(found[2]) <= ({"*"} if found[1][0].isdecimal() else {found[1][0]})
            assert found[3] in NASTY
            sizes.append(abs(float(found[1])))
        assert sizes == sorted(sizes, reverse=True)
        full = re.fullmatch(r" +\S+  (\S+) +\S+", block[0])
        assert full is not None
        assert len(full[1]) == 10
    assert any("-" in line for line in blocks[0])
    assert not any("-" in line for line in blocks[1])


def test_a_terminal_gets_the_text_coloured_and_escaped(shown: Shown, shelf: Shelf) -> None:
    code, out, _ = shown("explain", NASTY, "--model", str(shelf.folder("bert")), terminal=True)
    assert code == 0
    text = out.splitlines()[1]
    assert STYLE.sub("", text) == NASTY.replace("\x1b", " ")
    shades = re.findall(r"\x1b\[30;48;2;(\d+);\d+;(\d+)m(\w+)", text)
    red, blue = ({word for r, b, word in shades if (int(r) == 255) is side} for side in (True, False))
    assert red
    assert blue
    for line in STYLE.sub("", out).splitlines()[2:]:
        found = re.fullmatch(r" +([+-])\d+\.\d{4}  [+-]{2,} +(\S+)", line)
        if found is not None:
            assert found[2] in (red if found[1] == "+" else blue)


@pytest.mark.parametrize(("colours", "styles"), [(None, set()), (ColorSystem.STANDARD, {"31", "34"})])
def test_where_colours_are_few_letters_have_them(
    shown: Shown, shelf: Shelf, monkeypatch: pytest.MonkeyPatch, colours: ColorSystem | None, styles: set[str]
) -> None:
    """The nearest of 16 colours to a light red is white."""
    monkeypatch.setattr("rich.console.Console._detect_color_system", lambda console: colours)
    _, out, _ = shown("explain", "The party said the bank fell", "--model", str(shelf.folder("bert")), terminal=True)
    text = out.splitlines()[1]
    assert STYLE.sub("", text) == "The party said the bank fell"
    assert set(re.findall(r"\x1b\[(?:1;)?(\d\d)m", text)) == styles


def test_labels_are_chosen(shown: Shown, shelf: Shelf) -> None:
    model = str(shelf.folder("bert"))

    def labels(*arguments: str) -> list[str]:
        code, out, _ = shown("explain", "The party said", "--model", model, *arguments)
        assert code == 0
        return re.findall(r"^\S+\.v1  (\w+)  probability", out, flags=re.MULTILINE)

    assert len(labels()) == 1
    every = labels("--top", "3")
    assert every[:1] == labels()
    assert set(every) == {"business", "politics", "NA"}
    for label in every:
        assert labels("--label", label) == [label]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "nope,lrp:sa-2016"], ["'nope' is no known method", "preset='sa-2016' is no preset of lrp.v1"]),
        (["--methods", "captum.deep_lift"], ["must be one of textcnn for captum.deep_lift.v1"]),
        (["--label", "sport"], ["label='sport' must be one of business, politics, NA"]),
        (["--model", "/nowhere"], ["model='/nowhere' must be a folder with a config.json"]),
    ],
)
def test_what_cannot_be_explained_is_refused(shown: Shown, shelf: Shelf, arguments: list[str], said: list[str]) -> None:
    code, out, _ = shown("explain", "The party said", "--model", str(shelf.folder("bert")), *arguments)
    assert code == 2
    assert all(part in out for part in said)
    assert "probability" not in out


@pytest.mark.parametrize("text", ["", "  ", "... !"])
def test_a_text_without_words_is_refused(shown: Shown, shelf: Shelf, text: str) -> None:
    code, out, _ = shown("explain", text, "--model", str(shelf.folder("bert")))
    assert code == 2
    assert "empty_text" in out or "no_words" in out
