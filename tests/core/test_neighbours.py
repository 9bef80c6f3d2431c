"""LAFA and its index of reference documents: slow re-statements, closed forms, batches, models left as they were."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import oracles
from core.models import BATCH_TOLERANCE, FAMILIES, LINES, TEXTS, Shelf, count_passes
from core.test_engine import LABELS, LONG_TEXT, MULTI_LABEL, assert_close, explanations, only, word_scores
from lexplain.classifier import Classifier
from lexplain.engine import Explainer
from lexplain.errors import MethodError, ModelError
from lexplain.methods import Attribution, Evaluate, Inputs, find_method
from lexplain.methods.neighbours import Kernel
from lexplain.neighbours import Reference, ReferenceIndex, choose_layer
from lexplain.words import segment

LAFA = find_method("lafa")
EMBEDDING_KERNELS: tuple[Kernel, ...] = ("cosine", "rbf", "laplacian", "cubic", "l2_inverse")
# Every reference is a neighbour, of whatever class; one gradient.
WIDE = {"base": "saliency", "quantile": 1.0, "same_class": False, "neighbours": 20}


def explainer(classifier: Classifier, prepared: object = None, method: Any = LAFA, **changes: Any) -> Explainer:
    settings = {"max_tokens": 40, "overlap": 6, "max_windows": None, "merge": "sum", "budget_tokens": 600}
    settings |= {name: changes.pop(name) for name in list(changes) if name in settings}
    return Explainer(classifier, method, changes, prepared=prepared, **settings)


def sample(
    classifier: Classifier, texts: tuple[str, ...] = LINES, layer: int | None = 1, **options: Any
) -> list[Reference]:
    sampling = explainer(classifier, **options)
    return sampling.sample_references(sampling.read_texts(texts), layer)


def index(classifier: Classifier, texts: tuple[str, ...] = LINES, layer: int = 1, **options: Any) -> ReferenceIndex:
    return ReferenceIndex.build(sample(classifier, texts, layer, **options), layer)


def forget_texts(made: ReferenceIndex) -> ReferenceIndex:
    """The same references, as those of other texts: no self-match is told."""
    return dataclasses.replace(made, texts=-2 - torch.arange(len(made.texts)))


def run_and_keep(
    classifier: Classifier, texts: tuple[str, ...], prepared: object, **options: Any
) -> tuple[Inputs, Attribution]:
    """What the method was given for texts in one batch, and what it returned."""
    seen = []

    def function(evaluate: Evaluate, inputs: Inputs, **options: Any) -> Attribution:
        seen.append((inputs, LAFA.function(evaluate, inputs, **options)))
        return seen[-1][1]

    spy = dataclasses.replace(LAFA, function=function)
    explainer(classifier, prepared, spy, max_windows=1, budget_tokens=10_000, **options).explain(texts)
    ((inputs, attribution),) = seen
    return inputs, attribution


# --- hidden states ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_transformers_own(shelf: Shelf, family: str) -> None:
    """Of a padded batch, against each text alone; transformers leaves hooks behind, so on a model of its own."""
    classifier = shelf.classifier(family)
    windows = [classifier.encode(text, max_tokens=40, overlap=6, max_windows=1).windows[0] for text in TEXTS]
    batch = classifier.collate(windows)
    found = classifier.pool_layers(classifier.embed(batch.ids), batch.mask, batch.token_types)
    model = AutoModelForSequenceClassification.from_pretrained(shelf.folder(family)).eval()
    for row, window in enumerate(windows):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([window.ids]), output_hidden_states=True).hidden_states
        assert found.shape[1:] == (len(states), classifier.model.config.hidden_size)
        # ModernBERT tells the last layer's states after the final norm
        layers = len(states) - (family == "modernbert")
        expected = torch.stack([layer[0].double().mean(0) for layer in states[:layers]])
        torch.testing.assert_close(found[row, :layers], expected, rtol=1e-4, atol=BATCH_TOLERANCE)


def test_hidden_states_are_those_of_the_callers_thread(shelf: Shelf) -> None:
    """While one thread reads the layers, another one reads them for another text."""
    classifier = shelf.classifier("bert")
    windows = [classifier.encode(text, max_tokens=40, overlap=6, max_windows=1).windows[0] for text in TEXTS[:2]]
    batches = [classifier.collate([window]) for window in windows]

    def pool(number: int) -> Tensor:
        batch = batches[number]
        return classifier.pool_layers(classifier.embed(batch.ids), batch.mask, batch.token_types)

    expected, main, others = [pool(0), pool(1)], threading.get_ident(), []

    def interrupt(*_: object) -> None:
        if threading.get_ident() == main:
            other = threading.Thread(target=lambda: others.append(pool(1)))
            other.start()
            other.join()

    hook = classifier.model.base_model.encoder.layer[0].register_forward_hook(interrupt)
    try:
        assert torch.equal(pool(0), expected[0])
    finally:
        hook.remove()
    assert len(others) == 1
    assert torch.equal(others[0], expected[1])


def test_a_model_without_layers_says_so(shelf: Shelf) -> None:
    """Also to a method of another package, whose own check has not looked."""

    def function(evaluate: Evaluate, inputs: Inputs, **_: Any) -> Attribution:
        return Attribution.from_scores(evaluate.hidden().sum(-1), evaluate, inputs, evaluations=0)

    method = dataclasses.replace(find_method("saliency"), function=function)
    with pytest.raises(ModelError, match=r"model_type='textcnn' must have its layers at one of"):
        explainer(shelf.classifier("textcnn"), method=method).explain(TEXTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_left_as_it_was(shelf: Shelf, family: str) -> None:
    classifier = shelf.classifier(family)
    weights = {name: weight.clone() for name, weight in classifier.model.state_dict().items()}
    prepared = index(classifier, base="saliency")
    for kernel in ("indicator", "cosine"):
        explainer(classifier, prepared, base="saliency", kernel=kernel).explain(TEXTS)
    assert all(torch.equal(weight, weights[name]) for name, weight in classifier.model.state_dict().items())
    assert all(weight.grad is None and not weight.requires_grad for weight in classifier.model.parameters())
    for module in classifier.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


# --- the whole method, slowly -------------------------------------------------------------------------------------


def name_words(text: str, offsets: list[tuple[int, int]], ids: list[int]) -> list[tuple[str, int]]:
    """Each token's word key, or its id outside words, and how many tokens the word has."""
    words = segment(text)
    owners = [next((n for n, word in enumerate(words) if word.start < stop <= word.end), None) for _, stop in offsets]
    return [
        (str(number), 1) if owner is None else (words[owner].key, owners.count(owner))
        for number, owner in zip(ids, owners, strict=True)
    ]


