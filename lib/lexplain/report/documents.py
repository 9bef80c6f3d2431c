"""The documents of a report: which ones, what they say, and how each of their words scores by every method. Driver only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from lexplain.corpus import where_increments
from lexplain.report.contents import Bounds, Cut, Document, Evidence, Explained, Keyword, Method
from lexplain.report.contestants import Contestant
from lexplain.tables import Tables, quote_list, quote_rows, quote_text

if TYPE_CHECKING:
    from pyspark.sql import Row


class Place(NamedTuple):
    """A document and the split whose model explains it in the report."""

    doc_id: str
    split: int


@dataclass(frozen=True)
class Documents:
    """What is read of documents, see `lexplain.report.contents.Report`."""

    documents: Sequence[Document]
    methods: Sequence[Method]
    evidence: Sequence[Evidence]
    cuts: Sequence[Cut]


def read_documents(
    tables: Tables, run: Mapping[str, Any], contestants: Sequence[Contestant], keywords: Sequence[Keyword],
    labels: Sequence[str], bounds: Bounds,
) -> Documents:  # fmt: skip
    """Choose documents that speak for the keywords, and some that are predicted wrongly, and read their explanations.

    Args:
        tables: Reads `keyword_evidence`, `explanations` and `staged`.
        run: The row of `runs_current`.
        contestants: As `list_contestants` returns them.
        keywords: Those of the report.
        labels: Classes of the report.
        bounds: How many documents, words and scores.

    Note:
        Runs on: driver. Cost: four queries; of each keyword a few occurrences, of the documents chosen all word scores
        up to the bound come to the driver.
    """
    where = (
        f"{where_increments(run['corpus_key'], run['evidence']['increments'])}"
        f" AND explain_key IN ({quote_list(run['explain_keys'])})"
    )
    candidates = _collect_candidates(tables, run, contestants, bounds)
    wrong, right = _collect_predicted(tables, where, labels, bounds.documents)
    places = _deal(candidates, wrong, right, labels, bounds)
    texts = _read_texts(tables, run, places)
    read = list(_read_explained(tables, contestants, places, texts, bounds))
    numbers = {Place(one.doc_id, one.split): number for number, one in enumerate(read)}
    evidence = _read_evidence(tables, run, numbers, keywords)
    made_by = {each.method for one in read for each in one.explained}
    kept = [number for number in range(len(contestants)) if number in made_by or contestants[number].method.own]
    there = tables.spark.sql(
        f"SELECT count(DISTINCT doc_id) AS n FROM {tables.name('explanations')} WHERE {where} AND status = 'explained'"
    ).collect()[0]["n"]
    cuts = [Cut("documents", len(read), int(there))] if there > len(read) else []
    return Documents(
        [_renumber(one, kept) for one in read], [contestants[number].method for number in kept], evidence, cuts
    )


def _renumber(document: Document, kept: Sequence[int]) -> Document:
    return replace(document, explained=[replace(each, method=kept.index(each.method)) for each in document.explained])


# --- which documents ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Candidate:
    place: Place
    words: frozenset[str]
    compared: bool
    score: float


def _collect_candidates(
    tables: Tables, run: Mapping[str, Any], contestants: Sequence[Contestant], bounds: Bounds
) -> dict[str, list[_Candidate]]:
    """Return, by class, documents with the best occurrences of each keyword; also the best among those of an evaluation."""
    others = quote_list([key for one in contestants if not one.method.own for key in one.explain_keys])
    rows = tables.spark.sql(f"""
        WITH compared AS (
            SELECT DISTINCT text_digest FROM {tables.name("explanations")} WHERE explain_key IN ({others}) AND status = 'explained'
        ), evidence AS (
            SELECT e.label, e.word, e.doc_id, e.split, e.score_normalised, c.text_digest IS NOT NULL AS compared
            FROM {tables.name("keyword_evidence")} e
            JOIN {tables.name("keywords_current")} k USING (name, label, word)
            LEFT JOIN compared c ON c.text_digest = e.text_digest
            WHERE name = {quote_text(run["name"])} AND k.rank <= {bounds.keywords}
        )
        SELECT label, doc_id, split, compared, collect_set(word) AS words, sum(score_normalised) AS score FROM (
            SELECT *, row_number() OVER (
                PARTITION BY label, word, compared ORDER BY score_normalised DESC, doc_id, split) AS place FROM evidence)
        WHERE place <= {bounds.evidence} GROUP BY label, doc_id, split, compared""").collect()
    found: dict[str, list[_Candidate]] = {}
    for row in rows:
        one = _Candidate(Place(row["doc_id"], row["split"]), frozenset(row["words"]), row["compared"], row["score"])
        found.setdefault(row["label"], []).append(one)
    return found


def _collect_predicted(
    tables: Tables, where: str, labels: Sequence[str], most: int
) -> tuple[dict[str, list[Place]], dict[str, list[Place]]]:
    """Return, by class, the documents predicted for it with the most confidence: those that are wrong, and the others."""
    rows = tables.spark.sql(f"""
        SELECT label, wrong, doc_id, split FROM (
            SELECT *, row_number() OVER (PARTITION BY label, wrong ORDER BY probability DESC, doc_id) AS place FROM (
                SELECT label, doc_id, NOT coalesce(is_gold, TRUE) AS wrong, max_by(split, struct(probability, -split)) AS split,
                    max(probability) AS probability
                FROM {tables.name("explanations")}
                WHERE {where} AND status = 'explained' AND label_rank = 0 AND label IN ({quote_list(labels)})
                GROUP BY label, doc_id, is_gold))
        WHERE place <= {most} ORDER BY label, place""").collect()
    found: tuple[dict[str, list[Place]], dict[str, list[Place]]] = {}, {}
    for row in rows:
        found[0 if row["wrong"] else 1].setdefault(row["label"], []).append(Place(row["doc_id"], row["split"]))
    return found


def _deal(
    candidates: Mapping[str, Sequence[_Candidate]], wrong: Mapping[str, Sequence[Place]],
    right: Mapping[str, Sequence[Place]], labels: Sequence[str], bounds: Bounds,
) -> list[Place]:  # fmt: skip
    """Return the documents, class by class, each once: evidence for keywords, mistakes, and what else is predicted."""
    share = max(1, bounds.documents // max(1, len(labels)))
    chosen: dict[str, Place] = {}
    for label in labels:
        mistakes = wrong.get(label, [])[: math.floor(share * bounds.wrong_share)]
        mine = [*_cover(candidates.get(label, []), share - len(mistakes)), *mistakes]
        for place in [*mine, *right.get(label, [])][:share]:
            if len(chosen) < bounds.documents:
                chosen.setdefault(place.doc_id, place)
    return list(chosen.values())


def _cover(candidates: Iterable[_Candidate], most: int) -> list[Place]:
    """Return documents that together hold as many keywords as a greedy choice finds; ties by other methods, then score."""
    left, missing, chosen = list(candidates), set[str](), list[Place]()
    documents = set[str]()
    missing.update(*(one.words for one in left))
    while left and len(chosen) < most:
        best = max(left, key=lambda one: (len(one.words & missing), one.compared, one.score, one.place))
        chosen.append(best.place)
        documents.add(best.place.doc_id)
        missing -= best.words
        left = [one for one in left if one.place.doc_id not in documents]
    return chosen


# --- what they say -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Text:
    text: str
    digest: str
    gold: Sequence[str] | None


def _read_texts(tables: Tables, run: Mapping[str, Any], places: Sequence[Place]) -> dict[str, _Text]:
    rows = (
        tables.read("staged")
        .where(
            f"{where_increments(run['corpus_key'], run['evidence']['increments'])}"
            f" AND doc_id IN ({quote_list([place.doc_id for place in places])})"
        )
        .select("doc_id", "text", "text_digest", "labels")
        .collect()
    )
    return {row["doc_id"]: _Text(bytes(row["text"]).decode(), row["text_digest"], row["labels"]) for row in rows}


def _read_explained(
    tables: Tables,
    contestants: Sequence[Contestant],
    places: Sequence[Place],
    texts: Mapping[str, _Text],
    bounds: Bounds,
) -> Iterable[Document]:
    """Yield the documents with their explanations, in their order, up to the bound on scores."""
    if not places:
        return
    wanted = quote_rows(
        (number, texts[place.doc_id].digest, place.split) for number, place in enumerate(places)
    )  # fmt: skip
    methods = quote_rows((number, key) for number, one in enumerate(contestants) for key in one.explain_keys)
    # An evaluation explains a sample under another corpus_key: the text and the model are the same, and so are the scores.
    rows = tables.spark.sql(f"""
        SELECT w.number, m.method, x.label, first(named_struct(
            'probability', x.probability, 'is_gold', x.is_gold, 'converged', x.converged, 'words', transform(
                filter(x.words, word -> word.`end` <= {bounds.characters}),
                word -> named_struct('start', word.start, 'end', word.`end`, 'score', word.score))), true) AS made
        FROM {tables.name("explanations")} x
        JOIN (SELECT * FROM VALUES {methods} AS m(method, explain_key)) m ON x.explain_key = m.explain_key
        JOIN (SELECT * FROM VALUES {wanted} AS w(number, text_digest, split)) w
            ON x.text_digest = w.text_digest AND x.split = w.split
        WHERE x.status = 'explained' GROUP BY w.number, m.method, x.label ORDER BY number, method, label""")
    scores, number, group = 0, -1, list["Row"]()
    for row in rows.toLocalIterator():
        if row["number"] != number:
            if group:
                yield _make_document(places[number], texts, group, bounds)
            number, group = row["number"], []
            if scores > bounds.scores:
                return
        group.append(row)
        scores += len(row["made"]["words"])
    if group:
        yield _make_document(places[number], texts, group, bounds)


def _make_document(place: Place, texts: Mapping[str, _Text], rows: Sequence[Row], bounds: Bounds) -> Document:
    source = texts[place.doc_id]
    by_row = [{(word["start"], word["end"]): word["score"] for word in row["made"]["words"]} for row in rows]
    spans = sorted(set().union(*by_row))
    explained = [
        Explained(
            row["label"], row["method"], row["made"]["probability"], row["made"]["is_gold"], bool(row["made"]["converged"]),
            [scores.get(span) for span in spans],
        )
        for row, scores in zip(rows, by_row, strict=True)
    ]  # fmt: skip
    text = source.text[: bounds.characters]
    return Document(place.doc_id, text, len(source.text), source.gold, place.split, spans, explained)


def _read_evidence(
    tables: Tables, run: Mapping[str, Any], numbers: Mapping[Place, int], keywords: Sequence[Keyword]
) -> list[Evidence]:
    """Return every occurrence of the report's keywords that counts as evidence in the report's documents."""
    if not numbers:
        return []
    wanted = quote_rows((place.doc_id, place.split) for place in numbers)
    known = {(keyword.label, keyword.word) for keyword in keywords}
    rows = tables.spark.sql(f"""
        SELECT label, word, doc_id, split, start, score_normalised FROM {tables.name("keyword_evidence")}
        JOIN (SELECT * FROM VALUES {wanted} AS w(doc_id, split)) USING (doc_id, split)
        WHERE name = {quote_text(run["name"])} ORDER BY label, word, score_normalised DESC, doc_id, start""").collect()
    return [
        Evidence(row["label"], row["word"], numbers[Place(row["doc_id"], row["split"])], row["start"], row["score_normalised"])
        for row in rows
        if (row["label"], row["word"]) in known
    ]  # fmt: skip
