"""The keys that name rows of the tables: each a digest of exactly what changes that stage's numbers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence

from lexplain.errors import redact_uris
from lexplain.plan import LEARNING_RATES, FindMethod, Keywords, Plan, Source
from lexplain.settings import plain
from lexplain.words import WORD_RULES


def digest(*parts: object) -> str:
    """Return 20 hex digits (80 bits) of SHA-256 over the canonical JSON of `parts`."""
    text = json.dumps([plain(part) for part in parts], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:20]


def corpus_key(source: Source) -> str:
    """Key of a source: its origin, filter, sample and column mapping; no version, so that increments join.

    A password or token in the path tells who reads, not what: a new one is no new corpus, and none can be guessed from a key.
    """
    # A format that was only spelt out, a header where there is none, or how new rows are found changes no document.
    header = source.header or source.kind not in ("csv", "tsv")
    path = redact_uris(source.path) if source.path is not None and "://" in source.path else source.path
    named = plain(dataclasses.replace(source, path=path, format=None, header=header))
    return digest("corpus", source.kind, {name: value for name, value in named.items() if name != "watermark"})


def model_key(plan: Plan, base_digest: str, split: int, training_snapshot: str) -> str:
    """Key of one fine-tuned model, known before it is trained: a killed fine-tuning finds its own."""
    assert plan.training is not None
    # Longer texts than max_characters are left out of the training.
    reading = (plan.text.max_tokens, plan.text.max_characters)
    return digest("model", base_digest, _recipe(plan), split, reading, corpus_key(plan.training), training_snapshot)


def explain_key(plan: Plan, find_method: FindMethod, model_digest: str, held_out: object) -> str:
    """Key of one model's explanations; holds no input version and no threshold.

    Every key of `text` is in it: windows and merging change scores, `max_characters` whether there are any. So is the
    rule by which documents are held out from the model: it decides which documents the model owes.
    """
    return digest("explain", model_digest, held_out, *_method(plan, find_method), plan.text, WORD_RULES)


def calibration_key(plan: Plan, find_method: FindMethod, model_digest: str) -> str:
    """Key of a model's calibration on one corpus.

    It is no part of `explain_key`: within a sink, which keeps the first, it is a function of model and corpus. Scores of
    two sinks may differ.
    """
    method = find_method(plan.method.id)
    baseline = method.complete_options(plan.method.asked).get("baseline")
    text = plan.text
    # top_k brings in texts without a predicted label, which all windows decide; the words decide how many nodes a keyword needs
    windows = (text.max_tokens, text.overlap, text.max_windows, text.max_characters)
    made_for = (plan.method.precision, plan.method.top_k, *windows, WORD_RULES, corpus_key(plan.corpus))
    return digest("calibration", model_digest, method.id, baseline, made_for)


def path_key(plan: Plan, find_method: FindMethod, embeddings: str, baseline_id: int) -> str:
    """Key of the paths through a vocabulary: they depend on no text, no label and no layer above.

    Args:
        plan: Names the method.
        find_method: Registry lookup.
        embeddings: Digest of the word embeddings; models that were fine-tuned above them share their paths.
        baseline_id: Token where the paths end.
    """
    method = find_method(plan.method.id)
    options = method.complete_options(plan.method.asked)
    followed = {name: options[name] for name in ("steps", "neighbours", "strategy")}
    return digest("paths", method.id, embeddings, baseline_id, followed)


def neighbours_key(plan: Plan, find_method: FindMethod, model_digest: str) -> str:
    """Key of a model's reference documents: of its training documents where it is fine-tuned here, else of the corpus.

    Like `calibration_key` it is no part of `explain_key`, and holds no version of the source: texts that come later
    are compared with the same documents.
    """
    method = find_method(plan.method.id)
    options = method.complete_options(plan.method.asked)
    scored = [*(options.get(name) for name in ("base", "samples", "noise", "layer")), *_contrast(plan)]
    text = plan.text  # the windows decide which labels a reference has
    read = (plan.method.precision, text.max_tokens, text.overlap, text.max_windows, text.max_characters, WORD_RULES)
    # Ready models may come with training documents, whose labels count for document frequencies only.
    training = None if plan.models.base is None else plan.training
    return digest("neighbours", model_digest, method.id, scored, read, corpus_key(training or plan.corpus))


def evidence_key(plan: Plan) -> str:
    """Key of the word sums: everything that decides which scores are added up."""
    rules = plan.keywords
    return digest("evidence", plan.evidence, rules.probability, rules.top_n, rules.word_rule)


def keyword_key(
    plan: Plan,
    explain_keys: Sequence[str],
    corpus_snapshot: str,
    labelled_snapshot: str | None,
    counts: Mapping[str, int],
) -> str:
    """Key of one keyword table: explanations, evidence, thresholds and the snapshots it was made from.

    Of `counts`, (model, document) pairs by status, those that may be explained yet are in it: when some are, the table is
    another one.
    """
    labelled = None if plan.labelled is None else corpus_key(plan.labelled)
    test_share = None if plan.models.base is None else plan.models.test_share  # of the error between splits
    made_from = (
        sorted(explain_keys),
        corpus_key(plan.corpus),
        corpus_snapshot,
        labelled,
        labelled_snapshot,
        test_share,
    )
    open_pairs = {status: counts[status] for status in ("rejected", "settled") if counts.get(status)}
    return digest("keywords", made_from, evidence_key(plan), _rules(plan), *([open_pairs] if open_pairs else []))


def evaluation_prefix(name: str) -> str:
    """Return what the names of a plan's evaluation runs begin with; each method is one."""
    return f"{name}-evaluation-"


def run_id(plan: Plan, find_method: FindMethod, model_digests: Sequence[str]) -> str:
    """Name of a run: the plan's name and what its keys are made of. Known before anything is trained."""
    training = None if plan.training is None else corpus_key(plan.training)
    models = (plan.models.corpus, None if plan.models.base is None else (plan.models.splits, _recipe(plan)))
    made_from = (corpus_key(plan.corpus), training, models, model_digests)
    return digest("run", plan.name, made_from, _method(plan, find_method), plan.text, _rules(plan))


def _recipe(plan: Plan) -> dict[str, object]:
    names = ("seed", "test_share", "multi_label", "train", "epochs", "learning_rate", "batch_size", "accumulate",
             "patience")  # fmt: skip
    recipe = {name: getattr(plan.models, name) for name in names}
    return recipe | {"learning_rate": plan.models.learning_rate or LEARNING_RATES[plan.models.train]}


def _method(plan: Plan, find_method: FindMethod) -> tuple[object, ...]:
    method = find_method(plan.method.id)
    chosen = (method.id, method.complete_options(plan.method.asked), plan.method.precision, plan.method.top_k)
    # keys of plans without them are as they were before there were any
    return (*chosen, *(["gold"] if plan.method.gold else []), *_contrast(plan))


def _contrast(plan: Plan) -> list[object]:
    return [] if plan.method.against is None else ["against", plan.method.against]


def _rules(plan: Plan) -> Keywords:
    """Return the keyword rules in the one form that equal rules have."""
    return dataclasses.replace(plan.keywords, evidence=plan.evidence, labels=tuple(sorted(set(plan.keywords.labels))))
