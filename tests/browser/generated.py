"""Reports of any size, with the shape of real ones: what the page is tested on where tables would take hours to fill."""

from __future__ import annotations

import random
from collections.abc import Sequence

from lexplain.report.contents import (
    ClassSummary,
    Cut,
    Document,
    Evaluation,
    Evidence,
    Explained,
    Figure,
    Keyword,
    Method,
    Model,
    Report,
)

LETTERS = "aeiou", "bdfgklmnprstv"
METHODS = (
    Method("integrated_gradients", signed=True, own=True),
    Method("lrp:attnlrp-2024", signed=True, own=False),
    Method("saliency", signed=False, own=False),
    Method("random", signed=True, own=False),
)
PROTOCOLS = {
    "marc-2023": ("comprehensiveness", "sufficiency"),
    "eraser-2020": ("comprehensiveness", "sufficiency"),
    "dig-2021-log-odds": ("log_odds",),
}


def make_words(count: int, draw: random.Random) -> list[str]:
    """Return so many different words that can be spoken."""
    words: dict[str, None] = {}
    while len(words) < count:
        syllables = draw.randint(2, 4)
        words["".join(draw.choice(LETTERS[1]) + draw.choice(LETTERS[0]) for _ in range(syllables))] = None
    return list(words)


def make_report(
    classes: int = 4, keywords: int = 12, documents: int = 24, *, words: int = 120, splits: int = 5,
    labels: Sequence[str] | None = None, evaluated: bool = True, signed: bool = True, seed: int = 1,
) -> Report:  # fmt: skip
    """Return a report of so many classes, keywords a class and documents of about so many words."""
    draw = random.Random(seed)
    names = list(labels) if labels is not None else [f"class {number:02d}" for number in range(classes)]
    vocabulary = make_words(classes * keywords + 400, draw)
    own = {name: vocabulary[number * keywords : (number + 1) * keywords] for number, name in enumerate(names)}
    filler = vocabulary[classes * keywords :]
    rows = [_make_keyword(name, word, rank, splits, draw) for name in names for rank, word in enumerate(own[name], 1)]
    made = [_make_document(number, names, own, filler, words, splits, draw) for number in range(documents)]
    methods = METHODS if signed else (Method("lafa", signed=False, own=True), *METHODS[1:])
    return Report(
        name="generated", signed=signed, accuracy="document", n_splits=splits,
        facts=[("Corpus", "generated"), ("Cost", "16.0 gradient evaluations an explanation")],
        rows_by_status={"explained": documents * splits, "no_label": 3, "settled": 0, "rejected": 1},
        plan="name: generated\n", versions={"lexplain": "0.1.0", "python": "3.11"}, mlflow_run_id=None,
        models=[Model(split, f"models/{split}", f"{split:064x}", 0.9, 0.91, 600, 300, 60.0) for split in range(splits)],
        classes=[ClassSummary(name, keywords, {"selection_frequency": 40, "document_frequency": 7}, 0.9) for name in names],
        keywords=rows, phrases=[], documents=made, methods=methods,
        evidence=[
            Evidence(name, one.text[start:stop], place, start, 0.4)
            for place, one in enumerate(made)
            for name in names
            for start, stop in one.spans
            if one.text[start:stop] in own[name] and one.explained[0].label == name
        ],
        evaluation=_make_evaluation(names, methods, draw) if evaluated else None,
        cuts=[Cut("documents", documents, 10 * documents)],
    )  # fmt: skip


def _make_keyword(name: str, word: str, rank: int, splits: int, draw: random.Random) -> Keyword:
    score = 0.7 / rank**0.35 * draw.uniform(0.95, 1.05)
    width = draw.uniform(0.02, 0.35)
    low, high = (None, None) if draw.random() < 0.1 else (score - width, score + width)
    return Keyword(
        name, word, rank, score, low, high, draw.randint((splits + 1) // 2, splits) / splits, draw.randint(3, 60),
        draw.randint(5, 80), draw.uniform(-0.2, 1.0),
    )  # fmt: skip


def _make_document(
    number: int, names: Sequence[str], own: dict[str, list[str]], filler: Sequence[str], words: int, splits: int,
    draw: random.Random,
) -> Document:  # fmt: skip
    label = names[number % len(names)]
    other = draw.choice(names)
    said = [draw.choice(own[label] if draw.random() < 0.12 else filler) for _ in range(words)]
    spans, place = [], 0
    for word in said:
        spans.append((place, place + len(word)))
        place += len(word) + 1
    explained = [
        Explained(each, method, 0.9 if each == label else 0.3, each == label, True, [
            (abs if method == 2 else float)(draw.gauss(0.5, 0.2) if word in own[each] else draw.gauss(0, 0.06)) for word in said
        ])
        for each in dict.fromkeys((label, other))
        for method in range(len(METHODS) if number % 2 == 0 else 1)
    ]  # fmt: skip
    text = " ".join(said)
    gold = [other if number % 9 == 0 else label]
    return Document(f"doc-{number}", text, len(text) + 40 * (number % 3 == 0), gold, number % splits, spans, explained)


def _make_evaluation(names: Sequence[str], methods: Sequence[Method], draw: random.Random) -> Evaluation:
    faithfulness, quality = [], []
    for method in [*(one.title for one in methods), "gradient_x_input"]:
        for label in (None, *names):
            for protocol, metrics in PROTOCOLS.items():
                for metric in metrics:
                    value = draw.uniform(-0.1, 0.8)
                    better = None if method == "random" else draw.random() < 0.7
                    faithfulness.append(
                        Figure(method, (metric, protocol), label, value, value - 0.05, value + 0.05, 200, better)
                    )
            for metric in ("coverage", "cross_coverage", "coverage_distinctiveness"):
                value = draw.uniform(0.1, 0.6)
                quality.append(Figure(method, (metric, "TP"), label, value, value - 0.02, value + 0.02, 200))
            for metric in ("halves_of_documents", "halves_of_splits"):
                for suffix in ("", "_jaccard"):
                    value = draw.uniform(0.4, 0.8)
                    quality.append(
                        Figure(method, (metric + suffix, None), label, value, value - 0.1, value + 0.1, None)
                    )
    return Evaluation("2026-01-31 12:00", methods[0].title, faithfulness, quality)
