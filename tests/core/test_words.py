"""Words: segmentation, keys, and token scores merged by characters."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from lexplain.errors import DocumentError
from lexplain.words import Word, merge_tokens, segment, word_key

Rule = Literal["sum", "absmax"]

TEXTS = {
    "swedish": "Åsa köpte två kanelbullar på Söder; EU:s 3,5 procent, sa hon.",
    "french": "L'année 2022 fut « belle », n'est-ce pas ? Prix\u202f: 10\u202f000 €.",
    "english": "Don't e-mail foo_bar@example.com -- it's 3.14, okay?",
    "chinese": "我们喜欢机器学习，中文分词很有意思。",
    "japanese": "日本語の文章を単語に分けます。カタカナも！",
    "thai": "ภาษาไทยไม่มีช่องว่างระหว่างคำ",
    "hindi": "हिन्दी में लिखा हुआ एक वाक्य है।",
    "arabic": "هذا نص عربي قصير، أليس كذلك؟",
    "emoji": "Hej 👩‍👩‍👧‍👦 världen 🇸🇪! Bra 👍🏽 jobbat😀igen 1️⃣",
    "combining": "Cafe\u0301 o\u0308ver A\u030asa ist\u0327e",
    "no_spaces": "utanmellanslag" * 9,
    "odd_spaces": "\ta  b\u00a0c\u3000d\r\n\r\n e\u2028f \u200bg\u00adh\ufeff",
}


def surfaces(text: str) -> list[str]:
    return [text[word.start : word.end] for word in segment(text)]


# ---------------------------------------------------------------- segmentation


@pytest.mark.parametrize(
    ("language", "expected"),
    [
        ("swedish", "Åsa köpte två kanelbullar på Söder EU:s 3,5 procent sa hon"),
        ("french", "L'année 2022 fut belle n'est ce pas Prix 10\u202f000"),
        ("english", "Don't e mail foo_bar example.com it's 3.14 okay"),
        ("chinese", "我们 喜欢 机器 学习 中文 分词 很 有意思"),
        ("japanese", "日本語 の 文章 を 単語 に 分け ます カタカナ も"),
        ("thai", "ภาษา ไทย ไม่มี ช่อง ว่าง ระหว่าง คำ"),
        ("hindi", "हिन्दी में लिखा हुआ एक वाक्य है"),
        ("emoji", "Hej världen Bra jobbat igen 1️⃣"),
        ("no_spaces", "utanmellanslag" * 9),
    ],
)
def test_words_of_a_language(language: str, expected: str) -> None:
    assert surfaces(TEXTS[language]) == expected.split(" ")


def test_offsets_count_code_points_behind_emoji() -> None:
    """UTF-16 offsets would be one too far for each emoji before the word."""
    text = "👩‍👩‍👧 köpa 😀 ja"
    assert segment(text) == [Word("köpa", 6, 10), Word("ja", 13, 15)]


def test_decomposed_text_keeps_its_offsets_and_gets_a_composed_key() -> None:
    text = "Cafe\u0301 O\u0308L"
    assert segment(text) == [Word("caf\u00e9", 0, 5), Word("\u00f6l", 6, 9)]


@pytest.mark.parametrize("text", ["", " ", "...", "!?  — «»", "😀👍🏽🇸🇪", "\u0301", "_", "\x00\n", "€ + = ©"])
def test_text_without_words(text: str) -> None:
    assert segment(text) == []


@pytest.mark.parametrize(("text", "place"), [("a\ud800b", 1), ("\udc00", 0), ("ok \udfff", 3)])
def test_lone_surrogate_is_refused(text: str, place: int) -> None:
    with pytest.raises(DocumentError) as caught:
        segment(text)
    assert caught.value.reason == "lone_surrogate"
    # The message is stored in a table, which must be able to hold it.
    assert f"text[{place}]='\\ud" in str(caught.value).encode("utf-8").decode("utf-8")


def test_control_characters_move_nothing() -> None:
    assert segment("a\x00b \ufeffc") == [Word("a", 0, 1), Word("b", 2, 3), Word("c", 5, 6)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("_so_ __it__", [Word("so", 1, 3), Word("it", 7, 9)]),
        ("Prix\u202f: «\u202fbon\u202f»", [Word("prix", 0, 4), Word("bon", 9, 12)]),
        ("\u200fשלום\u200f \u202bא\u202c", [Word("שלום", 1, 5), Word("א", 8, 9)]),
        ("slut\u00ad\ufeff", [Word("slut", 0, 4)]),
        ("foo_bar", [Word("foo_bar", 0, 7)]),
        # A final joiner is a letter's spelling (Malayalam chillu), and a mark is part of its letter.
        ("അവന്\u200d", [Word("അവന്\u200d", 0, 5)]),
        ("ne\u0301", [Word("n\u00e9", 0, 3)]),
    ],
)
def test_edges_of_a_word(text: str, words: list[Word]) -> None:
    """A word beside an underscore or a narrow no-break space used to have a key of its own."""
    assert segment(text) == words


@pytest.mark.parametrize(
    ("surface", "key"),
    [
        ("KÖPA", "köpa"),
        ("O\u0308l", "\u00f6l"),
        ("ΟΔΟΣ", "οδος"),
        ("Straße", "straße"),
        ("Don't", "don't"),
        # H with macron below has no composed form, h with macron below has: one word, one key.
        ("H\u0331ag", "\u1e96ag"),
        ("\u1e96ag", "\u1e96ag"),
    ],
)
def test_word_key(surface: str, key: str) -> None:
    assert word_key(surface) == key


# ---------------------------------------------------------------- properties

# Letters, marks, digits, spaces, symbols and joiners of many scripts, dense in what breaks offsets.
mixed_characters = st.sampled_from(
    "aB9é \t\n.,'’-_:\u0301\u0308\u0327\u00ad\u200b\u200d\ufe0f\u20e3\u202f\u00a0\u3000"
    "中文日本語カタのภาษไทหिन्दी한글שلاא😀👩👧🏽🇸🇪𝒜𐐷𠮷"
)
mixed_texts = st.text(mixed_characters, max_size=60)
any_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
texts = mixed_texts | any_texts
token_scores = st.floats(-1e6, 1e6, allow_nan=False)


@st.composite
def scored_tokens(draw: st.DrawFn) -> tuple[str, NDArray[np.int64], NDArray[np.float64]]:
    """A text with tokens anywhere on it: overlapping, empty, out of order, over many words."""
    text = draw(texts)
    place = st.integers(0, len(text))
    spans = draw(st.lists(st.tuples(place, place).map(sorted), max_size=30))
    scores = draw(st.lists(token_scores, min_size=len(spans), max_size=len(spans)))
    return text, np.array(spans, dtype=np.int64).reshape(-1, 2), np.array(scores, dtype=np.float64)


@given(texts)
def test_words_are_in_order_and_do_not_overlap(text: str) -> None:
    words = segment(text)
    borders = [border for word in words for border in (word.start, word.end)]
    assert borders == sorted(borders)
    assert all(0 <= word.start < word.end <= len(text) for word in words)


@given(texts)
def test_every_letter_and_number_is_in_exactly_one_word(text: str) -> None:
    times = [0] * len(text)
    for word in segment(text):
        assert any(unicodedata.category(character)[0] in "LN" for character in text[word.start : word.end])
        for place in range(word.start, word.end):
            times[place] += 1
    for place, character in enumerate(text):
        assert times[place] <= 1
        if unicodedata.category(character)[0] in "LN":
            assert times[place] == 1, (text, place)


@given(texts)
def test_key_is_of_the_original_characters(text: str) -> None:
    for word in segment(text):
        assert word.key == word_key(text[word.start : word.end])


@given(texts)
def test_key_is_composed_and_its_own_key(text: str) -> None:
    key = word_key(text)
    assert unicodedata.is_normalized("NFC", key)
    assert word_key(key) == key
    assert word_key(unicodedata.normalize("NFD", text)) == key


# ---------------------------------------------------------------- merging


def spread_slowly(
    words: Sequence[Word], offsets: NDArray[np.int64], scores: NDArray[np.float64], text: str
) -> tuple[list[list[float]], float]:
    """Say `merge_tokens` again, character by character: each word's parts, and what is outside words."""
    word_at = {place: number for number, word in enumerate(words) for place in range(word.start, word.end)}
    parts: list[list[float]] = [[] for _ in words]
    other = 0.0
    for (start, end), score in zip(offsets.tolist(), scores.tolist(), strict=True):
        places = [place for place in range(start, end) if not text[place].isspace()]
        part_of: dict[int, float] = {}
        for place in places:
            if place in word_at:
                part_of[word_at[place]] = part_of.get(word_at[place], 0.0) + score / len(places)
            else:
                other += score / len(places)
        if not places:
            other += score
        for number, part in part_of.items():
            parts[number].append(part)
    return parts, other