@pytest.mark.parametrize("kernel", ["indicator", *EMBEDDING_KERNELS])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_scores_equal_the_slow_ones(shelf: Shelf, family: str, kernel: Any) -> None:
    """Neighbours by brute force within a cut-off, their scores, the kernel, the words: from ids to word scores."""
    slow = oracles.SlowExplainer(shelf.folder(family))
    classifier = shelf.classifier(family, dtype=torch.float64)
    prepared, layer, count = index(classifier, layer=2, base="saliency"), 2, 3
    words_of, vectors, scores, labels = {}, {}, {}, {}
    texts = tuple(text for text in TEXTS if text != "phone")
    options = {
        "base": "saliency",
        "neighbours": count,
        "same_class": False,
        "kernel": kernel,
        "weight": 0.7,
        "layer": 2,
    }
    explained = dict(
        zip(texts, explainer(classifier, prepared, quantile=0.6, max_windows=1, **options).explain(texts), strict=True)
    )
    predicted = dict(zip(LINES, explainer(classifier, forget_texts(prepared), **options).explain(LINES), strict=True))
    embed = slow.model.get_input_embeddings().weight.detach().tolist()
    offsets = {}
    for text, outcome in (explained | predicted).items():
        labels[text] = LABELS.index(explanations(outcome)[0].label)
        states, scores[text] = slow.measure(text, labels[text], 40)
        vectors[text] = states[layer]
        (ids, *_), offsets[text] = slow.windows(text, 40, 6)
        offsets[text] = offsets[text][: len(ids)]
        named = name_words(text, offsets[text], ids)
        words_of[text] = named if kernel == "indicator" else [embed[number] for number in ids]
    cut_off = prepared.cut_off(0.6)

    def similar(mine: Any, theirs: Any) -> float:
        if kernel == "indicator":
            return (mine[0] == theirs[0]) / mine[1]
        return oracles.compare_embeddings(kernel, mine, theirs)

    used = set()
    for text, outcome in explained.items():
        distances = {line: float(np.linalg.norm(vectors[text] - vectors[line])) for line in LINES}
        near = sorted((line for line in LINES if distances[line] < cut_off), key=distances.__getitem__)[:count]
        used.add(len(near))
        neighbours = [(scores[line], words_of[line]) for line in near]
        expected = oracles.lafa(scores[text], words_of[text], neighbours, similar, 0.7).clip(min=0)
        found = only(outcome)
        spans = [(word.start, word.end) for word, _ in sorted(found.words, key=lambda pair: pair[0].start)]
        words, other = oracles.words_by_character(text, spans, offsets[text], expected.tolist())
        # references are kept in float32
        np.testing.assert_allclose(word_scores(found), [*words, other], rtol=1e-5, atol=1e-5 * max(words))
    assert used - {0}


