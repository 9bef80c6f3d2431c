"""Quality of keyword lists: in pandas and scikit-learn from the definitions, on lists of a planted corpus."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import SparkSession
from sklearn.feature_extraction.text import TfidfVectorizer

from core.models import CLUES, save_trainable
from lexplain.keyword_quality import QualityFigure, _draw_halvings, measure_quality, measure_tfidf
from lexplain.pipeline import Run
from pandas_oracle import overlap_rank_biased
from spark.planted import make_plan, plant, run_plan, write_json

pytestmark = pytest.mark.slow

Key = tuple[str, str | None, str | None]


@pytest.fixture(scope="module")
def run(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two labels in every third document, three splits, more splits than keywords need."""
    folder = tmp_path_factory.mktemp("quality")
    save_trainable(folder / "base")
    documents = plant(240, seed=5, labels_per_text=(1, 1, 2))
    for number, each in enumerate(documents):  # a word of one class that its model need not look at
        each["text"] += f" {each['labels'][0]}word" * (number % 2)
    write_json(folder / "training.jsonl", documents)
    models = make_plan(folder)["models"] | {"multi_label": True}
    keywords = {"min_df": 1, "theta": 0.3}
    return run_plan(spark, make_plan(folder, models=models, keywords=keywords, mlflow={"enabled": False}))


@pytest.fixture(scope="module")
def measured(run: Run) -> list[QualityFigure]:
    keys = [model.explain_key for model in run.models]
    return measure_quality(run.tables, run.plan, run.corpus, keys, run.record["keyword_key"])


def by_name(figures: list[QualityFigure]) -> dict[Key, QualityFigure]:
    named = {(each.metric, each.subset, each.label): each for each in figures}
    assert len(named) == len(figures)
    return named


def read(run: Run, name: str) -> pd.DataFrame:
    return run.tables.read(name).toArrow().to_pandas()


@pytest.fixture(scope="module")
def documents(run: Run) -> pd.DataFrame:
    """A row a document: words, group, and the labels that it stands for by subset."""
    explained = read(run, "explanations").query("status == 'explained' and probability > 0.5")
    rows = []
    for doc_id, mine in explained.groupby("doc_id"):
        counts = mine.groupby("label").split.nunique()
        rows.append((doc_id, int(mine.text_digest.iloc[0][-8:], 16) % 20, set(counts[counts >= 0.3 * 3].index)))
    found = pd.DataFrame(rows, columns=["doc_id", "group", "P"])
    found = found.merge(read(run, "staged")[["doc_id", "labels", "words"]], on="doc_id")
    found["TL"] = found.labels.map(set)
    found["TP"] = [gold & predicted for gold, predicted in zip(found.TL, found.P, strict=True)]
    found["words"] = found.words.map(set)
    return found


def compute_coverage(documents: pd.DataFrame, lists: dict[str, set[str]], subset: str) -> dict[Key, float]:
    own: dict[str, list[float]] = {label: [] for label in lists}
    cross: dict[str, list[float]] = {label: [] for label in lists}
    micro = []
    for document in documents.itertuples():
        labels = getattr(document, subset) & lists.keys()
        if not labels:
            continue
        micro.append(
            sum(len(lists[label] & document.words) for label in labels) / sum(len(lists[label]) for label in labels)
        )
        for label, words in lists.items():
            covered = len(words & document.words) / len(words)
            if label in labels:
                own[label].append(covered)
            else:
                cross[label] += [covered] * len(labels)
    found: dict[Key, float] = {("coverage_micro", subset, None): np.mean(micro)}
    for metric, values in (("coverage", own), ("cross_coverage", cross)):
        means = {label: np.mean(each) for label, each in values.items()}
        found |= {(metric, subset, label): mean for label, mean in means.items()}
        found[metric, subset, None] = np.mean(list(means.values()))
    for label in (*lists, None):
        coverage, crossed = found["coverage", subset, label], found["cross_coverage", subset, label]
        found["coverage_distinctiveness", subset, label] = (coverage - crossed) / coverage
    return found


def read_sets(run: Run) -> dict[str, set[str]]:
    kept = read(run, "keywords").query("kept and rank <= 100")
    return {str(label): set(words) for label, words in kept.groupby("label").word}


@pytest.mark.parametrize("subset", ["TP", "TL", "P"])
def test_coverage_follows_the_definition(
    run: Run, measured: list[QualityFigure], documents: pd.DataFrame, subset: str
) -> None:
    lists, named = read_sets(run), by_name(measured)
    assert set(lists) == set(CLUES)
    right = compute_coverage(documents, lists, subset)
    without = [compute_coverage(documents[documents.group != group], lists, subset) for group in range(20)]
    assert {key for key in named if key[1] == subset} == right.keys()
    for key, value in right.items():
        figure, left_out = named[key], np.array([each[key] for each in without])
        width = 2.093 * np.sqrt(19 / 20 * ((left_out - left_out.mean()) ** 2).sum())
        assert figure.value == pytest.approx(value)
        assert (figure.ci_low, figure.ci_high) == (pytest.approx(value - width), pytest.approx(value + width))
    stands = documents[subset].map(lambda labels: len(labels & lists.keys()) > 0)
    assert named["coverage_micro", subset, None].n_documents == stands.sum()


