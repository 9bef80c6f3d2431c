"""The report's page in a real browser: sorting, filtering, switching, keys, hostile words, accessibility, size and speed."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from browser.conftest import OpenReport
from browser.generated import make_report
from lexplain.report.contents import Document, Evidence, Explained, Keyword, Report
from lexplain.report.rendering import render

SECONDS_TO_INTERACTIVE = 3.0
MEGABYTES = 10.0


def column(page: Page, number: int, table: str = "#keyword-table") -> list[str]:
    return page.locator(f"{table} tbody tr:not(.places) > :nth-child({number})").all_inner_texts()


def numbers(texts: list[str]) -> list[float]:
    return [float(text) for text in texts]


# --- keywords -------------------------------------------------------------------------------------------------------


def test_columns_sort_both_ways_and_say_so(open_report: OpenReport) -> None:
    page = open_report(make_report())
    scores = numbers(column(page, 4))
    assert len(scores) == 48
    assert scores == sorted(scores, reverse=True)
    heads = page.locator("#keyword-table thead th")
    assert heads.evaluate_all("heads => heads.map(head => head.getAttribute('aria-sort'))") == [
        "none", "none", "none", "descending", *["none"] * 5
    ]  # fmt: skip
    page.get_by_role("button", name="Mean score").click()
    assert numbers(column(page, 4)) == sorted(scores)
    assert heads.nth(3).get_attribute("aria-sort") == "ascending"
    page.get_by_role("button", name="Word", exact=True).click()
    words = column(page, 1)
    assert words == sorted(words)
    documents = page.locator("#keyword-table").get_by_role("button", name="Documents")
    documents.focus()
    page.keyboard.press("Enter")  # the keyboard sorts as the mouse does
    assert numbers(column(page, 8)) == sorted(numbers(column(page, 8)), reverse=True)


def test_unknown_values_stand_last_both_ways(open_report: OpenReport) -> None:
    page = open_report(make_report(keywords=40))
    button = page.get_by_role("button", name="95 % interval")
    page.get_by_role("button", name="Show all 160 rows").click()
    for _ in range(2):
        button.click()
        texts = column(page, 5)
        blank = [text.strip() == "–" for text in texts]
        assert any(blank)
        assert blank == sorted(blank)


def test_filters_narrow_the_table_and_count(open_report: OpenReport) -> None:
    report = make_report()
    page = open_report(report)
    wanted = report.keywords[3].word
    expected = [one.word for one in report.keywords if wanted[:3] in one.word]
    page.get_by_label("Find a word", exact=True).fill(wanted[:3].upper())
    assert sorted(column(page, 1)) == sorted(expected)
    expect(page.locator("#keyword-count")).to_have_text(f"{len(expected)} of 48 keywords")
    page.get_by_label("Find a word", exact=True).fill("")
    page.get_by_label("Selected by").select_option("5 or more of 5")
    always = [one.word for one in report.keywords if one.frequency == 1]
    assert 0 < len(always) < 48
    assert sorted(column(page, 1)) == sorted(always)
    page.get_by_label("Interval above 0").check()
    sure = [one.word for one in report.keywords if one.frequency == 1 and one.low is not None and one.low > 0]
    assert sorted(column(page, 1)) == sorted(sure)


def test_a_class_is_chosen_for_all_parts(open_report: OpenReport) -> None:
    page = open_report(make_report())
    button = page.locator("#class-list").get_by_role("button", name="class 02")
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    assert set(column(page, 2)) == {"class 02"}
    assert page.locator(".card.current h3").inner_text() == "class 02"
    expect(page.locator("#document-count")).to_contain_text("class 02")
    expect(page.locator("#leaderboard figcaption").first).to_contain_text("class 02")
    assert page.locator("#scatter [role=img]").get_attribute("aria-label").startswith("Keywords of class 02")
    page.locator("#class-list").get_by_role("button", name="All classes").click()
    assert len(set(column(page, 2))) == 4


def test_a_word_opens_the_places_that_its_score_comes_from(open_report: OpenReport) -> None:
    report = make_report()
    page = open_report(report)
    keyword = next(
        one for one in report.keywords if any((e.label, e.word) == (one.label, one.word) for e in report.evidence)
    )
    places = [one for one in report.evidence if (one.label, one.word) == (keyword.label, keyword.word)]
    row = page.locator("#keyword-table").get_by_role("button", name=keyword.word, exact=True)
    row.click()
    assert row.get_attribute("aria-expanded") == "true"
    assert page.locator("tr.places mark").all_inner_texts() == [keyword.word] * min(8, len(places))
    first = report.documents[places[0].document]
    page.locator("tr.places li button").first.click()
    assert page.locator("#document h3").inner_text() == first.doc_id
    marked = page.locator("#document .keyword").all_inner_texts()
    assert marked
    assert set(marked) == {keyword.word}
    row.click()
    assert page.locator("tr.places").count() == 0


def test_a_card_finds_its_word_behind_any_filter(open_report: OpenReport) -> None:
    page = open_report(make_report())
    page.get_by_label("Find a word", exact=True).fill("no such word")
    page.locator("#class-list").get_by_role("button", name="class 02").click()
    card = page.locator(".card").first
    word = card.locator("li bdi").first.inner_text()
    card.locator("li button").first.click()
    assert page.locator("#keyword-table [aria-expanded=true]").inner_text() == word
    page.get_by_label("Words a class").select_option("all")
    assert card.locator("li").count() == 12
    page.get_by_label("Find a word in all classes").fill(word)
    assert card.locator("li bdi").all_inner_texts() == [word]


# --- documents ------------------------------------------------------------------------------------------------------


def shades(page: Page) -> list[str]:
    return page.locator("#document .text [data-word]").evaluate_all("words => words.map(word => word.className)")


def test_label_and_method_switch_the_colours(open_report: OpenReport) -> None:
    report = make_report()
    page = open_report(report)
    one = report.documents[0]
    labels = list(dict.fromkeys(each.label for each in one.explained))
    assert len(labels) == 2
    seen = {}
    for label in labels:
        page.locator("#document").get_by_role("button", name=label).click()
        for method in ("integrated_gradients", "saliency"):
            button = page.locator("#document").get_by_role("button", name=method)
            button.click()
            assert button.get_attribute("aria-pressed") == "true"
            seen[label, method] = shades(page)
            families = {re.sub(r"-\d", "", shade) for shade in seen[label, method] if shade}
            assert families == ({"size"} if method == "saliency" else {"for", "against"})
    assert len({tuple(each) for each in seen.values()}) == 4
    expect(page.locator("#document .legend")).to_contain_text("no sign")


def test_shades_follow_the_scores(open_report: OpenReport) -> None:
    report = make_report()
    page = open_report(report)
    scores = report.documents[0].explained[0].scores
    largest = max(map(abs, scores))
    steps = (0.05, 0.15, 0.3, 0.5, 0.75)
    expected = []
    for score in scores:
        strength = sum(abs(score) / largest >= step for step in steps)
        expected.append(f"{'against' if score < 0 else 'for'}-{strength}" if strength else "")
    assert shades(page) == expected
    style = page.locator("#document .text .for-5").first.evaluate("word => getComputedStyle(word).textDecorationStyle")
    against = page.locator("#document .text [class^=against-2]").first
    assert (style, against.evaluate("word => getComputedStyle(word).textDecorationStyle")) == ("solid", "dashed")


def test_pointer_and_arrow_keys_show_scores(open_report: OpenReport) -> None:
    report = make_report()
    page = open_report(report)
    one = report.documents[0]
    page.locator("#document .text [data-word='5']").hover()
    score = one.explained[0].scores[5]
    start, end = one.spans[5]
    tip = page.locator("#tip")
    expect(tip).to_be_visible()
    assert tip.inner_text().split() == [one.text[start:end], f"{'+' if score > 0 else '−'}{abs(score):.3f}"]
    page.locator("#document .text").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    start, end = one.spans[2]
    assert tip.inner_text().startswith(one.text[start:end])
    assert page.locator("#document .at").inner_text() == one.text[start:end]
    assert page.locator("#document [role=status]").inner_text() == tip.inner_text()  # a screen reader hears it
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()


def test_documents_are_found_and_walked_by_keys(open_report: OpenReport) -> None:
    report = make_report()
    page = open_report(report)
    page.get_by_role("listbox").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert page.locator("#document h3").inner_text() == "doc-2"
    assert page.get_by_role("listbox").get_attribute("aria-activedescendant") == "option-2"
    wrong = [one.doc_id for one in report.documents if one.explained[0].label not in one.gold]
    page.locator("#document-controls").get_by_label("Show").select_option("predicted otherwise")
    assert page.locator("[role=option] .name bdi").all_inner_texts() == wrong
    page.locator("#document-controls").get_by_label("Show").select_option("all")
    word = report.documents[7].text.split()[0]
    expected = [one.doc_id for one in report.documents if word in one.text]
    page.get_by_label("Find in documents").fill(word)
    expect(page.locator("#document-count")).to_have_text(f"{len(expected)} of 24 documents")
    page.get_by_label("Find in documents").fill("no such text")
    expect(page.locator("#document")).to_have_text("No document fits.")


def test_offsets_count_code_points(open_report: OpenReport) -> None:
    """UTF-16 counts an emoji twice: every word after the first one was marked one place too far left."""
    report = make_report(classes=1, keywords=2, documents=1)
    text = "🎉🎉 déjà 𝒱ector end tail"
    spans = [(3, 7), (8, 14), (15, 18)]
    one = Document(
        "emoji", text, len(text), None, 0, spans, [Explained("class 00", 0, 0.9, None, True, [0.5, -0.5, 0.1])]
    )
    evidence = [Evidence("class 00", report.keywords[0].word, 0, 8, 0.5)]
    page = open_report(dataclasses.replace(report, documents=[one], evidence=evidence))
    assert page.locator("#document .text [data-word]").all_inner_texts() == ["déjà", "𝒱ector", "end"]
    assert page.locator("#document .text .unread").inner_text() == " tail"
    page.locator("#keyword-table").get_by_role("button", name=report.keywords[0].word, exact=True).click()
    assert page.locator("tr.places mark").inner_text() == "𝒱ector"


# --- hostile words --------------------------------------------------------------------------------------------------

HOSTILE = (
    "<script>alert(1)</script>", "</script><script>alert(2)</script>", "<!--<script>", "<img src=x onerror=alert(3)>",
    "]]>", "javascript:alert(4)", "{{ 7 * 7 }}", "&lt;b&gt;", "\u2028\u2029", "\u202eevil", "__proto__", "constructor", "a\0b\x1b[31m",
)  # fmt: skip


def make_hostile() -> Report:
    report = make_report(labels=HOSTILE, keywords=3, documents=len(HOSTILE))
    keywords = [
        dataclasses.replace(one, word=f"{HOSTILE[number % len(HOSTILE)]} {number}")
        for number, one in enumerate(report.keywords)
    ]
    documents = []
    for number, one in enumerate(report.documents):
        said = HOSTILE[number]
        explained = [dataclasses.replace(each, scores=[0.5, *each.scores]) for each in one.explained]
        moved = [(start + len(said) + 1, end + len(said) + 1) for start, end in one.spans]
        documents.append(
            dataclasses.replace(
                one, doc_id=said, text=f"{said} {one.text}", spans=[(0, len(said)), *moved], explained=explained, gold=[said],
                n_characters=len(said) + 1 + len(one.text),
            )
        )  # fmt: skip
    evidence = [Evidence(one.label, one.word, HOSTILE.index(one.label), 0, 0.5) for one in keywords]
    return dataclasses.replace(
        report, name=HOSTILE[0], keywords=keywords, documents=documents, evidence=evidence, plan=HOSTILE[1],
        facts=[(HOSTILE[3], HOSTILE[1])], versions={HOSTILE[0]: HOSTILE[1]},
    )  # fmt: skip


def test_markup_of_the_corpus_is_text(open_report: OpenReport) -> None:
    """No word, label, id or setting becomes an element, runs, or changes what stands beside it."""
    report = make_hostile()
    page = open_report(report, viewport={"width": 1280, "height": 2000})
    assert page.title() == f"{HOSTILE[0]} – lexplain"
    assert page.locator("h1").inner_text() == HOSTILE[0]
    assert page.locator("img").count() == 0
    own = page.locator("script").count()
    page.get_by_label("Words a class").select_option("all")
    buttons = page.locator("#keyword-table button.word")
    shown = set(
        page.locator("#keyword-table button.word bdi").evaluate_all("words => words.map(word => word.textContent)")
    )
    assert shown == {one.word for one in report.keywords}
    for number in range(buttons.count()):
        buttons.nth(number).click()
    assert page.locator("tr.places li").count() == len(report.keywords)
    for option in page.locator("[role=option]").all():
        option.click()
        page.locator("#document .text [data-word='0']").hover()
    for button in page.locator("#class-list button").all():
        button.click()
    assert page.locator("script").count() == own == 4
    assert page.locator("b, svg script, iframe, object, link").count() == 0


def test_the_policy_lets_nothing_else_run(browser: Browser, tmp_path: Path) -> None:
    """If a word did become an element, the browser would still refuse its script, its style and its request."""
    html = render(make_report())
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', html)[1].replace("&#39;", "'")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    path = tmp_path / "report.html"
    path.write_text(html, encoding="utf-8")
    page = browser.new_page()
    page.goto(path.as_uri())
    outcome = page.evaluate("""async () => {
        const refused = [];
        document.addEventListener("securitypolicyviolation", (event) => refused.push(event.effectiveDirective));
        const script = document.createElement("script");
        script.textContent = "window.ran = true";
        const image = new Image();
        image.src = "data:image/gif;base64,R0lGODlhAQABAAAAACw=";
        document.body.append(script, image);
        await fetch("file:///etc/hostname").catch(() => 0);
        await new Promise((done) => setTimeout(done, 200));
        return { ran: window.ran === true, refused };
    }""")
    assert not outcome["ran"]
    assert {"script-src-elem", "img-src", "connect-src"} <= set(outcome["refused"])
    page.close()


# --- accessibility --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_no_barrier_is_found(open_report: OpenReport, theme: str, width: int) -> None:
    """axe's rules, contrast among them, with everything open that opens."""
    page = open_report(make_report(evaluated=True), color_scheme=theme, viewport={"width": width, "height": 900})
    for number in range(2):
        page.locator("#keyword-table button.word").nth(number).click()
    for details in page.locator("details").all():
        details.evaluate("details => details.open = true")
    for method in ("integrated_gradients", "saliency"):
        page.locator("#document").get_by_role("button", name=method).click()
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()


