"""The registry of attribution methods.

A method is one function and one decorator. It sees tensors, never text, tokenizers or tables:

    @method(version=1, complete=True, cite="sundararajan2017axiomatic", ranges={"nodes": (2, 2000)})
    def integrated_gradients(evaluate: Evaluate, inputs: Inputs, *, nodes: int = 50) -> Attribution: ...

Its keyword-only parameters are its options. A plan is checked against them before Spark starts, and the
versioned id `integrated_gradients.v1` is stored in every row: a change that moves a number raises the
version.

Importing this module does not import torch; looking a method up does.

Methods of other packages are found by their entry points in the group `lexplain.methods`, each the name of a module
that registers them. They are imported when a name is looked up that is none of ours, or when `METHODS` is read.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from lexplain.errors import MethodError, ModelError, Problem
from lexplain.methods.options import Option, read_options, suggest

if TYPE_CHECKING:
    from torch import Tensor, nn

    Place = Callable[[Tensor, int], Tensor]
    See = Callable[[Tensor, Tensor, Tensor | None], None]
    Objective = Callable[[Tensor, Tensor], Tensor]
    Score = Callable[[Tensor], Tensor]

    METHODS: Mapping[str, Method]
    """Every method by versioned id; the families, and plug-ins, are imported when it is read."""

Cost = Callable[[Mapping[str, Any], int], float]

Preparation = Literal["calibration", "anchors", "neighbours"]
"""Kinds of what is made of a model and corpus before a run, each a module of `lexplain.preparation`."""

_FAMILIES = (
    "paths", "sequential", "discretized", "gradients", "neighbours", "relevance", "masks", "controls", "captum",
)  # fmt: skip

PLUGINS = "lexplain.methods"
"""Group of the entry points that name other packages' methods."""

_registered: dict[str, Method] = {}
_plugins: dict[importlib.metadata.EntryPoint, str | None] = {}  # why each was refused, or None


@dataclass(frozen=True, eq=False, slots=True)
class Identity:
    """What tells whether rows of a batch, and documents met before, are of one text, label or word. CPU tensors.

    Attributes:
        texts: (B,) long, hash of the row's whole text.
        labels: (B,) long, number of the row's target label.
        words: (B, S) long, hash of the key (lower case, NFC) of the word that holds a token; on a token outside words
            -1 - its id.
    """

    texts: Tensor
    labels: Tensor
    words: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Inputs:
    """One batch of rows for a method; a row is one (window, target) pair.

    B rows, S tokens of the padded length, D embedding. The target of a row is inside `Evaluate`.

    Attributes:
        x: (B, S, D) word embeddings.
        baseline: (B, S, D) word embeddings of the baseline; equal to x on special tokens and padding.
        ids: (B, S) long, token ids.
        mask: (B, S) bool, False on padding.
        special: (B, S) bool, True on special tokens and padding: what carries no score.
        words: (B, S) long, number of the word that holds a token's last character, ascending along the window;
            -1 on special tokens, padding, and tokens outside words.
        seeds: (B,) long, CPU: where a row's random numbers start. Made of the text, the window and the method,
            so that a row is the same whatever shares its batch.
        target_score: (B,) float64, F(x): the logit of the row's target, or the output of a regression.
        baseline_id: The baseline token.
        prepared: What a preparation has made for this model and method, see `Method.prepares`; None if nothing.
        identity: For methods that compare rows with other documents, those that prepare `neighbours`; else None.
    """

    x: Tensor
    baseline: Tensor
    ids: Tensor
    mask: Tensor
    special: Tensor
    words: Tensor
    seeds: Tensor
    target_score: Tensor
    baseline_id: int
    prepared: object = None
    identity: Identity | None = None


