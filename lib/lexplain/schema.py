"""What tables there are: columns, comments, constraints, layout. Plain text, no Spark."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

SCHEMA_VERSION = 10
"""Raised by every change of a table's columns or constraints."""

OLDEST_VERSION = 3
"""Tables of this version and later ones only lack columns, which are added, null in the rows that are there."""

# DECIMAL keeps sums independent of the order in which they are added up, to the last digit.
SCORE = "DECIMAL(24,18)"
SCORE_SUM = "DECIMAL(38,18)"

WORDS = "ARRAY<STRUCT<word: STRING, start: INT, end: INT, score: DOUBLE>>"
EVIDENCE = "STRUCT<policy: STRING, probability: DOUBLE, top_n: INT, word_rule: STRING, increments: INT>"
SPANS = "ARRAY<STRUCT<start: INT, end: INT, words: ARRAY<STRING>, score: DOUBLE>>"


@dataclass(frozen=True)
class Table:
    """One table's definition.

    Attributes:
        name: Its name in the schema.
        comment: What a row is.
        columns: (name, SQL type, comment) in order.
        checks: Constraint name to SQL condition.
        cluster: Columns that queries select by.
        partition: Partition columns; instead of clustering, where whole partitions are read or deleted.
        properties: Delta's properties of the table: how its files are written.
    """

    name: str
    comment: str
    columns: tuple[tuple[str, str, str], ...]
    checks: Mapping[str, str]
    cluster: tuple[str, ...] = ()
    partition: tuple[str, ...] = ()
    properties: Mapping[str, str] = field(default_factory=dict)

    @property
    def schema(self) -> str:
        """The columns as a DDL string, as `mapInArrow` takes it."""
        return ", ".join(f"`{name}` {kind}" for name, kind, _ in self.columns)


_UNITS = {
    "word": "word key",
    "phrase": "word keys of a span, joined by a space",
}