def test_a_copy_of_the_text_as_its_only_neighbour_is_equation_7(shelf: Shelf) -> None:
    classifier = shelf.classifier("bert", dtype=torch.float64)
    text = "The phone said the bank said the phone was the new phone"
    made = forget_texts(index(classifier, (text,), base="saliency"))
    inputs, found = run_and_keep(classifier, (text,), made, base="saliency", weight=0.44)
    base = explainer(classifier, method=find_method("saliency"), max_windows=1).explain([text])
    words = sorted(only(base[0]).words, key=lambda pair: pair[0].start)
    tokens = inputs.special[0].logical_not().sum().item()
    expected = [
        score + 0.44 / tokens * sum(other for theirs, other in words if theirs.key == word.key) for word, score in words
    ]
    sums = torch.zeros(len(words), dtype=torch.float64)
    sums.index_add_(0, inputs.words[0][~inputs.special[0]], found.scores[0][~inputs.special[0]])
    np.testing.assert_allclose(sums, expected, rtol=1e-6)
    assert sums.numpy() != pytest.approx([score for _, score in words], rel=1e-3)


def test_equal_words_in_other_case_and_other_tokens(shelf: Shelf) -> None:
    """A cased tokenizer cuts `PHONE` into letters: the word is the same, and gets what `phone` has once."""
    classifier = shelf.classifier("roberta", dtype=torch.float64)
    made = index(classifier, ("the phone",), base="saliency")
    inputs, found = run_and_keep(classifier, ("A PHONE",), made, weight=1.0, **WIDE)
    base = run_and_keep(classifier, ("A PHONE",), made, weight=0.0, **WIDE)[1]
    gained = (found.scores - base.scores)[0][inputs.words[0] == 1]
    assert len(gained) > 1
    torch.testing.assert_close(gained, gained[:1].expand_as(gained))
    shares = made.scores[made.words == made.words[-1]].double().sum() / len(made.words)
    torch.testing.assert_close(gained.sum(), shares)


# --- what options mean --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["saliency", "smoothgrad"])
@pytest.mark.parametrize("sign", ["none", "gradient_x_input"])
def test_weight_0_is_the_base_method(shelf: Shelf, base: str, sign: str) -> None:
    classifier = shelf.classifier("bert")
    options = {} if base == "saliency" else {"samples": 4, "noise": 0.2}
    made = index(classifier, base="saliency")
    asked = {"base": base, "sign": sign, "same_class": False, "quantile": 1.0} | options

    def with_base(evaluate: Evaluate, inputs: Inputs, **_: Any) -> Attribution:
        expected = find_method(base).function(evaluate, inputs, sign=sign, **options)
        found = LAFA.function(evaluate, inputs, weight=0.0, **asked)
        more = LAFA.function(evaluate, inputs, weight=5.0, **asked)
        torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=0)
        torch.testing.assert_close(found.completeness_gap, expected.completeness_gap)
        torch.testing.assert_close(found.evaluations, expected.evaluations)
        assert torch.equal(more.scores < 0, expected.scores < 0)
        assert (more.scores.abs() >= expected.scores.abs()).all()
        assert (more.scores != expected.scores).any()
        return found

    explainer(classifier, made, dataclasses.replace(LAFA, function=with_base), **asked).explain(TEXTS)


@pytest.mark.parametrize("options", [{"base": "saliency"}, {"samples": 3}])
def test_the_declared_cost_is_what_is_counted(shelf: Shelf, options: dict[str, Any]) -> None:
    classifier = shelf.classifier("bert")
    explaining = explainer(classifier, index(classifier, **options), **options)
    with count_passes(classifier) as passes:
        ((found,),) = explaining.explain([LINES[0]])
    assert found.n_windows == 1
    declared = LAFA.tell_cost(options, found.n_tokens)
    assert declared is not None
    # less the prediction, and the pass that hidden states are read from, which never reaches the logits
    assert declared - 1 == passes.sequences - 1 + passes.backward_sequences


