"""Splits: draws that are functions of seed and digest, and the redraw rule."""

from __future__ import annotations

import hashlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lexplain.errors import CorpusError
from lexplain.splits import Split, digest_text, draw_split

DIGESTS = [digest_text(f"document {number}".encode()) for number in range(10_000)]

shares = st.floats(0.01, 0.99)


def test_digest_is_sha256_of_the_bytes() -> None:
    assert digest_text(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digest_text("köpa".encode()) == hashlib.sha256("köpa".encode()).hexdigest()


def test_splits_never_change() -> None:
    """Stored models name their split only: another draw would explain texts that they trained on."""
    split = Split(seed=123, number=4, draw=0, test_share=0.33)
    assert split.salt == "123/4/0:"
    assert split.sql("text_digest") == (
        "substring(sha2(concat('123/4/0:', text_digest), 256), 1, 15) < 'ab851eb851eb800'"
    )
    assert (
        "".join("01"[split.trains_on(digest)] for digest in DIGESTS[:40]) == "1111010111011101000110110101101111110111"
    )


def test_trains_on_is_the_rule_as_written() -> None:
    split = Split(seed=7, number=1, draw=2, test_share=0.25)
    for digest in DIGESTS[:200]:
        drawn = int(hashlib.sha256(f"7/1/2:{digest}".encode()).hexdigest()[:15], 16)
        assert split.trains_on(digest) == (drawn / 16**15 < 0.75)


@pytest.mark.parametrize("test_share", [0.001, 0.1, 0.33, 0.5, 0.9, 0.999])
def test_share_is_within_five_standard_deviations(test_share: float) -> None:
    split = Split(seed=1, number=0, draw=0, test_share=test_share)
    held_out = sum(not split.trains_on(digest) for digest in DIGESTS)
    expected = len(DIGESTS) * test_share
    assert abs(held_out - expected) <= 5 * math.sqrt(expected * (1 - test_share))


@pytest.mark.parametrize("other", [Split(2, 0, 0, 0.5), Split(1, 1, 0, 0.5), Split(1, 0, 1, 0.5)])
def test_seed_number_and_draw_give_independent_splits(other: Split) -> None:
    first = Split(seed=1, number=0, draw=0, test_share=0.5)
    same = sum(first.trains_on(digest) == other.trains_on(digest) for digest in DIGESTS)
    assert abs(same - len(DIGESTS) / 2) <= 5 * math.sqrt(len(DIGESTS) / 4)


@given(shares, shares)
def test_a_smaller_test_part_only_moves_texts_into_training(one: float, two: float) -> None:
    larger, smaller = Split(1, 0, 0, max(one, two)), Split(1, 0, 0, min(one, two))
    for digest in DIGESTS[:50]:
        assert larger.trains_on(digest) <= smaller.trains_on(digest)


@pytest.mark.parametrize("test_share", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_share_that_empties_a_part_is_refused(test_share: float) -> None:
    with pytest.raises(ValueError, match="test_share"):
        Split(seed=1, number=0, draw=0, test_share=test_share)


@pytest.mark.parametrize("column", ["", "a b", "a'", "a)", "1a", "a.b", "å", "a\n", "x; drop table y", "`a`"])
def test_column_that_is_no_identifier_is_refused(column: str) -> None:
    with pytest.raises(ValueError, match="plain identifier"):
        Split(seed=1, number=0, draw=0, test_share=0.5).sql(column)


def test_seed_cannot_carry_sql() -> None:
    with pytest.raises(ValueError, match="format"):
        Split(seed="1') or (1=1", number=0, draw=0, test_share=0.5).sql("d")  # type: ignore[arg-type]


# ---------------------------------------------------------------- redraw


def test_first_draw_that_serves_every_label_is_taken() -> None:
    """With two texts a label and six labels about one draw in sixty serves."""
    labelled = [(digest, [f"label {number // 2}"]) for number, digest in enumerate(DIGESTS[:12])]

    def serves(split: Split) -> bool:
        sides = {(label, split.trains_on(digest)) for digest, (label,) in labelled}
        return len(sides) == 12

    for number in range(5):
        split = draw_split(9, number, 0.5, labelled)
        assert (split.seed, split.number, split.test_share) == (9, number, 0.5)
        assert [serves(Split(9, number, draw, 0.5)) for draw in range(split.draw + 1)] == [
            *[False] * split.draw,
            True,
        ]
    assert any(draw_split(9, number, 0.5, labelled).draw > 0 for number in range(5))


def test_draw_that_serves_at_once_is_draw_0() -> None:
    assert draw_split(1, 0, 0.33, [(digest, ["common"]) for digest in DIGESTS]).draw == 0


def test_draw_does_not_depend_on_the_order_of_documents_and_copies() -> None:
    labelled = [(digest, [f"label {number % 5}"]) for number, digest in enumerate(DIGESTS[:15])]
    assert draw_split(3, 0, 0.33, labelled) == draw_split(3, 0, 0.33, [*reversed(labelled), *labelled])


def test_documents_may_have_several_labels_or_none() -> None:
    labelled = [(DIGESTS[0], ["a", "b"]), (DIGESTS[1], []), (DIGESTS[2], ["b", "a"])]
    split = draw_split(1, 0, 0.5, labelled)
    assert split.trains_on(DIGESTS[0]) != split.trains_on(DIGESTS[2])


def test_label_with_one_text_is_named() -> None:
    """Copies of one text are on one side whatever is drawn."""
    labelled = [(digest, ["common"]) for digest in DIGESTS[:50]]
    labelled += [(DIGESTS[50], ["twin"]), (DIGESTS[50], ["twin"]), (DIGESTS[51], ["single", "common"])]
    with pytest.raises(CorpusError, match=r"\['single', 'twin'\].*only one text") as caught:
        draw_split(1, 0, 0.33, labelled)
    assert "common" not in str(caught.value)


def test_labels_too_rare_for_the_share_are_named() -> None:
    labelled = [(digest, ["rare"]) for digest in DIGESTS[:2]] + [(digest, ["common"]) for digest in DIGESTS]
    with pytest.raises(CorpusError, match=r"\['rare'\].*draw 1000"):
        draw_split(1, 0, 0.000_01, labelled[:2])
    assert draw_split(1, 0, 0.33, labelled).draw < 100


@pytest.mark.parametrize("labelled", [[], [(DIGESTS[0], []), (DIGESTS[1], [])]])
def test_training_without_labels_is_refused(labelled: list[tuple[str, list[str]]]) -> None:
    with pytest.raises(CorpusError, match="no label"):
        draw_split(1, 0, 0.33, labelled)