def test_the_theme_is_chosen_by_hand(open_report: OpenReport) -> None:
    page = open_report(make_report(), color_scheme="light")

    def background() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light = background()
    page.get_by_label("Theme").select_option("dark")
    dark = background()
    page.get_by_label("Theme").select_option("light")
    assert light == background() != dark


def test_nothing_is_wider_than_a_phone(open_report: OpenReport) -> None:
    page = open_report(make_report(labels=["a", "b" * 60, "c d " * 20, "x"]), viewport={"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_print_leaves_out_what_paper_cannot_do(open_report: OpenReport) -> None:
    page = open_report(make_report(), color_scheme="dark")
    page.emulate_media(media="print")
    for selector in (".top", ".side", "#keyword-controls", "#document-list"):
        expect(page.locator(selector)).to_be_hidden()
    for selector in ("h1", "#keyword-table table", "#scatter svg", "#document .text", "#run"):
        expect(page.locator(selector).first).to_be_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.querySelector('h1')).color") == "rgb(28, 31, 35)"


# --- parts that a run may lack --------------------------------------------------------------------------------------


def test_a_run_without_evaluation_says_how_to_make_one(open_report: OpenReport) -> None:
    page = open_report(render(make_report(evaluated=False), "my plan.yaml"))
    for part in ("#halves", "#leaderboard"):
        assert "lexplain evaluate 'my plan.yaml' --methods integrated_gradients" in page.locator(part).inner_text()
    assert page.locator("#leaderboard svg, #halves svg").count() == 0


def test_an_unsigned_run_is_marked(open_report: OpenReport) -> None:
    page = open_report(make_report(signed=False))
    expect(page.locator(".hero .warn").first).to_contain_text("Unsigned.")
    assert open_report(make_report()).locator(".hero .warn:visible").count() == 0


def test_a_class_without_keywords_says_why(open_report: OpenReport) -> None:
    report = make_report()
    bare = [one for one in report.keywords if one.label != "class 01"]
    page = open_report(dataclasses.replace(report, keywords=bare))
    expect(page.locator(".card").nth(1)).to_contain_text(
        "words were dropped, 40 by selection_frequency, 7 by document_frequency"
    )
    empty = open_report(
        dataclasses.replace(report, keywords=[], documents=[], evidence=[], evaluation=None, phrases=[])
    )
    expect(empty.locator("#document")).to_have_text("No document of the run is explained.")


def test_keyphrases_stand_below_the_keywords(open_report: OpenReport) -> None:
    phrases = [Keyword("class 00", "prime minister", 1, 0.5, 0.4, 0.6, 1.0, 5, 7, None)]
    page = open_report(dataclasses.replace(make_report(), phrases=phrases))
    assert column(page, 1, "#phrases") == ["prime minister"]
    assert open_report(make_report()).locator("#phrases *").count() == 0


# --- size and speed -------------------------------------------------------------------------------------------------


def test_a_large_report_is_small_and_quick(open_report: OpenReport) -> None:
    """20 classes of 100 keywords, 500 documents of 200 words by up to four methods."""
    html = render(make_report(20, 100, 500, words=200))
    assert len(html.encode()) / 1e6 < MEGABYTES
    page = open_report(html)
    assert float(page.locator("html").get_attribute("data-ready")) / 1000 < SECONDS_TO_INTERACTIVE
    assert page.locator(".card").count() == 20
    page.get_by_role("button", name="Show all 2,000 rows").click()
    assert len(column(page, 1)) == 2000
