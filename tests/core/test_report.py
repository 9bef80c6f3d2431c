"""The report's page as text: what a browser would parse, what its policy allows, what is said of what was left out."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from importlib import resources

import pytest

from browser.generated import make_report
from lexplain.report.contents import Bounds, Cut, Document, Evidence, Explained, Model
from lexplain.report.rendering import render, write_json

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\u2028'\"{{ 1 }}"
PAGE = resources.files("lexplain.report").joinpath("page")


class Parsed(HTMLParser):
    """Elements by name, and what stands in scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.contents: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag in ("script", "style"):
            self.contents.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in ("script", "style"):
            self.contents[-1] += data
        else:
            self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def read_data(html: str) -> dict:
    (island,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, flags=re.DOTALL)
    return json.loads(island)


def test_no_text_of_the_run_becomes_markup() -> None:
    report = make_report(labels=[HOSTILE, "b"], keywords=2, documents=3)
    plain = Parsed(render(report))
    model = Model(0, HOSTILE, HOSTILE, None, None, None, None, None)
    report = dataclasses.replace(
        report, name=HOSTILE, plan=HOSTILE, facts=[(HOSTILE, HOSTILE)], versions={"lexplain": HOSTILE, HOSTILE: HOSTILE},
        rows_by_status={HOSTILE: 1}, models=[model], cuts=[Cut(HOSTILE, 1, 2)], methods=[dataclasses.replace(report.methods[0], title=HOSTILE)],
        documents=[dataclasses.replace(one, doc_id=HOSTILE, text=HOSTILE + one.text) for one in report.documents],
        keywords=[dataclasses.replace(one, word=HOSTILE) for one in report.keywords],
    )  # fmt: skip
    html = render(report, HOSTILE)
    parsed = Parsed(html)
    assert len(parsed.named("script")) == len(plain.named("script")) == 4
    assert parsed.named("img") == []
    assert not [name for _, attributes in parsed.elements for name in attributes if name.startswith("on")]
    assert parsed.text.count(HOSTILE) >= 9  # as text it is there, whole
    data = read_data(html)
    assert data["documents"][0]["id"] == data["keywords"][0][1] == data["classes"][0]["label"] == HOSTILE


def test_json_holds_nothing_that_html_could_read() -> None:
    value = {"<!--": ["</script>", "&lt;", "\u2028\u2029", "é🎉\x00\\u003c"]}
    text = write_json(value)
    assert not set(text) & set("<>&\u2028\u2029")
    assert json.loads(text) == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json([math.nan])


def test_the_policy_allows_what_stands_in_the_page_and_nothing_else() -> None:
    parsed = Parsed(render(make_report()))
    (policy,) = [one["content"] for one in parsed.named("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    digests = {
        f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in parsed.contents
    }
    island = [one for one in parsed.contents if one.startswith('{"name"')]
    assert len(parsed.contents) == 5
    assert len(island) == 1
    allowed = set(re.findall(r"'sha256-[^']+'", policy))
    # Beyond what stands here: the style that the chart library puts into its charts; the browser tests see that it fits.
    assert len(digests & allowed) == 4
    assert len(allowed - digests) == 1


def test_the_page_names_no_address() -> None:
    own = [path for path in PAGE.iterdir() if path.is_file()]
    assert {path.name for path in own} >= {"page.html", "page.css", "page.js"}
    for path in own:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"src=|url\(|@import|innerHTML|insertAdjacentHTML|document\.write|\beval\b", text), (
            path.name
        )
        assert set(re.findall(r"https?://[^\"' ]*", text)) <= {"http://www.w3.org/2000/svg"}, path.name


def test_libraries_come_with_version_and_licence() -> None:
    vendor = PAGE.joinpath("vendor")
    scripts = [path for path in vendor.iterdir() if path.name.endswith(".js")]
    assert len(scripts) == 2
    html = render(make_report())
    for path in scripts:
        head = path.read_text(encoding="utf-8").split("\n", 1)[0]
        assert re.match(r"// \S+ v\d+\.\d+\.\d+ Copyright", head)
        licence = vendor.joinpath(f"{path.name.split('.')[0]}.LICENSE").read_text(encoding="utf-8")
        assert "Permission to use, copy, modify, and/or distribute this software" in licence
        assert licence.split("\n", 1)[0] in html


def test_what_is_left_out_is_said() -> None:
    report = make_report()
    cuts = [Cut("documents", 500, 12_000), Cut("keywords of sports", 100, 140)]
    text = " ".join(Parsed(render(dataclasses.replace(report, cuts=cuts))).text.split())
    assert "500 of 12,000 documents" in text
    assert "100 of 140 keywords of sports" in text
    assert "not in this file" not in Parsed(render(dataclasses.replace(report, cuts=[]))).text


@pytest.mark.parametrize(
    ("change", "said"), [({"signed": False}, "Unsigned."), ({"accuracy": "keywords"}, "Keyword accuracy.")]
)
def test_scores_that_say_less_are_marked(change: dict, said: str) -> None:
    report = make_report()
    assert said in Parsed(render(dataclasses.replace(report, **change))).text
    assert said not in Parsed(render(report)).text


def test_offsets_become_utf16_units() -> None:
    report = make_report(classes=1, keywords=1, documents=1)
    text = "🎉 ab 𝒱 c"
    spans = [(2, 4), (5, 6), (7, 8)]
    one = Document(
        "d", text, 99, None, 0, spans, [Explained("class 00", 0, 0.5, None, True, [0.123456, math.nan, None])]
    )
    evidence = [Evidence("class 00", "c", 0, 7, 0.1), Evidence("class 00", "c", 0, 90, 0.1)]
    data = read_data(render(dataclasses.replace(report, documents=[one], evidence=evidence)))
    (document,) = data["documents"]
    place, words = 0, []
    for gap, length in zip(document["spans"][::2], document["spans"][1::2], strict=True):
        place += gap
        words.append(text.encode("utf-16-le")[2 * place : 2 * (place + length)].decode("utf-16-le"))
        place += length
    assert words == ["ab", "𝒱", "c"]
    assert document["explained"][0][5] == [0.1235, None, None]
    assert document["cut"]
    assert data["evidence"] == [[0, "c", 0, 9, 0.1]]  # the other lies past what is shown of the text


def test_bounds_keep_the_largest_report_below_ten_megabytes() -> None:
    """What one more keyword, document and score weigh, times as many as the bounds take."""
    bounds = Bounds()

    def weigh(keywords: int, documents: int, words: int) -> tuple[int, int]:
        report = make_report(2, keywords, documents, words=words, evaluated=False)
        scores = sum(len(each.scores) for one in report.documents for each in one.explained)
        return len(render(report).encode()), scores

    empty, _ = weigh(1, 2, 2)
    more_keywords, _ = weigh(51, 2, 2)
    short, few = weigh(1, 40, 20)
    long, many = weigh(1, 40, 120)
    largest = empty + (more_keywords - empty) / 100 * bounds.classes * bounds.keywords
    largest += (short - empty) / 38 * bounds.documents + (long - short) / (many - few) * bounds.scores
    assert largest < 10e6
    assert bounds.scores > 10_000 * 20  # and leave room for long documents and many methods