def _make_keyword_tables(unit: str, keywords: str) -> tuple[Table, Table, Table]:
    """Return the tables of sums, statistics and keywords; of words, or of the phrases that a mask's spans are."""
    unit_column = (unit, "STRING", _UNITS[unit])
    held_by = {
        "word": "documents of the class that hold the word",
        "phrase": "evidence documents of the class with the phrase among their spans, whatever their number",
    }
    sums = Table(
        f"{unit}_sums",
        f"Additive sums of {unit} scores a chunk. A row with a null {unit} says that its chunk has been added up",
        (
            ("evidence_key", "STRING", "which scores count: evidence policy, probability, top N, word rule"),
            ("explain_key", "STRING", "model, method, options, words and windows"),
            ("corpus_key", "STRING", "source of the documents"),
            ("increment", "INT", "increment of the source"),
            ("bucket", "INT", "bucket of the increment"),
            ("split", "INT", "split of the model"),
            ("label", "STRING", "class"),
            (unit, "STRING", f"{_UNITS[unit]}; null in the row that counts the evidence documents of a class"),
            ("doc_group", "INT", "group of documents by text digest, 0..19, for the jackknife"),
            ("n_documents", "BIGINT", f"evidence documents that hold the {unit} among their top N"),
            ("n_occurrences", "BIGINT", "its occurrences there; without a label, explained rows of the chunk"),
            ("score_sum", SCORE_SUM, "sum of the scores, each divided by its document's token norm"),
            ("score_square_sum", SCORE_SUM, "sum of their squares"),
        ),
        {"counts_from_0": "n_documents >= 0 AND n_occurrences >= 0"},
        cluster=("evidence_key", "corpus_key", "label"),
    )
    statistics = Table(
        f"{unit}_statistics",
        f"The sums of one table of {keywords} by split",
        (
            ("keyword_key", "STRING", "explanations, evidence, thresholds and snapshots"),
            ("split", "INT", "split of the model"),
            ("label", "STRING", "class"),
            unit_column,
            ("n_documents", "BIGINT", f"evidence documents of the split with the {unit} among their top N"),
            ("n_occurrences", "BIGINT", "its occurrences there"),
            ("score_sum", SCORE_SUM, "sum of the scores"),
            ("score_square_sum", SCORE_SUM, "sum of their squares"),
            ("score_mean", "DOUBLE", "mean over the occurrences"),
        ),
        {"counts_from_1": "n_documents >= 1 AND n_occurrences >= 1"},
        cluster=("keyword_key", "label"),
    )
    ranked = Table(
        keywords,
        f"One row a class and {unit}: how strongly and how stably it speaks for the class, kept or why not",
        (
            ("keyword_key", "STRING", "explanations, evidence, thresholds and snapshots"),
            ("label", "STRING", "class"),
            unit_column,
            ("rank", "INT", f"1 is the strongest kept {unit} of the class; null for dropped ones"),
            ("score_mean", "DOUBLE", "mean score over all splits' occurrences; scores divided by token norm"),
            ("score_deviation", "DOUBLE", "standard deviation (ddof 0) of the occurrences' scores"),
            ("score_std", "DOUBLE", "standard deviation of the splits' means; null below 3 splits"),
            ("score_error", "DOUBLE", "standard error between splits, corrected for overlapping training halves"),
            ("ci_low", "DOUBLE", "95 % interval of the mean: jackknife over 20 groups of documents"),
            ("ci_high", "DOUBLE", "its upper end"),
            ("selection_frequency", "DOUBLE", f"share of the splits in which the {unit} was selected"),
            ("n_splits", "INT", "splits in all"),
            ("n_documents", "BIGINT", f"(split, document) pairs with the {unit} among the top N"),
            ("n_occurrences", "BIGINT", "occurrences there"),
            ("document_frequency", "BIGINT", held_by[unit]),
            ("distinctiveness", "DOUBLE", "(df_c - mean df of the other classes) / df_c, df as shares of documents"),
            ("kept", "BOOLEAN", f"the {unit} is a keyword of the class"),
            ("drop_reason", "STRING", f"first rule that the {unit} broke; null for kept ones"),
            (
                "signed",
                "BOOLEAN",
                "scores have a sign; false: what speaks against the class may count as speaking for it; null: not"
                " recorded (schema version 3)",
            ),
        ),
        {
            "kept_or_why": "kept = (drop_reason IS NULL)",
            "rank_of_kept": "kept = (rank IS NOT NULL)",
            "frequency_share": "selection_frequency > 0 AND selection_frequency <= 1",
        },
        # People ask for what is kept, and of a thousand words one is: apart from the others, without any OPTIMIZE.
        partition=("keyword_key", "kept"),
    )
    return sums, statistics, ranked


TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        Table(
            "models",
            "One row a fine-tuned or given model",
            (
                ("model_key", "STRING", "digest of base model, recipe, seed, split and training snapshot"),
                ("split", "INT", "number of the split, from 0"),
                ("seed", "INT", "seed of the plan's splits; null for a model the user brought"),
                ("draw", "INT", "how often the split was redrawn until each label was in both halves"),
                ("test_share", "DOUBLE", "share of the training documents held out"),
                ("uri", "STRING", "what the user calls the model: folder or MLflow URI"),
                ("folder", "STRING", "where executors read it"),
                ("digest", "STRING", "SHA-256 over the files that change numbers"),
                ("training_key", "STRING", "source of the training documents"),
                ("training_snapshot", "STRING", "version of that source"),
                (
                    "labels",
                    "ARRAY<STRING>",
                    "label names in the model's order; a one-logit model's two, or a regression's one",
                ),
                ("problem", "STRING", "single_label, multi_label, binary (one logit) or regression"),
                ("macro_f1", "DOUBLE", "on the held-out half; null for models the user brought"),
                ("micro_f1", "DOUBLE", "on the held-out half"),
                ("label_f1", "MAP<STRING, DOUBLE>", "on the held-out half"),
                ("n_train", "INT", "documents trained on"),
                ("n_test", "INT", "documents held out"),
                ("seconds", "DOUBLE", "of fine-tuning"),
                ("mlflow_uri", "STRING", "registered model, as models:/name/version"),
            ),
            {"digest_known": "length(digest) = 64"},
        ),
        Table(
            "staged",
            "A source's documents, read once, shuffled once by text digest and written with their bucket",
            (
                ("corpus_key", "STRING", "source, filter, sample and column mapping"),
                ("increment", "INT", "0 is the first reading of the source; documents appended later follow"),
                ("snapshot", "STRING", "version of the source that was read; one an increment"),
                ("bucket", "INT", "chunk of the increment; equal texts share one"),
                ("doc_id", "STRING", "the user's id, or one made from the text"),
                (
                    "text",
                    "BINARY",
                    "the document as it was found; bytes, since they may be invalid UTF-8; with a defect the row",
                ),
                ("text_digest", "STRING", "SHA-256 of the bytes, hexadecimal"),
                ("labels", "ARRAY<STRING>", "gold labels; null where the source has none"),
                (
                    "seen_by",
                    "ARRAY<INT>",
                    "splits whose model has seen the document; null where the source does not say",
                ),
                ("words", "ARRAY<STRING>", "distinct word keys of a labelled document, for document frequencies"),
                (
                    "defect",
                    "STRING",
                    "why the row is no document: malformed_row, invalid_utf8, lone_surrogate; null where it is one",
                ),
            ),
            {"bucket_from_0": "bucket >= 0"},
            partition=("corpus_key", "increment", "bucket"),
        ),
        Table(
            "increments",
            "One row a staged increment of a source, written once its documents were checked",
            (
                ("corpus_key", "STRING", "source, filter, sample and column mapping"),
                ("increment", "INT", "0 is the first reading of the source"),
                ("origin", "STRING", "table name or path"),
                ("snapshot", "STRING", "version of the source that was read"),
                ("n_documents", "BIGINT", "documents staged"),
                ("n_buckets", "INT", "chunks they were dealt to; fixed for the increment"),
                ("staged_at", "TIMESTAMP", "when"),
            ),
            {"documents_from_0": "n_documents >= 0", "buckets_from_0": "n_buckets >= 0"},
        ),
        Table(
            "forgotten",
            "One row a document that was to be forgotten: it is left out whenever its source is read",
            (
                ("origin", "STRING", "table name or path of the source, as in increments"),
                ("doc_digest", "STRING", "SHA-256 of the document's id, hexadecimal"),
                (
                    "text_digest",
                    "STRING",
                    "of a text that models were trained on: its copies are none that they have not seen",
                ),
                ("forgotten_at", "TIMESTAMP", "when"),
            ),
            {"digest_known": "length(doc_digest) = 64"},
        ),
        Table(
            "chunks",
            "The ledger: how many documents each model owes each chunk; written before the first task",
            (
                ("explain_key", "STRING", "model, method, options, words and windows"),
                ("corpus_key", "STRING", "source of the documents"),
                ("increment", "INT", "increment of the source"),
                ("bucket", "INT", "bucket of the increment"),
                ("split", "INT", "split of the model"),
                ("n_documents", "BIGINT", "documents that the model has not trained on, so must be accounted for"),
            ),
            {"documents_from_0": "n_documents >= 0"},
            cluster=("corpus_key", "explain_key"),
        ),
        Table(
            "calibrations",
            "Where on the path a model's gradient moves, fitted to a sample of the corpus; made once, then kept",
            (
                ("calibration_key", "STRING", "model, corpus, method, baseline, precision and windows"),
                ("model_digest", "STRING", "SHA-256 of the model"),
                ("corpus_key", "STRING", "source that the sample was drawn from"),
                ("n_documents", "BIGINT", "documents that the model had to explain then"),
                ("n_sampled", "INT", "documents sampled"),
                (
                    "reference_error",
                    "DOUBLE",
                    "relative difference between the sample's reference and that of half its points",
                ),
                ("keyword_nodes", "INT", "nodes of accuracy: keywords"),
                (
                    "keyword_error_median",
                    "DOUBLE",
                    "their L2 error relative to the scores' norm, on documents held out",
                ),
                ("keyword_error_p90", "DOUBLE", "90th percentile of the same"),
                (
                    "quadrature_share",
                    "DOUBLE",
                    "error they add to a word's mean, as a share of its standard error between documents",
                ),
                (
                    "list_overlap",
                    "DOUBLE",
                    "rank-biased overlap of their keyword lists with converged ones, same documents",
                ),
                ("sampling_overlap", "DOUBLE", "rank-biased overlap of converged lists from two halves of the sample"),
                ("calibration", "STRING", "nodes and weights of all fitted rules, JSON"),
            ),
            {"documents_from_0": "n_documents >= 0"},
        ),
        Table(
            "dig_paths",
            "The way from each word to the baseline through the vocabulary, which DIG and UDIG follow; searched once",
            (
                ("path_key", "STRING", "word embeddings, baseline token, method, steps, neighbours and strategy"),
                ("token_id", "INT", "token of the vocabulary"),
                ("anchors", "ARRAY<INT>", "tokens on its path, from its own side to the baseline's"),
            ),
            {"token_from_0": "token_id >= 0"},
            cluster=("path_key", "token_id"),
        ),
        Table(
            "neighbours",
            "Reference documents that a model's texts are compared with, indexed in a file; made once, then kept",
            (
                (
                    "neighbours_key",
                    "STRING",
                    "model, source, method, options of its base scores, layer, precision, windows and words",
                ),
                ("model_digest", "STRING", "SHA-256 of the model"),
                (
                    "corpus_key",
                    "STRING",
                    "source of the references: documents the model was fine-tuned on here, else the corpus",
                ),
                ("n_references", "BIGINT", "(document, predicted label) pairs"),
                ("layer", "INT", "hidden layer that documents are compared by"),
                (
                    "layer_precision",
                    "ARRAY<DOUBLE>",
                    "of layers 1, 2, ...: share of a document's 10 nearest with its class; null where the plan names the layer",
                ),
                (
                    "file",
                    "STRING",
                    "name of the index's file, in the folder `prepared` of models.folder or else of the sink",
                ),
            ),
            {"references_from_1": "n_references >= 1"},
        ),
        Table(
            "explanations",
            "One row a model, document and predicted label: its words with their scores; or why there are none",
            (
                ("explain_key", "STRING", "model, method, options, words and windows"),
                ("corpus_key", "STRING", "source of the document"),
                ("increment", "INT", "increment of the source"),
                ("bucket", "INT", "bucket of the increment"),
                ("split", "INT", "split of the model"),
                ("doc_id", "STRING", "document"),
                ("text_digest", "STRING", "SHA-256 of the text, hexadecimal"),
                ("status", "STRING", "explained, no_label, settled or rejected"),
                ("reason", "STRING", "why a document was rejected"),
                ("method", "STRING", "versioned method id"),
                ("label", "STRING", "label that is explained: predicted, or among the top_k; a regression's output"),
                (
                    "label_rank",
                    "INT",
                    "0 for the most probable of the labels that are explained; 0 where there is none",
                ),
                (
                    "target",
                    "STRING",
                    "what was explained: logit, of the label; what it has more than another label's; or output, of a regression",
                ),
                ("probability", "DOUBLE", "of the label; null for a regression"),
                (
                    "is_gold",
                    "BOOLEAN",
                    "the label is among the gold labels; null where there are none, and for a regression",
                ),
                ("target_score", "DOUBLE", "the target for the text"),
                ("baseline_score", "DOUBLE", "the target for the baseline"),
                (
                    "completeness_gap",
                    "DOUBLE",
                    "target_score - baseline_score - sum of scores, before any correction; of a mask what the words it keeps lack",
                ),
                ("completeness_gap_relative", "DOUBLE", "absolute gap / absolute score difference"),
                ("evaluations", "INT", "gradient evaluations"),
                ("accuracy", "STRING", "document or keywords"),
                ("converged", "BOOLEAN", "the method's own stopping rule was met; true for a method that has none"),
                ("token_norm", "DOUBLE", "L2 norm of the token scores"),
                ("n_tokens", "INT", "content tokens that the model read"),
                ("n_windows", "INT", "windows that they made"),
                ("other_score", "DOUBLE", "score of what is no word: punctuation, symbols, special tokens"),
                ("words", WORDS, "words by descending score; code points of the text, 0-based, end exclusive"),
                ("spans", SPANS, "runs of words that a mask keeps, in the order of the text; null for other methods"),
            ),
            {
                "status_known": "status IN ('explained', 'no_label', 'settled', 'rejected')",
                "reason_given": "(status = 'rejected') = (reason IS NOT NULL)",
                "label_given": "(status IN ('explained', 'settled')) = (label IS NOT NULL)",
                "probability_share": "probability IS NULL OR (probability >= 0 AND probability <= 1)",
                "gap_from_0": "completeness_gap_relative IS NULL OR completeness_gap_relative >= 0",
            },
            cluster=("corpus_key", "explain_key", "label"),
            properties={
                # A chunk is written by a task for every few documents, each of which would leave a file.
                "delta.autoOptimize.optimizeWrite": "true",
                # What queries select by. With all columns' statistics a file takes three times the room in the log.
                "delta.dataSkippingStatsColumns": "explain_key,corpus_key,increment,bucket,split,status,label",
            },
        ),
        *_make_keyword_tables("word", "keywords"),
        *_make_keyword_tables("phrase", "keyphrases"),
        Table(
            "deletions",
            "One row an explanation and protocol: what the model says while words are taken away in the order of their scores",
            (
                ("explain_key", "STRING", "model, method, options, words and windows"),
                ("corpus_key", "STRING", "source of the documents"),
                ("increment", "INT", "increment of the source"),
                ("bucket", "INT", "bucket of the increment"),
                ("doc_id", "STRING", "document"),
                ("text_digest", "STRING", "SHA-256 of the text, hexadecimal"),
                ("label", "STRING", "label that was explained"),
                ("protocol", "STRING", "which words are taken, and what stands in their place"),
                ("sizes", "ARRAY<INT>", "words, or tokens, taken"),
                ("whole", "DOUBLE", "probability of the label for the whole text"),
                ("without", "ARRAY<DOUBLE>", "without the words, by size"),
                ("alone", "ARRAY<DOUBLE>", "of the words alone, by size; null where the protocol does not ask"),
                ("predicted", "ARRAY<STRING>", "most probable label without the words, by size"),
                ("reason", "STRING", "why there is nothing: no_logits, for lack of memory or not finite"),
            ),
            {"measured_or_why": "(reason IS NULL) = (whole IS NOT NULL)"},
            cluster=("corpus_key", "explain_key"),
        ),
        Table(
            "class_deletions",
            "One row an explanation and keyword table: what the model says without the words of the classes' lists",
            (
                ("keyword_key", "STRING", "the lists, in keywords"),
                ("explain_key", "STRING", "model, method, options, words and windows"),
                ("corpus_key", "STRING", "source of the documents"),
                ("increment", "INT", "increment of the source"),
                ("bucket", "INT", "bucket of the increment"),
                ("doc_id", "STRING", "document"),
                ("text_digest", "STRING", "SHA-256 of the text, hexadecimal"),
                ("label", "STRING", "label that was explained"),
                ("whole", "DOUBLE", "probability of the label for the whole text"),
                (
                    "removed",
                    "ARRAY<STRUCT<list: STRING, draw: INT, n_words: INT, probability: DOUBLE, predicted: STRING>>",
                    "by list, made of the other half of the documents: whose it is, null or the draw of as frequent random"
                    " words, occurrences taken, probability of the label without them, most probable label",
                ),
                ("reason", "STRING", "why there is nothing: no_logits, for lack of memory or not finite"),
            ),
            {"measured_or_why": "(reason IS NULL) = (whole IS NOT NULL)"},
            cluster=("corpus_key", "keyword_key"),
        ),
        Table(
            "faithfulness",
            "One row a method, protocol, metric and label of an evaluation: all methods on the same documents and models",
            (
                ("evaluation_key", "STRING", "plan name, explanations and corpus"),
                ("name", "STRING", "the plan's name"),
                ("measured_at", "TIMESTAMP", "when the figures were written"),
                ("explain_keys", "ARRAY<STRING>", "of the method's explanations, by split"),
                ("method", "STRING", "as it was asked for: name, or name:preset"),
                ("protocol", "STRING", "which words are taken, and what stands in their place"),
                (
                    "metric",
                    "STRING",
                    "comprehensiveness, accuracy_of_mistaken_gold, accuracy_of_mistaken_predicted (high is good), sufficiency,"
                    " log_odds, accuracy_of_correct (low is good)",
                ),
                ("label", "STRING", "label that was explained; null for all"),
                ("value", "DOUBLE", "mean over documents; a document has the mean of its explanations"),
                ("ci_low", "DOUBLE", "95 % interval, from bootstrap samples of documents"),
                ("ci_high", "DOUBLE", "its upper end"),
                ("n_documents", "BIGINT", "documents it is the mean of"),
                ("over_random", "DOUBLE", "mean difference from random scores on the same documents; null for these"),
                ("over_random_low", "DOUBLE", "its 95 % interval"),
                ("over_random_high", "DOUBLE", "its upper end"),
            ),
            {"interval_holds_value": "ci_low <= value + 1e-9 AND value <= ci_high + 1e-9"},
            cluster=("evaluation_key",),
        ),
        Table(
            "faithfulness_differences",
            "One row a pair of methods, protocol and metric of an evaluation: on the documents that both have, over all labels",
            (
                ("evaluation_key", "STRING", "plan name, explanations and corpus"),
                ("name", "STRING", "the plan's name"),
                ("measured_at", "TIMESTAMP", "when the figures were written"),
                ("method", "STRING", "one method, as it was asked for"),
                ("other", "STRING", "the other"),
                ("protocol", "STRING", "which words are taken, and what stands in their place"),
                ("metric", "STRING", "as in faithfulness"),
                ("difference", "DOUBLE", "mean over documents of the method's value less the other's"),
                ("ci_low", "DOUBLE", "95 % interval, from bootstrap samples of documents"),
                ("ci_high", "DOUBLE", "its upper end"),
                ("p_value", "DOUBLE", "of a paired permutation test, two-sided"),
                ("p_adjusted", "DOUBLE", "the same for all pairs of methods by this metric together (Holm)"),
                ("n_documents", "BIGINT", "documents that both have"),
            ),
            {"share": "p_value > 0 AND p_value <= p_adjusted AND p_adjusted <= 1"},
            cluster=("evaluation_key",),
        ),
        Table(
            "keyword_quality",
            "One row a method, metric, subset and label of an evaluation: the keyword lists that come of the same documents",
            (
                ("evaluation_key", "STRING", "plan name, explanations and corpus"),
                ("name", "STRING", "the plan's name"),
                ("measured_at", "TIMESTAMP", "when the figures were written"),
                ("keyword_key", "STRING", "the lists, in keywords; null for tf-idf, whose lists are not kept"),
                ("method", "STRING", "as it was asked for: name, or name:preset; tf-idf: lists made without a model"),
                (
                    "metric",
                    "STRING",
                    "keyword_distinctiveness, coverage, coverage_micro, coverage_distinctiveness, halves_of_documents,"
                    " halves_of_splits (high is good; halves also as _jaccard), cross_coverage (low is good); deletion,"
                    " deletion_flips, deletion_over_random (high is good), deletion_elsewhere, deletion_of_random (low is good)",
                ),
                (
                    "subset",
                    "STRING",
                    "labels that documents stand for: TP predicted and gold, TL gold, P predicted; null: no documents",
                ),
                ("label", "STRING", "class; null for the mean over classes"),
                ("value", "DOUBLE", "the figure"),
                (
                    "ci_low",
                    "DOUBLE",
                    "95 % interval, jackknife over 20 groups of documents; of halves the smallest of five",
                ),
                ("ci_high", "DOUBLE", "its upper end; of halves the largest"),
                ("n_documents", "BIGINT", "documents it is the mean of; null for figures of lists alone"),
            ),
            {"interval_holds_value": "ci_low IS NULL OR (ci_low <= value + 1e-9 AND value <= ci_high + 1e-9)"},
            cluster=("evaluation_key",),
        ),
        Table(
            "sweeps",
            "One row a setting of the keyword rules: what the lists are worth that it makes of the same explanations",
            (
                ("sweep_key", "STRING", "plan name and settings"),
                ("name", "STRING", "the plan's name"),
                ("measured_at", "TIMESTAMP", "when the figures were written"),
                ("rank", "INT", "1 for the largest product of coverage and coverage_micro"),
                ("top_n", "INT", "words a document that count"),
                ("theta", "DOUBLE", "share of the splits that must select a word"),
                ("probability", "DOUBLE", "a prediction counts above it"),
                ("keyword_key", "STRING", "the setting's lists, in keywords"),
                ("n_classes", "INT", "classes that have a keyword"),
                (
                    "metrics",
                    "MAP<STRING, DOUBLE>",
                    "means over classes, as in keyword_quality; subset TP, or P without gold labels",
                ),
            ),
            {"rank_from_1": "rank >= 1"},
            cluster=("sweep_key",),
        ),
        Table(
            "runs",
            "One row a run",
            (
                ("run_id", "STRING", "digest of the plan's name and its keys"),
                ("name", "STRING", "the plan's name"),
                ("status", "STRING", "running, finished, stopped (a limit was passed) or failed"),
                ("started_at", "TIMESTAMP", "first start"),
                ("finished_at", "TIMESTAMP", "when it last finished; null before"),
                ("plan", "STRING", "the plan as YAML, defaults written out"),
                ("corpus_key", "STRING", "source of the corpus"),
                ("corpus_snapshot", "STRING", "version of it that the run read last"),
                ("training_snapshot", "STRING", "version of the training documents, likewise"),
                ("labelled_snapshot", "STRING", "version of the labelled documents"),
                (
                    "explain_keys",
                    "ARRAY<STRING>",
                    "what the keyword table rests on, by split; before there is one, what is made",
                ),
                ("keyword_key", "STRING", "the run's keyword table"),
                ("evidence", EVIDENCE, "which scores it was made of: policy, thresholds, increments of the corpus"),
                ("mlflow_run_id", "STRING", "parent run in MLflow"),
                ("documents_by_status", "MAP<STRING, BIGINT>", "(model, document) pairs"),
                (
                    "documents_per_second",
                    "DOUBLE",
                    "explained (model, document) pairs, attribution only, without what is prepared for it",
                ),
                ("device", "STRING", "what the models ran on"),
                ("versions", "MAP<STRING, STRING>", "of lexplain and the libraries that move numbers"),
                ("detail", "STRING", "why a run stopped or failed"),
                (
                    "fingerprint",
                    "STRING",
                    "digest of what a finished run rests on: plan, versions, sources and tables; equal, nothing is to do",
                ),
                (
                    "pinned",
                    "ARRAY<STRING>",
                    "inputs, corpus and training, that were read since it last finished: a run that did not finish goes on with these",
                ),
                ("explain_keys_ever", "ARRAY<STRING>", "of all explanations that the run has made or used"),
                ("labels", "ARRAY<STRING>", "of the models that the keyword table rests on"),
            ),
            {"status_known": "status IN ('running', 'finished', 'stopped', 'failed')"},
            # A run's row is replaced as its state changes: in a partition of its own no file need be read for that.
            partition=("run_id",),
        ),
    )
}