def test_a_text_without_neighbours_has_its_base_scores(shelf: Shelf) -> None:
    """Its own text is none, though it is in the index, and nothing is nearer than the smallest distance of all."""
    classifier = shelf.classifier("bert")
    alone = index(classifier, (TEXTS[0],), base="saliency")
    many = index(classifier, base="saliency")
    base = only(explainer(classifier, method=find_method("saliency")).explain([TEXTS[0]])[0])
    for prepared, options in ((alone, WIDE), (many, WIDE | {"quantile": 0.0})):
        found = only(explainer(classifier, prepared, weight=9.0, **options).explain([TEXTS[0]])[0])
        assert word_scores(found).tolist() == word_scores(base).tolist()
    found = only(explainer(classifier, forget_texts(alone), weight=9.0, **WIDE).explain([TEXTS[0]])[0])
    assert (word_scores(found)[:-1] > word_scores(base)[:-1]).all()


def test_unit_max_takes_the_unit_out(shelf: Shelf) -> None:
    """Scores a thousand times as large in the references change nothing; the largest own score becomes 1."""
    classifier = shelf.classifier("bert")
    made = index(classifier, base="saliency")
    louder = dataclasses.replace(made, scores=made.scores * 1000)
    found = [run_and_keep(classifier, TEXTS, one, scale="unit_max", **WIDE)[1].scores for one in (made, louder)]
    torch.testing.assert_close(*found)
    _, quiet = run_and_keep(classifier, TEXTS, made, scale="unit_max", weight=0.0, **WIDE)
    torch.testing.assert_close(quiet.scores.amax(1), torch.ones(len(TEXTS), dtype=torch.float64))
    assert not np.allclose(found[0], run_and_keep(classifier, TEXTS, made, **WIDE)[1].scores)


def test_neighbours_are_of_the_label_that_is_explained(shelf: Shelf) -> None:
    """Each target of a text borrows from the documents with that label, scored for that label."""
    classifier = shelf.classifier("bert", problem_type=MULTI_LABEL, labels=tuple("abcdefgh"))
    made = index(classifier, base="saliency")
    assert len(made.labels) > int(made.foremost.sum()) > 1, "documents have several labels"
    near = {"base": "saliency", "quantile": 1.0, "neighbours": 20}
    inputs, found = run_and_keep(classifier, (TEXTS[0],), made, **near)
    base = run_and_keep(classifier, (TEXTS[0],), made, weight=0.0, **near)[1]
    assert inputs.identity is not None
    borrowed = (found.scores - base.scores).sum(1)
    for row, label in enumerate(inputs.identity.labels.tolist()):
        only_these = dataclasses.replace(made, foremost=made.labels == label)
        again = run_and_keep(classifier, (TEXTS[0],), only_these, same_class=False, **near)[1]
        torch.testing.assert_close(again.scores[row], found.scores[row])
        if label in made.labels:
            assert float(borrowed[row]) > 0


# --- batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"kernel": "cosine", "base": "saliency"}, {"same_class": False}])
def test_scores_do_not_depend_on_batch_mates(shelf: Shelf, options: dict[str, Any]) -> None:
    classifier = shelf.classifier("bert", dtype=torch.float64)
    made = (
        index(classifier, (*LINES, TEXTS[1]), samples=3)
        if "base" not in options
        else index(classifier, base="saliency")
    )
    options = ({} if "base" in options else {"samples": 3}) | {"quantile": 0.7, "neighbours": 2} | options
    texts = [*TEXTS, LONG_TEXT]
    together = explainer(classifier, made, **options).explain(texts)
    again = explainer(classifier, made, **options).explain(texts[::-1])[::-1]
    for text, outcome, repeated in zip(texts, together, again, strict=True):
        alone = explainer(classifier, made, budget_tokens=1, **options).explain([text])[0]
        assert_close(only(outcome), only(alone), 1e-9)
        assert only(outcome).words == only(repeated).words


def test_references_do_not_depend_on_batch_mates(shelf: Shelf) -> None:
    classifier = shelf.classifier("bert")
    together = {one.text: one for one in sample(classifier, samples=3)}
    assert len(together) == len(LINES)
    for line in LINES:
        (alone,) = sample(classifier, (line,), budget_tokens=1, samples=3)
        one = together[alone.text]
        assert (one.label, one.foremost, one.vectors.shape) == (alone.label, True, (1, 32))
        np.testing.assert_array_equal(one.words, alone.words)
        for name in ("vectors", "scores"):
            np.testing.assert_allclose(getattr(one, name), getattr(alone, name), rtol=1e-4, atol=BATCH_TOLERANCE)