def check_merging(text: str, offsets: NDArray[np.int64], scores: NDArray[np.float64]) -> None:
    words = segment(text)
    rounding = 1e-12 * float(np.abs(scores).sum()) + 1e-300  # the last for scores near the least float
    parts, slow_other = spread_slowly(words, offsets, scores, text)
    summed, other = merge_tokens(words, offsets, scores, text, rule="sum")
    assert summed.shape == (len(words),)
    assert summed.dtype == np.float64
    np.testing.assert_allclose(summed, [sum(own) for own in parts], rtol=0, atol=rounding)
    assert other == pytest.approx(slow_other, rel=0, abs=rounding)
    assert summed.sum() + other == pytest.approx(scores.sum(), rel=0, abs=rounding)
    largest, other_again = merge_tokens(words, offsets, scores, text, rule="absmax")
    assert other_again == other
    for value, own in zip(largest.tolist(), parts, strict=True):
        # Parts that only rounding tells apart are all right; exact ties have a test of their own.
        peak = max(map(abs, own), default=0.0)
        candidates = [part for part in own if abs(part) >= peak - rounding] or [0.0]
        assert min(abs(value - part) for part in candidates) <= rounding


@given(scored_tokens())
def test_merging_equals_the_slow_one_and_keeps_the_total(
    tokens: tuple[str, NDArray[np.int64], NDArray[np.float64]],
) -> None:
    text, offsets, scores = tokens
    check_merging(text, offsets, scores)