def test_a_word_of_two_lists_is_not_distinct(run: Run, measured: list[QualityFigure]) -> None:
    lists, named = read_sets(run), by_name(measured)
    for label, words in lists.items():
        others = set().union(*(each for other, each in lists.items() if other != label))
        assert named["keyword_distinctiveness", None, label].value == pytest.approx(len(words - others) / len(words))
    mean = np.mean([named["keyword_distinctiveness", None, label].value for label in lists])
    assert named["keyword_distinctiveness", None, None].value == pytest.approx(mean)


@pytest.mark.parametrize(
    ("metric", "column", "count"), [("halves_of_documents", "doc_group", 20), ("halves_of_splits", "split", 3)]
)
def test_halves_agree_as_their_lists_do(
    run: Run, measured: list[QualityFigure], metric: str, column: str, count: int
) -> None:
    sums, keywords = read(run, "word_sums").dropna(subset="word"), read(run, "keywords")
    barred = keywords[keywords.drop_reason.isin(["document_frequency", "no_letter", "max_classes"])]
    barred_pairs = set(zip(barred.label, barred.word, strict=True))
    for score in ("score_sum", "n_occurrences"):
        sums[score] = sums[score].astype(float)
    found: dict[str, list[float]] = {label: [] for label in CLUES}
    for sides in _draw_halvings(count):
        halves = []
        for side in (0, 1):
            mine = sums[sums[column].map(lambda number, side=side, sides=sides: sides[number] == side)]
            splits = sides.count(side) if column == "split" else 3
            grouped = mine.groupby(["label", "word"]).agg(
                splits=("split", "nunique"), score=("score_sum", "sum"), n=("n_occurrences", "sum")
            )
            grouped = (
                grouped[grouped.splits >= 0.3 * splits].assign(mean=lambda rows: rows.score / rows.n).reset_index()
            )
            grouped = grouped[[pair not in barred_pairs for pair in zip(grouped.label, grouped.word, strict=True)]]
            ranked = grouped.sort_values(["label", "mean", "word"], ascending=[True, False, True])
            halves.append({label: list(words)[:100] for label, words in ranked.groupby("label").word})
        for label in CLUES:
            found[label].append(overlap_rank_biased(halves[0].get(label, []), halves[1].get(label, []), 0.9))
    named = by_name(measured)
    for label, values in found.items():
        figure = named[metric, None, label]
        assert (figure.value, figure.ci_low, figure.ci_high) == pytest.approx(
            (np.mean(values), min(values), max(values)), abs=1e-9
        )
    assert 0 < named[f"{metric}_jaccard", None, None].value <= 1


def test_halvings_are_even_and_differ() -> None:
    for count in (2, 3, 7, 20):
        found = _draw_halvings(count)
        assert len({tuple(sides) for sides in found}) == len(found) == {2: 1, 3: 3}.get(count, 5)
        assert all(abs(sides.count(0) - sides.count(1)) <= 1 and sides[0] == 0 for sides in found)


def test_tfidf_lists_are_those_of_scikit_learn(run: Run, documents: pd.DataFrame) -> None:
    """Lists are not kept, so they are told by their figures."""
    staged = read(run, "staged")
    vectorizer = TfidfVectorizer(analyzer=lambda words: sorted(set(words)), binary=True, min_df=10)
    classes = staged.labels.explode().value_counts()
    vectorizer.set_params(max_df=float(0.5 * classes.max() / len(staged)))
    weights = vectorizer.fit_transform(staged.words)
    names = vectorizer.get_feature_names_out()
    lists = {}
    for label in classes.index:
        mean = np.asarray(weights[[label in labels for labels in staged.labels]].mean(0))[0]
        order = sorted((number for number in range(len(names)) if mean[number] > 0), key=lambda number: -mean[number])
        lists[label] = {names[number] for number in order[:100]}
    keys = [model.explain_key for model in run.models]
    named = by_name(measure_tfidf(run.tables, run.plan, run.corpus, keys))
    for label, words in lists.items():
        others = set().union(*(each for other, each in lists.items() if other != label))
        assert named["keyword_distinctiveness", None, label].value == pytest.approx(len(words - others) / len(words))
    for key, value in compute_coverage(documents, lists, "TP").items():
        assert named[key].value == pytest.approx(value), key


def test_lists_without_a_word_have_no_figures(spark: SparkSession, run: Run) -> None:
    keys = [model.explain_key for model in run.models]
    assert measure_quality(run.tables, run.plan, run.corpus, keys, "no such table") == []
