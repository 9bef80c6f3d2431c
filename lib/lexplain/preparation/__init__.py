"""What a method needs to know of models and corpus before a run: made once, kept in the sink, told to executors.

Driver only, apart from the closures that it sends to the executors.
"""

from __future__ import annotations

from collections.abc import Sequence

from lexplain.attribution import ExplainedModel, Progress
from lexplain.corpus import Staged
from lexplain.plan import FindMethod, Plan
from lexplain.preparation.anchors import prepare_anchors
from lexplain.preparation.calibrations import calibrate_models
from lexplain.preparation.neighbours import find_neighbours, index_neighbours
from lexplain.tables import Tables

_MAKERS = {"calibration": calibrate_models, "anchors": prepare_anchors, "neighbours": index_neighbours}
# What `explain(text)` needs of an earlier run. It is accurate for its document, and needs no calibration; paths are known by
# the models' embeddings, which only a run opens.
_FINDERS = {"neighbours": find_neighbours}


def find_prepared(
    tables: Tables, plan: Plan, find_method: FindMethod, models: Sequence[ExplainedModel]
) -> list[ExplainedModel]:
    """Return the models with what is there for them already.

    Args:
        tables: The sink.
        plan: Names the method.
        find_method: Registry lookup.
        models: Models to explain.
    """
    kind = _find_kind(plan, find_method)
    return _FINDERS[kind](tables, plan, find_method, models) if kind in _FINDERS else list(models)


def prepare_models(
    tables: Tables, plan: Plan, find_method: FindMethod, models: Sequence[ExplainedModel], corpus: Staged,
    training: Staged | None, progress: Progress,
) -> list[ExplainedModel]:  # fmt: skip
    """Return the models with what the method needs; what is missing is made on executors and committed.

    Args:
        tables: The sink.
        plan: Method, windows and device.
        find_method: Registry lookup.
        models: Models to explain.
        corpus: What they explain.
        training: What they were trained on; None where the models were brought.
        progress: Told how far it is.

    Raises:
        MethodError: It cannot be made of this model or corpus, and the method cannot go without.
    """
    kind = _find_kind(plan, find_method)
    if kind is None:
        return list(models)
    return _MAKERS[kind](tables, plan, find_method, models, corpus, training, progress)


def _find_kind(plan: Plan, find_method: FindMethod) -> str | None:
    method = find_method(plan.method.id)
    return method.prepares(method.complete_options(plan.method.asked))
