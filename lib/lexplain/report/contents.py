"""What a report holds: plain values, read by `lexplain.report.reading` and written by `lexplain.report.rendering`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bounds:
    """How much of a run a report takes; what is left out is counted and said.

    Attributes:
        classes: Classes, those with most keywords.
        keywords: Keywords a class, by rank; keyphrases too.
        documents: Documents in all, dealt evenly to the classes.
        wrong_share: Largest share of a class's documents that are predicted for it and are not gold.
        evidence: Occurrences of a keyword, best first, among which its documents are chosen.
        characters: Of a document's text, from its start.
        scores: Word scores in all documents, labels and methods together; documents past it are left out.
    """

    classes: int = 50
    keywords: int = 100
    documents: int = 500
    wrong_share: float = 0.2
    evidence: int = 5
    characters: int = 4000
    scores: int = 500_000


@dataclass(frozen=True)
class Cut:
    """Something of which the report shows a part.

    Attributes:
        what: Plural noun, as `keywords of politics`.
        shown: How many of them are in the report.
        there: How many there are.
    """

    what: str
    shown: int
    there: int


@dataclass(frozen=True)
class Keyword:
    """A kept word, or phrase, of a class; see the table `keywords` for what each number is."""

    label: str
    word: str
    rank: int
    score: float
    low: float | None
    high: float | None
    frequency: float
    n_evidence: int
    document_frequency: int
    distinctiveness: float | None


@dataclass(frozen=True)
class ClassSummary:
    """A class of the models.

    Attributes:
        label: Its name.
        n_keywords: Words kept, in the report or not.
        dropped: Words not kept, by the rule they broke.
        f1: Mean over the models, on the documents held out; None for models the user brought.
    """

    label: str
    n_keywords: int
    dropped: Mapping[str, int]
    f1: float | None


@dataclass(frozen=True)
class Method:
    """An attribution method by which documents of the report are explained.

    Attributes:
        title: Name, or name and preset.
        signed: Whether scores tell for from against; None: not known.
        own: It is the plan's own method, which the keywords come from.
    """

    title: str
    signed: bool | None
    own: bool


@dataclass(frozen=True)
class Explained:
    """One explanation of a document.

    Attributes:
        label: What is explained.
        method: Its number in `Report.methods`.
        probability: Of the label.
        is_gold: The label is gold; None where there are no gold labels.
        converged: The method's own stopping rule was met.
        scores: One a span of the document; None where the method gave that word none.
    """

    label: str
    method: int
    probability: float | None
    is_gold: bool | None
    converged: bool
    scores: Sequence[float | None]


@dataclass(frozen=True)
class Document:
    """A document with its explanations, all by the model of one split.

    Attributes:
        doc_id: Its id.
        text: From its start, at most `Bounds.characters`.
        n_characters: Of the whole text, code points.
        gold: Gold labels; None where there are none.
        split: Whose model explains it.
        spans: Start and end of each word that was read, code points of `text`, in the order of the text.
        explained: By label and method.
    """

    doc_id: str
    text: str
    n_characters: int
    gold: Sequence[str] | None
    split: int
    spans: Sequence[tuple[int, int]]
    explained: Sequence[Explained]


@dataclass(frozen=True)
class Evidence:
    """An occurrence that a keyword's score is the mean of, in a document of the report.

    Attributes:
        label: Class of the keyword.
        word: The keyword.
        document: Number in `Report.documents`.
        start: Code point of the text where it begins.
        score: Of the occurrence, divided by the document's norm.
    """

    label: str
    word: str
    document: int
    start: int
    score: float


@dataclass(frozen=True)
class Figure:
    """A figure of an evaluation, of `faithfulness` or of `keyword_quality`.

    Attributes:
        method: As it was asked for.
        kind: Metric and protocol, or metric and subset.
        label: None for all labels, or the mean over classes.
        value: The figure.
        low: 95 % interval; of halves the smallest of five.
        high: Its upper end; of halves the largest.
        n_documents: It is the mean of; None where it is of lists alone.
        beats_random: Better than random scores on the same documents, beyond chance; None where that is no question.
    """

    method: str
    kind: tuple[str, str | None]
    label: str | None
    value: float
    low: float | None
    high: float | None
    n_documents: int | None
    beats_random: bool | None = None


@dataclass(frozen=True)
class Evaluation:
    """What `lexplain evaluate` wrote last for the plan's name.

    Attributes:
        measured_at: When, as text.
        own: The plan's own method among the methods, as it was asked for; None where it is not.
        faithfulness: By method, protocol, metric and label.
        quality: By method, metric, subset and label.
    """

    measured_at: str
    own: str | None
    faithfulness: Sequence[Figure]
    quality: Sequence[Figure]


@dataclass(frozen=True)
class Model:
    """A model of the run, see the table `models`."""

    split: int
    uri: str
    digest: str
    macro_f1: float | None
    micro_f1: float | None
    n_train: int | None
    n_test: int | None
    seconds: float | None


@dataclass(frozen=True)
class Report:
    """All that one report shows.

    Attributes:
        name: The plan's.
        signed: Whether keywords come of scores with a sign; None: not recorded.
        accuracy: document or keywords.
        n_splits: Models.
        facts: Title and value of what is said of the run, in order.
        rows_by_status: (model, document) pairs.
        plan: YAML, as the run recorded it.
        versions: Of libraries.
        mlflow_run_id: Parent run in MLflow; None where it is off.
        models: By split.
        classes: In the order of their names.
        keywords: By class and rank.
        phrases: By class and rank; none where the method makes no masks.
        documents: In the order of their classes.
        methods: The plan's own first.
        evidence: By keyword, best first.
        evaluation: None where there is none.
        cuts: What is shown in part.
    """

    name: str
    signed: bool | None
    accuracy: str
    n_splits: int
    facts: Sequence[tuple[str, str]]
    rows_by_status: Mapping[str, int]
    plan: str
    versions: Mapping[str, str]
    mlflow_run_id: str | None
    models: Sequence[Model]
    classes: Sequence[ClassSummary]
    keywords: Sequence[Keyword]
    phrases: Sequence[Keyword]
    documents: Sequence[Document]
    methods: Sequence[Method]
    evidence: Sequence[Evidence]
    evaluation: Evaluation | None
    cuts: Sequence[Cut]
