"""What comes of explaining a text. Plain values: neither torch nor Spark."""

from __future__ import annotations

from dataclasses import dataclass

from lexplain.words import Word


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a text was given one of its labels.

    Attributes:
        label: The label that is explained, or the name of a regression's output.
        label_rank: 0 for the most probable of the labels that are explained.
        probability: Of the label; None for a regression.
        target_score: F(x), the label's logit, what it has more than another's, or the regression's output; mean over windows.
        baseline_score: F(baseline), mean over windows.
        completeness_gap: F(x) - F(baseline) - sum of the token scores, before any of it is distributed; of a mask what the
            kept text lacks. None where scores are sizes without a sign, which are no parts of a logit.
        completeness_gap_relative: |gap| / |F(x) - F(baseline)|; None when the two are equal, or without a gap.
        evaluations: Points at which a gradient was taken, over all windows.
        converged: The method's stopping rule was met in every window.
        token_norm: L2 norm of the text's token scores.
        n_tokens: Content tokens that some window held.
        n_windows: Windows that were explained.
        other_score: Sum of scores outside words: punctuation, symbols, white space.
        words: The words that the model has seen, by falling score, ties in the order of the text.
        spans: Neighbouring words that a mask keeps, whatever their sign, in the order of the text, with their mean
            score; none where the method makes no mask.
    """

    label: str
    label_rank: int
    probability: float | None
    target_score: float
    baseline_score: float
    completeness_gap: float | None
    completeness_gap_relative: float | None
    evaluations: int
    converged: bool
    token_norm: float
    n_tokens: int
    n_windows: int
    other_score: float
    words: list[tuple[Word, float]]
    spans: list[tuple[list[Word], float]]


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a text has no explanation.

    Attributes:
        reason: `no_words`, `not_tokenized`, `not_finite`, `not_converged`, `out_of_memory`, or the reason of a
            DocumentError.
        message: For people.
    """

    reason: str
    message: str


Outcome = list[Explanation] | Rejection
"""One explanation for each label that was predicted or asked for, most probable first; empty when there is none. A
regression's output is explained for every text."""


@dataclass(frozen=True, slots=True)
class Settled:
    """A predicted label of a text that is not explained: its class has all the evidence that it needs.

    Attributes:
        label: The label.
        label_rank: As an Explanation's.
        probability: Of the label.
    """

    label: str
    label_rank: int
    probability: float | None