def build_wordpiece() -> Tokenizer:
    """As BERT: lower-case, accents stripped (so characters vanish), marks for special tokens."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS.values(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def build_byte_level(*, trim_offsets: bool) -> Tokenizer:
    """As RoBERTa and GPT-2: a space belongs to its token, bytes of one character share its offsets."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS.values(), trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), trim_offsets=trim_offsets)
    return tokenizer


def build_unigram(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    """As XLM-R, ALBERT and DeBERTa-v2: text normalised by NFKC, a space written as a visible mark."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS.values(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "wordpiece": build_wordpiece,
    "byte_level": lambda: build_byte_level(trim_offsets=False),
    "byte_level_trimmed": lambda: build_byte_level(trim_offsets=True),
    "metaspace": lambda: build_unigram(pre_tokenizers.Metaspace()),
    "metaspace_of_split": lambda: build_unigram(
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    ),
    # Without a split at spaces one token may span two words.
    "metaspace_unsplit": lambda: build_unigram(pre_tokenizers.Metaspace(split=False)),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]()


@pytest.mark.parametrize("language", TEXTS)
def test_merging_for_a_tokenizer_and_language(tokenizer: Tokenizer, language: str) -> None:
    text = TEXTS[language]
    offsets = np.array(tokenizer.encode(text).offsets, dtype=np.int64)
    scores = np.random.default_rng(len(text)).normal(size=len(offsets))
    assert len(offsets) > 2
    check_merging(text, offsets, scores)


@pytest.mark.parametrize("language", TEXTS)
def test_every_word_has_a_score_when_every_token_has(tokenizer: Tokenizer, language: str) -> None:
    """A word without a token would be a word that no explanation can ever rank."""
    text = TEXTS[language]
    offsets = np.array(tokenizer.encode(text).offsets, dtype=np.int64)
    merged, _ = merge_tokens(segment(text), offsets, np.ones(len(offsets)), text, rule="sum")
    assert (merged > 0).all()


def test_e12_a_sentence_without_spaces_is_not_one_word() -> None:
    """`word_ids()` called the whole sentence one word; its bare mark shares the first character's offsets."""
    text = "今日は晴れ"
    encoding = TOKENIZERS["metaspace_of_split"]().encode(text)
    assert {word for word in encoding.word_ids if word is not None} == {0}
    offsets = np.array(encoding.offsets, dtype=np.int64)
    assert offsets[1].tolist() == [0, 1]
    assert surfaces(text) == ["今日", "は", "晴れ"]
    check_merging(text, offsets, np.arange(1.0, len(offsets) + 1))


def test_e17_pieces_of_a_word_are_one_word() -> None:
    """Pieces were fused by their marks, which a word's inner pieces do not have in byte-level BPE."""
    text = "so unbelievable, so"
    offsets = np.array(TOKENIZERS["byte_level"]().encode(text).offsets, dtype=np.int64)
    pieces = [(start, end) for start, end in offsets.tolist() if start < 15 and end > 3]
    assert len(pieces) > 2
    scores = np.array([float(start < 15 and end > 3) for start, end in offsets.tolist()])
    merged, other = merge_tokens(segment(text), offsets, scores, text, rule="sum")
    assert merged.tolist() == [0.0, pytest.approx(len(pieces)), 0.0]
    assert other == pytest.approx(0.0)


def merge(text: str, tokens: Sequence[tuple[int, int, float]], rule: Rule = "sum") -> tuple[list[float], float]:
    offsets = np.array([token[:2] for token in tokens], dtype=np.int64).reshape(-1, 2)
    scores = np.array([token[2] for token in tokens], dtype=np.float64)
    merged, other = merge_tokens(segment(text), offsets, scores, text, rule=rule)
    return merged.tolist(), other


@pytest.mark.parametrize(
    ("text", "tokens", "expected"),
    [
        pytest.param("ja nej", [(0, 0, 9.0), (0, 2, 1.0), (3, 6, 2.0)], ([1.0, 2.0], 9.0), id="special"),
        pytest.param("ja nej", [(0, 2, 1.0), (2, 6, 2.0)], ([1.0, 2.0], 0.0), id="space_in_token"),
        pytest.param("ja nej", [(0, 2, 1.0), (2, 3, 4.0), (3, 6, 2.0)], ([1.0, 2.0], 4.0), id="space_alone"),
        pytest.param("ja, nej", [(0, 3, 3.0)], ([2.0, 0.0], 1.0), id="word_and_punctuation"),
        pytest.param("ja nej", [(0, 6, 5.0)], ([2.0, 3.0], 0.0), id="two_words"),
        pytest.param("ö", [(0, 1, 1.0), (0, 1, 2.0)], ([3.0], 0.0), id="bytes_of_one_character"),
        pytest.param("hejsan", [(3, 6, 1.0), (0, 3, -3.0)], ([-2.0], 0.0), id="out_of_order"),
        pytest.param("hejsan", [(3, 3, 7.0)], ([0.0], 7.0), id="empty_span_in_a_word"),
        pytest.param("10\u202f000", [(2, 3, 7.0), (0, 6, 1.0)], ([1.0], 7.0), id="space_in_a_word"),
        pytest.param("...", [(0, 3, 1.5)], ([], 1.5), id="no_words"),
        pytest.param("ja", [], ([0.0], 0.0), id="no_tokens"),
        pytest.param("", [(0, 0, 1.0)], ([], 1.0), id="no_text"),
    ],
)
def test_sum(text: str, tokens: Sequence[tuple[int, int, float]], expected: tuple[list[float], float]) -> None:
    assert merge(text, tokens) == expected


@pytest.mark.parametrize(
    ("text", "tokens", "expected"),
    [
        pytest.param("hejsan", [(0, 3, 1.0), (3, 6, -3.0)], ([-3.0], 0.0), id="signed"),
        pytest.param("hejsan", [(0, 3, 2.0), (3, 6, -2.0)], ([-2.0], 0.0), id="tie_later"),
        pytest.param("hejsan", [(3, 6, -2.0), (0, 3, 2.0)], ([2.0], 0.0), id="tie_later_in_token_order"),
        pytest.param("ja, nej", [(0, 3, 3.0), (4, 7, 1.0)], ([2.0, 1.0], 1.0), id="part_in_the_word"),
    ],
)
def test_absmax(text: str, tokens: Sequence[tuple[int, int, float]], expected: tuple[list[float], float]) -> None:
    assert merge(text, tokens, "absmax") == expected


@pytest.mark.parametrize("space", [c for c in map(chr, range(sys.maxunicode + 1)) if c.isspace()], ids=ascii)
def test_white_space_takes_no_part_of_a_score(space: str) -> None:
    assert merge(f"!{space}b", [(1, 3, 2.0), (1, 2, 4.0)]) == ([2.0], 4.0)


def test_a_token_inside_one_word_gives_its_score_unchanged() -> None:
    """0.1 * 3 / 3 is not 0.1 in floating point; a score must not change on its way to its word."""
    assert merge("hej", [(0, 3, 0.1)]) == ([0.1], 0.0)


@pytest.mark.parametrize(
    ("offsets", "scores", "message"),
    [
        ([[0, 3]], [1.0, 2.0], r"offsets\.shape=\(1, 2\)"),
        ([[0, 3, 1]], [1.0], r"offsets\.shape=\(1, 3\)"),
        ([[0, 2], [0, 4]], [1.0, 1.0], r"offsets\[1\]=\[0, 4\]"),
        ([[-1, 2]], [1.0], r"offsets\[0\]=\[-1, 2\]"),
        ([[2, 1]], [1.0], r"offsets\[0\]=\[2, 1\]"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(offsets: list[list[int]], scores: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_tokens(segment("hej"), np.array(offsets), np.array(scores), "hej", rule="sum")


def test_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="merge='max'"):
        merge_tokens(segment("hej"), np.array([[0, 3]]), np.ones(1), "hej", rule="max")  # type: ignore[arg-type]
