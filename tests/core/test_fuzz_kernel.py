"""Word segmenter and executor kernel, given anything: each word once, each document once, whatever shares its batch."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.models import Shelf
from core.test_executor import STAGED, assert_same, make_task, model_task, plant_nan
from core.test_words import any_texts, mixed_texts
from lexplain.engine import Explainer
from lexplain.errors import DocumentError
from lexplain.executor import EXPLANATIONS, explain_batches, explain_texts
from lexplain.methods import find_method
from lexplain.words import segment, word_key

REASONS = {
    "null_text", "empty_text", "invalid_utf8", "lone_surrogate", "too_long", "no_words", "not_tokenized", "not_finite", "malformed_row",
}  # fmt: skip
"""What a document of these tests can be rejected for; `out_of_memory` and `not_converged` need more than a text."""

SLOWER = settings(max_examples=max(1, settings().max_examples // 4))

HARD = st.sampled_from(
    "a\u0301\u0327\u0344\u0f73\u0f75 e\u200d\u200c\u202e\u2066\u00ad\ufeff\u0000\u001b😀👩\u1f3ff🇸🇪ไทยحक्षקΣςİıßﬁ가ᄀ\U0010ffff\uffff\u2028_'.,0٣中"
)
TEXTS = mixed_texts | any_texts | st.text(HARD, max_size=80)
LONG = st.lists(st.tuples(TEXTS, st.integers(1, 200)), max_size=6).map(
    lambda parts: "".join(text * times for text, times in parts)
)


# --- words ------------------------------------------------------------------------------------------------------


@given(TEXTS | LONG)
def test_words_of_any_text(text: str) -> None:
    words = segment(text)
    borders = [border for word in words for border in (word.start, word.end)]
    assert borders == sorted(borders)
    assert all(0 <= word.start < word.end <= len(text) for word in words)
    for word in words:
        assert word.key == word_key(text[word.start : word.end])
        assert word.key == word.key.lower()
        assert unicodedata.is_normalized("NFC", word.key)
    held = Counter(place for word in words for place in range(word.start, word.end))
    letters = [place for place, character in enumerate(text) if unicodedata.category(character)[0] in "LN"]
    assert all(held[place] == 1 for place in letters)
    assert max(held.values(), default=1) == 1


@given(TEXTS, st.characters(categories=["Cs"]), TEXTS)
def test_half_of_a_surrogate_pair_is_refused_wherever_it_stands(before: str, half: str, after: str) -> None:
    with pytest.raises(DocumentError) as caught:
        segment(before + half + after)
    assert caught.value.reason == "lone_surrogate"
    assert f"text[{len(before)}]" in str(caught.value)


MARKS = st.lists(
    st.sampled_from("\u0301\u0327\u0344\u0340\u0f73\u0f75\u0f81\u05b0\u3099\u0653a\u09c7\u09be"), min_size=1, max_size=8
)


@given(st.lists(st.tuples(MARKS, st.integers(1, 150)), min_size=4, max_size=12), st.sampled_from("aÅΣ한ﬁ"))
def test_key_of_a_long_word_is_that_of_a_short_one(parts: list[tuple[list[str], int]], letter: str) -> None:
    """Long words are composed in another way; where there are few marks the plain one is quick enough to compare with."""
    surface = letter + "".join("".join(marks) * times for marks, times in parts)
    expected = unicodedata.normalize("NFC", unicodedata.normalize("NFC", surface).lower())
    assert word_key(surface) == expected


@pytest.mark.parametrize(
    "text",
    [
        "a" + "\u0301\u0327" * 50_000, "a" + "\u0f73" * 100_000, "Σ" * 100_000 + "\u0301" * 100_000, "a" * 1_000_000, "\u0301" * 1_000_000,
        "a" + " " * 1_000_000 + "b", "\u200d" * 1_000_000 + "a", "a\u200d" * 300_000, "ก" * 30_000, "中" * 200_000, "_" * 500_000 + "a",
        "🇸" * 200_000 + "a", "가" * 200_000, "a'" * 300_000, "1," * 300_000, "\x00" * 500_000 + "a",
    ],
    ids=lambda text: f"{text[:3]!a} {len(text)}",
)  # fmt: skip
def test_a_long_text_is_read_in_seconds(text: str) -> None:
    started = time.process_time()
    words = segment(text)
    assert time.process_time() - started < 10
    assert all(text[word.start : word.end] for word in words)


# --- windows ----------------------------------------------------------------------------------------------------

_WORDS = st.sampled_from(
    [
        "the",
        "new",
        "tax",
        "Räksmörgås",
        "köttbullar",
        "今日は晴れです",
        "😀",
        "é",
        "_x_",
        "...",
        "ไทย",
        "a\u200db",
        "<b>",
        "3,5",
        "election",
    ]
)


@SLOWER
@given(st.lists(_WORDS, min_size=1, max_size=120).map(" ".join), st.integers(8, 40), st.integers(0, 3))
def test_windows_count_each_word_once(shelf: Shelf, text: str, max_tokens: int, overlap: int) -> None:
    """Whatever windows a text is cut into, each of its words has one score, and the scores add up to the difference of logits."""
    explainer = Explainer(
        shelf.classifier("bert"), find_method("gradient_x_input"), {}, max_tokens=max_tokens, overlap=overlap, max_windows=None,
        merge="sum", budget_tokens=4000,
    )  # fmt: skip
    (outcome,) = explainer.explain([text])
    words = segment(text)
    if not isinstance(outcome, list):
        assert (outcome.reason, words) == ("no_words", [])
        return
    for explanation in outcome:
        assert sorted((word.start, word.end, word.key) for word, _ in explanation.words) == [
            (word.start, word.end, word.key) for word in words
        ]
        assert explanation.completeness_gap is not None
        parts = sum(score for _, score in explanation.words) + explanation.other_score + explanation.completeness_gap
        assert parts == pytest.approx(explanation.target_score - explanation.baseline_score, abs=1e-4)


# --- the kernel -------------------------------------------------------------------------------------------------

BYTES = (
    st.none() | TEXTS.map(str.encode) | st.lists(_WORDS, max_size=30).map(lambda words: " ".join(words).encode()) | st.binary(max_size=40)
    | st.tuples(TEXTS.map(str.encode), st.sampled_from([b"\xff", b"\xed\xa0\x80", b"\xf0\x9f", b"\xc0\x80"])).map(b"".join)
    | st.sampled_from([b"", b" \n", b"\x00", b"a" * 1001, b"the new bank", "\u00a0\u3000".encode()])
)  # fmt: skip
DOCUMENTS = st.lists(
    st.fixed_dictionaries(
        {
            "text": BYTES, "splits": st.sampled_from([[0], [1], [0, 1], []]),
            "labels": st.none() | st.lists(st.sampled_from(["business", "NA", "<b>", "it's"]), max_size=2),
            "defect": st.sampled_from([None] * 9 + ["malformed_row"]),
        }
    ),
    max_size=24,
)  # fmt: skip


def stage(documents: Sequence[dict[str, Any]]) -> pa.RecordBatch:
    rows = [
        {"corpus_key": "corpus", "increment": 0, "bucket": 0, "doc_id": str(number), **document,
         "text_digest": hashlib.sha256(document["text"] or b"").hexdigest()}
        for number, document in enumerate(documents)
    ]  # fmt: skip
    return pa.RecordBatch.from_pylist(rows, schema=STAGED)


def nan_model(shelf: Shelf) -> Path:
    """A model whose embedding of "bank" is NaN."""
    folder = shelf.folder("bert")
    target = folder.with_name("bert-nan")
    return target if target.exists() else plant_nan(folder, "bank", target)


@SLOWER
@given(documents=DOCUMENTS, cuts=st.lists(st.integers(0, 24), max_size=6))
def test_every_document_once_however_batches_are_cut(
    shelf: Shelf, documents: list[dict[str, Any]], cuts: list[int]
) -> None:
    nan = plant_nan(shelf.folder("bert"), "bank", shelf.folder("bert").with_name("bert-nan"))
    task = make_task(
        model_task(nan),
        model_task(shelf.folder("bert", seed=1), 1),
        method="gradient_x_input.v1",
        options={"baseline": "mask"},
    )
    batch = stage(documents)
    borders = [0, *sorted(min(cut, len(documents)) for cut in cuts), len(documents)]
    parts = [batch.slice(start, stop - start) for start, stop in pairwise(borders)]
    found = []
    for batches in ([batch], parts):
        made = list(explain_batches(iter(batches), task, "cpu"))
        assert all(one.schema == EXPLANATIONS for one in made)
        found.append([row for one in made for row in one.to_pylist()])
    assert_same(*found)
    check_rows(documents, found[0])


def check_rows(documents: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> None:
    """Each (document, model) pair that is owed has one first row, with a reason where it is rejected, and words of its text."""
    first = Counter((int(row["doc_id"]), row["split"]) for row in rows if row["label_rank"] == 0)
    assert first == Counter(
        (number, split) for number, document in enumerate(documents) for split in document["splits"]
    )
    for row in rows:
        document = documents[int(row["doc_id"])]
        assert row["status"] in ("explained", "no_label", "rejected")
        assert (row["reason"] in REASONS) == (row["status"] == "rejected")
        if document["defect"] is not None:
            assert row["reason"] == document["defect"]
        if row["status"] == "explained":
            text = document["text"].decode()
            assert {(word["start"], word["end"], word["word"]) for word in row["words"]} <= {
                (word.start, word.end, word.key) for word in segment(text)
            }


@SLOWER
@given(st.lists(st.none() | TEXTS | BYTES | st.text(st.characters(), max_size=10), max_size=12))
def test_the_sql_function_gives_one_outcome_a_value(shelf: Shelf, values: list[str | bytes | None]) -> None:
    """As the UDF calls it; strings with halves of surrogate pairs too."""
    model = model_task(shelf.folder("bert"))
    task = make_task(model, method="gradient_x_input.v1", options={"baseline": "mask"})
    outcomes = explain_texts(values, task, model, "cpu")
    assert len(outcomes) == len(values)
    for value, outcome in zip(values, outcomes, strict=True):
        assert isinstance(outcome, list) or outcome.reason in REASONS
        if isinstance(outcome, list):
            assert value is not None
            assert outcome


# --- memory -----------------------------------------------------------------------------------------------------

SCARCE = """
import resource, sys
from pathlib import Path
from core.test_executor import explain, make_task, model_task, stage

folder = Path(sys.argv[1])
task = make_task(model_task(folder), method="gradient_x_input.v1", options={"baseline": "mask"}, max_tokens=2048, max_characters=10**6, overlap=0)
good, large = "the new tax", "the new tax " * 650
explain([stage([good, "the bank"])], task)  # everything is loaded and warm
used = int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 250 * 2**20, resource.RLIM_INFINITY))
rows = explain([stage([good, large, "the bank said"])], task)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
rows += explain([stage([large])], task)
print([(row["doc_id"], row["status"], row["reason"]) for row in rows])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
def test_a_document_that_exhausts_the_memory_is_a_row_with_a_reason(shelf: Shelf) -> None:
    """Its attention over 2048 tokens takes more than the 250 MB that are left. The documents beside it are explained."""
    folder = shelf.folder("deberta-v2", max_tokens=2048)
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", SCARCE, str(folder)], capture_output=True, text=True, check=False, timeout=300,
        env={"PYTHONPATH": f"{tests}:{tests.parent / 'lib'}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == str(
        [
            ("doc 0", "explained", None),
            ("doc 1", "rejected", "out_of_memory"),
            ("doc 2", "explained", None),
            ("doc 0", "explained", None),
        ]
    )