class Evaluate(Protocol):
    """The model, restricted to each row's own target.

    The points of all rows may be asked for in one call: they are sorted by length and packed into passes
    under the token budget. P points; `rows`, `alphas` and `share` are CPU tensors, results are float64 on the
    model's device. Points of a row that fits no memory are left out; the engine rejects its text.
    """

    @property
    def model(self) -> nn.Module:
        """The network, for methods that change how relevance flows through its layers.

        Whatever they change they change back before they return; its weights are frozen and stay as they are.
        """

    def logits(self, rows: Tensor, alphas: Tensor) -> Tensor:
        """Return F at baseline + alpha (x - baseline), (P,), without gradients.

        Rows of one window share the forward part of a pass at equal alphas.

        Args:
            rows: (P,) long, the row of each point.
            alphas: (P,) float64; 0 gives the baseline exactly, 1 gives x exactly.
        """

    def directional(self, rows: Tensor, alphas: Tensor) -> tuple[Tensor, Tensor]:
        """Return F, (P,), and its derivative along the line by token, (P, S).

        That is the sum over D of (x - baseline) dF/dx; exactly 0.0 where x equals the baseline.

        Args:
            rows: As in `logits`.
            alphas: As in `logits`.
        """

    def visit(
        self, rows: Tensor, place: Place, see: See, *, share: Tensor | None = None, objective: Objective | None = None,
        gradients: bool = True,
    ) -> None:  # fmt: skip
        """Evaluate points that lie anywhere.

        Args:
            rows: (P,) long, the row of each point.
            place: Takes (N,) numbers of points and the length of a pass, returns their embeddings (N, length, D).
            see: Takes (N,) numbers of points, their values (N,), and their gradients (N, length, D) or None.
                Called once for each pass and target, in their order, when all of them have been computed; keeps
                what the method needs. No point is shown twice.
            share: (P,); points of one window with equal numbers lie at the same place and share the forward
                part of a pass. None: no point shares.
            objective: Takes logits (N, C) and rows (N,), returns what is differentiated (N,). None: the
                logit of the row's target.
            gradients: False: values only.
        """

    def hidden(self) -> Tensor:
        """Return what each hidden layer holds of each row at x, (B, layers + 1, H) float64, without gradients.

        The mean over the row's real tokens, special ones included; layer 0 is what the first layer is given. Rows of
        one window share a forward pass.
        """

    def probabilities(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Return the probability of each row's target, (N,), differentiable: an objective for `visit`.

        A softmax or a sigmoid, as the model was trained. A method that asks for it refuses regressions by `fits`.

        Args:
            logits: (N, C).
            rows: (N,) long, on the model's device.

        Raises:
            ModelError: The model is a regression.
        """

    def visit_alone(self, row: int, explain: Callable[[Score, int], None]) -> None:
        """Let somebody else's code have one row to itself: for methods that are not batched.

        Args:
            row: Its number.
            explain: Takes `score` and how many points fit a pass. `score` takes embeddings (N, length, D), of the
                row's own length without padding, and returns the logit of its target, (N,), differentiable. Called
                again with half as many points when memory runs out; a row that does not fit with one is left out.
        """


@dataclass(frozen=True, eq=False, slots=True)
class Attribution:
    """What a method returns, for the rows of its inputs, in their order.

    Attributes:
        scores: (B, S) float64, in logits.
        baseline_score: (B,) float64, F(baseline).
        completeness_gap: (B,) float64, F(x) - F(baseline) - sum of the scores, before any of it is
            distributed.
        evaluations: (B,) long, points at which a gradient was taken.
        converged: (B,) bool, whether the method's own stopping rule was met; True for a method that has none.
    """

    scores: Tensor
    baseline_score: Tensor
    completeness_gap: Tensor
    evaluations: Tensor
    converged: Tensor

    @classmethod
    def from_scores(
        cls, scores: Tensor, evaluate: Evaluate, inputs: Inputs, *, evaluations: int | Tensor
    ) -> Attribution:
        """Return the attribution of a method that has no stopping rule.

        Args:
            scores: (B, S) float64.
            evaluate: The model with the target of each row.
            inputs: The rows.
            evaluations: Points at which a gradient was taken, of every row or (B,) of each.

        Note:
            Runs on: executor. Cost: one forward pass a row, for F(baseline); rows of equal length and target share it.
        """
        import torch

        count, baseline_score = len(inputs.x), score_baselines(evaluate, inputs)
        return cls(
            scores=scores,
            baseline_score=baseline_score,
            completeness_gap=inputs.target_score - baseline_score - scores.sum(-1),
            evaluations=torch.full((count,), evaluations) if isinstance(evaluations, int) else evaluations.cpu(),
            converged=torch.ones(count, dtype=torch.bool),
        )

    def check(self, method: Method, shape: tuple[int, ...]) -> None:
        """Check what a method has returned: of another package's code nothing is known.

        Args:
            method: It.
            shape: (B, S) of the rows that it was given.

        Raises:
            MethodError: A field has another shape or type.
        """
        import torch

        double, rows = torch.float64, shape[:1]
        expected = {
            "scores": (shape, double), "baseline_score": (rows, double), "completeness_gap": (rows, double),
            "evaluations": (rows, torch.int64), "converged": (rows, torch.bool),
        }  # fmt: skip
        for name, (size, kind) in expected.items():
            found = getattr(self, name)
            if tuple(found.shape) != size or found.dtype != kind:
                package = f", which is of the package {method.package}" if method.package else ""
                raise MethodError(
                    f"method={method.id!r} returned {name} of shape {tuple(found.shape)} and {found.dtype}, and must return "
                    f"{size} and {kind}. Scores would have been those of other tokens or texts. Mend the method{package}."
                )


def score_baselines(evaluate: Evaluate, inputs: Inputs) -> Tensor:
    """Return F(baseline) of all rows, (B,) float64; one forward pass a row, which those of equal length and target share."""
    import torch

    return evaluate.logits(torch.arange(len(inputs.x)), torch.zeros(len(inputs.x), dtype=torch.float64))


def _need_nothing(options: Mapping[str, object]) -> None:
    """Say that a method needs no preparation, whatever its options."""


@dataclass(frozen=True, slots=True)
class Method:
    """A registered attribution method.

    Attributes:
        id: Name and version, as `integrated_gradients.v1`.
        function: Takes (evaluate, inputs, **options) and returns an Attribution.
        complete: Scores sum to F(x) - F(baseline), up to the completeness gap.
        signed: A positive score raises the target logit, a negative one lowers it, whatever the options.
        stochastic: Draws random numbers.
        mask: Scores are a mask, the part of each token that is kept, in [0, 1], maybe with a sign. A mask is not
            additive: the windows of a text are blended, and a word has the mean of its tokens, not their sum. Runs of
            kept words are its spans.
        cite: Key of the paper.
        by_word: Scores are of whole words, in equal parts on their tokens, so that only their sum means something.
        options: By name, in the order of the signature.
        across: Takes the options that are not at their defaults, returns what is wrong between them.
        models: Types of models that it explains, as their config names them; empty: any.
        fits: Takes a network's config and all options; raises ModelError where it cannot explain such a network so.
        foremost: Takes all options, tells whether only a text's most probable label can be explained with them.
        presets: Named sets of options, as a paper or its code has them.
        prepares: Takes all options, returns what must be known of a model and corpus before a run: its kind, or None.
        batched: Rows share passes of the model; False: it explains one row after the other.
        cost: Takes all options and a window's content tokens, returns what a row costs in forward-equivalents, the
            prediction not counted. A gradient counts 2, a forward and a backward pass: with frozen weights
            the backward pass computes about as much as the forward pass. What is counted in words is told for words
            of one token. A method that decides itself when to stop tells a typical cost. None: unknown.
        requires: Packages that it needs beside ours, as pip names them.
        note: What a user has to know before choosing it, one sentence.
        package: The installed package that registers it; None for ours.
    """

    id: str
    function: Callable[..., Attribution]
    complete: bool
    signed: bool
    stochastic: bool
    mask: bool
    by_word: bool
    cite: str
    options: Mapping[str, Option]
    across: Callable[[Mapping[str, object]], list[Problem]]
    models: tuple[str, ...] = ()
    fits: Callable[[Any, Mapping[str, Any]], None] = lambda config, options: None
    foremost: Callable[[Mapping[str, object]], bool] = lambda options: False
    presets: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    prepares: Callable[[Mapping[str, object]], Preparation | None] = _need_nothing
    batched: bool = True
    cost: Cost | None = None
    requires: tuple[str, ...] = ()
    note: str = ""
    package: str | None = None

    @property
    def name(self) -> str:
        """The id without its version."""
        return self.id.rpartition(".v")[0]

    @property
    def missing(self) -> list[str]:
        """The packages of `requires` that are not installed."""
        return [package for package in self.requires if not _is_installed(package)]

    @property
    def guarantees(self) -> tuple[str, ...]:
        """What can be relied on, in words."""
        facts = {
            "complete": self.complete, "signed": self.signed, "unsigned": not self.signed, "mask": self.mask,
            "stochastic": self.stochastic, "not batched": not self.batched,
        }  # fmt: skip
        return tuple(name for name, holds in facts.items() if holds)

    def check(self, options: Mapping[str, object]) -> list[Problem]:
        """Return every problem of the options that a plan gives; none if they are right."""
        problems = [problem for name, value in options.items() for problem in self._check_one(name, value)]
        changed = {
            name: value
            for name, value in options.items()
            if name in self.options and value != self.options[name].default
        }
        return problems or self.across(changed)

    def check_network(self, config: Any, options: Mapping[str, object]) -> None:
        """Check that the method can explain a network.

        Args:
            config: Of the network, with attributes as transformers names them.
            options: All options.

        Raises:
            ModelError: It cannot.
        """
        family = str(config.model_type)
        if self.models and family not in self.models:
            raise ModelError(
                f"model_type={family!r} must be one of {', '.join(self.models)} for {self.id}. Its scores would have "
                "followed the rules of other layers. Write one of these models, or another method."
            )
        if self.foremost(options) and getattr(config, "problem_type", None) == "multi_label_classification":
            raise ModelError(
                f"problem_type='multi_label_classification' has several labels a text, and {self.id} explains only the most "
                "probable one with these options. All labels would have got its words. Write a model with one label a text, "
                "or other options."
            )
        self.fits(config, options)

    def is_signed(self, options: Mapping[str, object]) -> bool:
        """Tell whether scores tell evidence for a label from evidence against it, with the options that a plan gives.

        A method whose scores have no sign borrows that of gradient x input by its option `sign`.
        """
        return self.signed or self.complete_options(options).get("sign") == "gradient_x_input"

    def complete_options(self, options: Mapping[str, object]) -> dict[str, object]:
        """Return all options: defaults filled in, and whole numbers made float where the option is one."""
        completed = {name: options.get(name, option.default) for name, option in self.options.items()}
        for name, value in completed.items():
            if type(value) is int and not self.options[name].accepts(value, exact=True):
                completed[name] = float(value)  # 1 and 1.0 are one option value, so they must give one key
        return completed

    def tell_cost(self, options: Mapping[str, object], tokens: int) -> float | None:
        """Return what a row costs, see `cost`, with the options that a plan gives; None: unknown."""
        return None if self.cost is None else self.cost(self.complete_options(options), tokens)

    def _check_one(self, name: str, value: object) -> list[Problem]:
        field = f"method.{name}"
        option = self.options.get(name)
        if option is None:
            known = ", ".join(self.options) or "none"
            return [Problem(field, value, f"is no option of {self.id}", "It would have been ignored",
                            f"Write {suggest(name, self.options) or known}")]  # fmt: skip
        consequence = "The scores would not have been those of the method"
        remedy = "Leave it out" if option.default is None else f"Write {name}: {option.default}, or leave it out"
        if not option.accepts(value):
            rule = f"must be {option.describe()}"
            return [Problem(field, value, rule, consequence, remedy)]
        if option.range is not None and isinstance(value, int | float):
            low, high = option.range
            if not low <= value <= high:
                rule = f"must be between {low:g} and {high:g}"
                return [Problem(field, value, rule, consequence, remedy)]
        return []


Function = TypeVar("Function", bound=Callable[..., "Attribution"])


def method(
    *, version: int, cite: str, complete: bool = False, signed: bool = True, stochastic: bool = False,
    mask: bool = False, by_word: bool = False, models: tuple[str, ...] = (), ranges: Mapping[str, tuple[float, float]] | None = None,
    across: Callable[[Mapping[str, object]], list[Problem]] = lambda options: [],
    fits: Callable[[Any, Mapping[str, Any]], None] = lambda config, options: None,
    foremost: Callable[[Mapping[str, object]], bool] = lambda options: False,
    presets: Mapping[str, Mapping[str, object]] | None = None,
    prepares: Callable[[Mapping[str, object]], Preparation | None] = _need_nothing,
    name: str | None = None, batched: bool = True, cost: Cost | None = None, requires: tuple[str, ...] = (),
    note: str = "",
) -> Callable[[Function], Function]:  # fmt: skip
    """Register a function as an attribution method under `NAME.vVERSION`.

    Args:
        version: Raised by every change that moves a number.
        cite: Key of the paper.
        complete: Scores sum to F(x) - F(baseline).
        signed: Scores have a sign whatever the options; a method without may have an option `sign`.
        stochastic: Draws random numbers.
        models: Types of models that it explains; empty: any.
        mask: Scores are a mask in [0, 1].
        by_word: Scores are of whole words, in equal parts on their tokens.
        ranges: Smallest and largest value of an option, both allowed.
        across: Takes the options that are not at their defaults, returns what is wrong between them.
        fits: Takes a network's config and all options; raises ModelError where it cannot explain such a network so.
        foremost: Takes all options, tells whether only a text's most probable label can be explained with them.
        presets: Named sets of options, as a paper or its code has them.
        prepares: Takes all options, returns the kind of preparation that the method needs, or None.
        name: NAME, where it is not the function's.
        batched: Rows share passes of the model.
        cost: Forward-equivalents a row, see `Method.cost`.
        requires: Packages that it needs beside ours, as pip names them.
        note: What a user has to know before choosing it, one sentence.

    Raises:
        MethodError: The id is taken, an option has no default or a type that no plan can write, a range names no option,
            or a preset's options are refused.
    """

    def register(function: Function) -> Function:
        identity = f"{name or function.__name__}.v{version}"
        options = read_options(function, identity, ranges or {})
        if identity in _registered:
            raise MethodError(
                f"method={identity!r} must be registered once. Rows of two methods would have shared one id. "
                f"Write another name, or version={version + 1}."
            )
        registered = Method(
            identity, function, complete, signed, stochastic, mask, by_word, cite, options, across, models, fits, foremost,
            dict(presets or {}), prepares, batched, cost, requires, note,
        )  # fmt: skip
        for preset, values in registered.presets.items():
            if problems := registered.check(values):
                raise MethodError(f"preset={preset!r} of {identity} is refused. {problems[0]}")
        if cost is not None:
            cost(registered.complete_options({}), 128)  # what fails here would fail in every listing
        _registered[identity] = registered
        return function

    return register


def find_method(name: str) -> Method:
    """Return a method by versioned id, or the newest version of a name.

    Raises:
        MethodError: There is none, and the message lists the known ones; the package that has it cannot be imported;
            or packages that it needs are missing.
    """
    found = _newest(name, _load_families()) or _newest(name, _load_plugins())
    if found is None:
        raise _unknown(name)
    if found.missing:
        raise MethodError(
            f"method={name!r} needs {', '.join(found.missing)}, not installed here. No task could have run it. "
            f"Write pip install {' '.join(found.missing)}, here and on the executors, or choose another method."
        )
    return found


def list_refused() -> list[str]:
    """Return why plug-ins were refused, one message each; none where all of them serve."""
    _load_plugins()
    return [reason for reason in _plugins.values() if reason is not None]


def __getattr__(name: str) -> Mapping[str, Method]:
    """Import the families of methods, and plug-ins, when `METHODS` is read."""
    if name == "METHODS":
        return _load_plugins()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _newest(name: str, methods: Mapping[str, Method]) -> Method | None:
    if name in methods:
        return methods[name]
    versions = [identity for identity, method in methods.items() if method.name == name]
    return methods[max(versions, key=lambda identity: int(identity.rpartition(".v")[2]))] if versions else None


def _unknown(name: str) -> MethodError:
    for plugin, reason in _plugins.items():
        if reason is not None and plugin.name in (name, name.rpartition(".v")[0]):
            return MethodError(f"method={name!r} cannot be had. {reason}")
    refused = "".join(f" {reason}" for reason in _plugins.values() if reason is not None)
    names = {method.name for method in _registered.values()}
    suggestion = suggest(name, [*names, *_registered])
    return MethodError(
        f"method={name!r} is no known method. Nothing would have been explained. "
        f"Write {f'{suggestion}, or another ' if suggestion else 'one '}of: {', '.join(sorted(_registered))}.{refused}"
    )


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _load_families() -> Mapping[str, Method]:
    for family in _FAMILIES:
        importlib.import_module(f"{__name__}.{family}")
    return types.MappingProxyType(_registered)


def _load_plugins() -> Mapping[str, Method]:
    """Import the plug-ins that were not there at the last look: packages come while a session runs."""
    _load_families()
    found = [plugin for plugin in importlib.metadata.entry_points(group=PLUGINS) if plugin not in _plugins]
    for plugin in sorted(found, key=lambda plugin: (_distribution(plugin), plugin.name)):
        _plugins[plugin] = None  # before the import, which may look methods up
        _plugins[plugin] = _load_plugin(plugin)
    return types.MappingProxyType(_registered)


def _load_plugin(plugin: importlib.metadata.EntryPoint) -> str | None:
    """Import one plug-in; returns why it is refused, and then leaves nothing of it."""
    before = dict(_registered)
    ours = {one.name for one in before.values() if one.package is None}
    try:
        plugin.load()
        new = {identity: one for identity, one in _registered.items() if identity not in before and one.package is None}
        taken = sorted(identity for identity, one in new.items() if one.name in ours)
        if taken:
            raise MethodError(f"{', '.join(taken)} has the name of a method of lexplain")
        if needy := sorted(identity for identity, one in new.items() if one.prepares is not _need_nothing):
            raise MethodError(f"{', '.join(needy)} has `prepares`, which serves lexplain's own methods alone")
    except Exception as error:  # whatever a plug-in stumbles over is its own, not the others'
        _registered.clear()
        _registered.update(before)
        said = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
        reason = (
            f"The plug-in {plugin.name!r} of the package {_distribution(plugin)} is refused: {said}. "
            f"Write another method, or mend that package."
        )
        return reason
    for identity, one in new.items():
        _registered[identity] = dataclasses.replace(one, package=_distribution(plugin))
    return None


def _distribution(plugin: importlib.metadata.EntryPoint) -> str:
    return "unknown" if plugin.dist is None else f"{plugin.dist.name} {plugin.dist.version}"