@pytest.mark.parametrize("kernel", ["indicator", *EMBEDDING_KERNELS])
def test_special_tokens_and_padding_have_no_score(shelf: Shelf, kernel: str) -> None:
    classifier = shelf.classifier("roberta")
    inputs, found = run_and_keep(classifier, TEXTS, index(classifier, base="saliency"), kernel=kernel, **WIDE)
    assert not inputs.mask.all()
    assert (found.scores[inputs.special] == 0).all()
    positive = found.scores[~inputs.special] > 0
    assert positive.any() if kernel == "cubic" else positive.all()  # which may take all that a token has


@pytest.mark.parametrize("kernel", ["cosine", "cubic"])
@pytest.mark.parametrize("sign", ["none", "gradient_x_input"])
def test_neighbours_lower_a_score_to_0_at_most(shelf: Shelf, kernel: str, sign: str) -> None:
    """Else a token would have got a sign that it has not, however large the weight."""
    classifier = shelf.classifier("bert")
    options = {"kernel": kernel, "sign": sign, "weight": 1e6, **WIDE}
    inputs, found = run_and_keep(classifier, TEXTS, index(classifier, base="saliency"), **options)
    base = run_and_keep(classifier, TEXTS, index(classifier, base="saliency"), **options | {"weight": 0.0})[1].scores
    content = ~inputs.special
    assert (base[content] != 0).all()
    assert (found.scores * base >= 0).all()
    assert (found.scores[content] == 0).any()
    assert (found.scores[content] != 0).any()


def test_targets_share_the_forward_parts(shelf: Shelf) -> None:
    classifier = shelf.classifier("bert", problem_type=MULTI_LABEL, labels=tuple("abcdefgh"))
    made = index(classifier, base="saliency")
    layers = []
    hook = classifier.model.base_model.encoder.layer[0].register_forward_pre_hook(
        lambda _, given: layers.append(len(given[0]))
    )
    with count_passes(classifier) as passes:
        found = explanations(explainer(classifier, made, samples=4).explain([TEXTS[0]])[0])
    hook.remove()
    assert len(found) > 1
    assert passes.sequences == 1 + 4 + 1  # prediction, gradients, baseline
    assert sum(layers) == passes.sequences + 1  # hidden states
    assert passes.backward == len(found)


# --- the index ----------------------------------------------------------------------------------------------------


def planted(vectors: Tensor, **changes: Any) -> ReferenceIndex:
    count, nothing = len(vectors), np.array([], dtype=np.int64)
    references = [
        Reference(
            text=number, label=number % 2, foremost=True, vectors=vectors[[number]].numpy(), ids=nothing, words=nothing,
            scores=nothing.astype(np.float32),
        )
        for number in range(count)
    ]  # fmt: skip
    return dataclasses.replace(ReferenceIndex.build(references, 1), **changes)


def test_search_finds_what_a_loop_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(300, 5, generator=generator)
    vectors[40:44] = vectors[7]  # equal ones come by number
    made = planted(vectors)
    queries = torch.cat([torch.randn(30, 5, generator=generator), vectors[[7]]]).double()
    labels, texts = torch.arange(31) % 2, torch.arange(31) * 3
    for same_class in (False, True):
        found = made.search(queries, texts=texts, labels=labels if same_class else None, count=6, within=2.0)
        for row, query in enumerate(queries.tolist()):
            distances = []
            for number, vector in enumerate(vectors.double().tolist()):
                if number != texts[row] and (not same_class or number % 2 == labels[row]):
                    distance = sum((a - b) ** 2 for a, b in zip(query, vector, strict=True)) ** 0.5
                    distances += [(distance, number)] if distance < 2.0 else []
            assert found[row].tolist() == [number for _, number in sorted(distances)[:6]]
    assert found[30].tolist()[:2] == [40, 42]


def test_a_row_without_a_finite_vector_has_no_neighbours() -> None:
    vectors = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    queries = torch.stack([vectors[0], torch.full((3,), torch.nan)])
    found = planted(vectors).search(queries, texts=torch.tensor([-1, -1]), labels=None, count=9, within=torch.inf)
    assert [len(numbers) for numbers in found] == [5, 0]


def test_the_cut_off_is_a_quantile_of_all_distances() -> None:
    vectors = torch.randn(80, 6, generator=torch.Generator().manual_seed(3))
    made = planted(vectors)
    exact = torch.pdist(vectors.double())
    for quantile in (0.05, 0.5, 0.9):
        share = float((exact < made.cut_off(quantile)).double().mean())
        assert share == pytest.approx(quantile, abs=0.02)
    assert made.cut_off(1.0) == float("inf")
    assert torch.equal(planted(vectors).distances, made.distances)
    assert planted(vectors[:1]).cut_off(0.05) == float("inf")


def test_an_index_is_read_as_it_was_written(shelf: Shelf, tmp_path: Path) -> None:
    made = index(shelf.classifier("bert"), base="saliency")
    path = made.save(tmp_path / "prepared")
    assert made.save(tmp_path / "prepared") == path
    assert list(path.parent.iterdir()) == [path]
    assert dataclasses.replace(made, layer=made.layer + 1).save(path.parent) != path
    read = ReferenceIndex.load(path)
    for field in dataclasses.fields(ReferenceIndex):
        mine, theirs = getattr(read, field.name), getattr(made, field.name)
        assert torch.equal(mine, theirs) if isinstance(theirs, Tensor) else mine == theirs
        assert not isinstance(theirs, Tensor) or mine.dtype == theirs.dtype
    (tmp_path / "index.safetensors").write_bytes(b"nothing")
    for name in ("index", "other"):
        with pytest.raises(MethodError, match=r"prepared='.*' cannot be read here.*Write a sink\.path"):
            ReferenceIndex.load(tmp_path / f"{name}.safetensors")
    with pytest.raises(MethodError, match="references=0"):
        ReferenceIndex.build([], 1)


def test_the_layer_with_neighbours_of_one_class_is_chosen() -> None:
    random = np.random.default_rng(0)
    labels = np.arange(60) % 3
    vectors = random.normal(size=(60, 6, 4)).astype(np.float32)
    vectors[:, 0, :3] += 9 * np.eye(3)[labels]  # what the first layer is given is no candidate
    vectors[:, 3, :3] += 9 * np.eye(3)[labels]
    vectors[:, 4] = vectors[:, 3] * 2 + 1  # as good: the lower one
    layer, precisions = choose_layer(vectors, labels)
    assert layer == 3
    assert precisions[2] == precisions[3] == 1.0
    assert all(0.1 < precisions[other] < 0.6 for other in (0, 1, 4))
    assert choose_layer(vectors, np.zeros(60, dtype=np.int64))[0] == 3
    assert choose_layer(vectors[:1], labels[:1])[0] == 3


def test_a_layer_is_chosen_by_all_of_them(shelf: Shelf) -> None:
    classifier = shelf.classifier("bert", problem_type=MULTI_LABEL, labels=tuple("abcdefgh"))
    every = {one.text: one for one in sample(classifier, layer=None)}
    labelled = [one for one in sample(classifier, layer=2, base="saliency") if one.foremost]
    assert {one.text for one in labelled} == set(every)
    for one in labelled:
        assert every[one.text].vectors.shape == (3, 32)
        assert every[one.text].label == one.label
        np.testing.assert_allclose(every[one.text].vectors[2:], one.vectors, atol=1e-6)


# --- what is refused ----------------------------------------------------------------------------------------------


def test_without_an_index_it_says_what_to_do(shelf: Shelf) -> None:
    with pytest.raises(MethodError, match=r"prepared=None.*lexplain run PLAN\.yaml"):
        explainer(shelf.classifier("bert")).explain(TEXTS)


@pytest.mark.parametrize(
    ("family", "layer", "message"),
    [("textcnn", "auto", "must have hidden layers"), ("bert", 3, "layer=3 must be at most 2.*Write layer: 1, or auto")],
)
def test_models_that_do_not_fit_are_refused(shelf: Shelf, family: str, layer: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        explainer(shelf.classifier(family), layer=layer)


def test_presets_and_options_across() -> None:
    assert set(LAFA.presets) == {"lafa-sst2", "lafa-relation", "lafa-price"}
    (problem,) = LAFA.check({"base": "saliency", "samples": 5})
    assert str(problem).startswith("method.samples=5 is not read by base: saliency")
    (problem,) = LAFA.check({"layer": "middle"})
    assert "must be a whole number or one of auto" in str(problem)
    assert LAFA.prepares(LAFA.complete_options({})) == "neighbours"
