"""The exception tree of lexplain.

    ExplainError
    ├── PlanError        (ValueError)    the plan breaks a rule; carries every problem found
    ├── MethodError      (LookupError)   a method id is unknown or taken, or its package is missing or broken
    ├── ModelError       (ValueError)    a model folder cannot be loaded or cannot be explained
    ├── CorpusError      (ValueError)    a source cannot be read as the plan maps it
    ├── DocumentError    (ValueError)    one document cannot be explained; becomes a rejected row
    ├── SessionError     (RuntimeError)  Java, Spark or Delta is missing, or of a wrong version
    ├── DeviceError      (RuntimeError)  a GPU was asked for and the task has none
    ├── WorkerError      (RuntimeError)  a worker was lost each time that its task was tried
    ├── TableError       (RuntimeError)  a table is locked, or of another schema version
    ├── AccountingError  (RuntimeError)  committed rows do not add up to the documents planned
    └── LimitError       (RuntimeError)  a limit of the plan was passed; the run stops with what it has

Every message has three parts: what was wrong (field and value), what would have happened
silently, and what to write instead.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

# Of a URI: what stands before the host (on Azure storage alone that is a container, unless it has a password). A password
# may hold slashes; what looks like a port is none. All repetitions are bounded: messages may hold a corpus's own text.
_USER_INFO = re.compile(
    r"://[^/?#\s:@]{0,500}:(?!\d{1,5}(?:[/?#,;:\s'\")\]]|$))\S{0,2000}@"
    r"|(?<!abfs)(?<!abfss)(?<!wasb)(?<!wasbs)://[^/\s]{0,2000}@"
)
# Parameters of a URI or of a connection string. A quote may be part of a value; one that nothing follows ends a quoted URI.
_SECRET_PARAMETER = re.compile(
    r"(?i)([?&;#][^=&;?#\s]{0,40}(?:token|secret|passw|passphrase|pwd|key|sig|credential|auth(?!or))[^=&;?#\s]{0,40}=)"
    r"(?:[^&;\s'\"]|['\"](?=[\w%]))+"
)
# Tokens that are known by their form, wherever they stand: Hugging Face, Databricks, AWS, GitHub, GitLab, Slack, Google, JWT.
_TOKEN = re.compile(
    r"(?:hf_[A-Za-z0-9]{16,}|(?:dapi|dkea|dose)[0-9a-f]{32}(?:-\d+)?|(?:AKIA|ASIA)[A-Z0-9]{16}"
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|xox[abeprs]-[\w-]{10,}|AIza[\w-]{35}|ya29\.[\w-]{20,}"
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*)"
)
# What libraries write of headers, settings and the environment: a name that says so, then the value.
_ASSIGNMENT = re.compile(
    r"(?i)((?:secret|passw(?:or)?d|passphrase|pwd|(?:api|access|account|private|shared)[_.-]?key|credentials?"
    r"|(?:access|api|auth|bearer|databricks|github|hf|hub|id|refresh|sas|security|session)[_.-]?token|authorization)"
    r"[\w.-]{0,60}['\"]?\s{0,3}(?:->|=>?|:)\s{0,3}(?:(?:['\"]\s?)?(?:basic|bearer|token)\s{1,3})?)"
    r"(?:'[^'\n]*'|\"[^\"\n]*\"|[^\s,;&'\"(){}\[\]]+)"
)


def redact_uris(text: str) -> str:
    """Return `text` with `***` for user names, passwords and tokens of the URIs in it, and for tokens known by their form."""
    return _TOKEN.sub("***", _SECRET_PARAMETER.sub(r"\1***", _USER_INFO.sub("://***@", text)))


def redact(text: str) -> str:
    """Return `text` as `redact_uris` does, and with `***` for what a name before it says is secret: `password=...`."""
    return _ASSIGNMENT.sub(r"\1***", redact_uris(text))


class ExplainError(Exception):
    """Root of every error that lexplain raises on purpose; its message shows no secret of a URI."""

    def __init__(self, message: str = "") -> None:
        super().__init__(redact(message))


_LONGEST_VALUE = 400  # in a message


@dataclass(frozen=True)
class Problem:
    """One broken rule of a plan.

    Attributes:
        field: Dotted path of the key, as `models.splits`.
        value: What the plan says there.
        rule: The rule it breaks, a clause that continues "field=value ...".
        consequence: What would have happened silently, one sentence without its full stop.
        remedy: What to write instead, one sentence without its full stop.
    """

    field: str
    value: object
    rule: str
    consequence: str
    remedy: str

    def __str__(self) -> str:
        value = redact(repr(self.value))  # before the cut, which might take what tells a secret
        shown = value if len(value) <= _LONGEST_VALUE else f"{value[:_LONGEST_VALUE]}…"
        return f"{self.field}={shown} {self.rule}. {self.consequence}. {self.remedy}."


class PlanError(ExplainError, ValueError):
    """Raised when a plan breaks rules; all of its problems are in `problems`."""

    def __init__(self, origin: str, problems: Sequence[Problem]) -> None:
        self.origin = origin
        self.problems = tuple(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        lines = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(self.problems, 1))
        super().__init__(f"{origin}: {count}, nothing was started.\n{lines}")

    def __reduce__(self) -> tuple[type[PlanError], tuple[str, tuple[Problem, ...]]]:
        # Exceptions pickle by their message; this one crosses process borders whole.
        return type(self), (self.origin, self.problems)


class MethodError(ExplainError, LookupError):
    """Raised when a method id is unknown or taken, or its package is missing or broken."""


class ModelError(ExplainError, ValueError):
    """Raised when a model cannot be loaded, or loads but cannot be explained."""


class CorpusError(ExplainError, ValueError):
    """Raised when a source cannot be read as the plan maps it."""


class DocumentError(ExplainError, ValueError):
    """Raised when one document cannot be explained.

    Attributes:
        reason: The word stored in the row, as `empty_text`.
    """

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        self.message = message
        super().__init__(f"{reason}: {message}")

    def __reduce__(self) -> tuple[type[DocumentError], tuple[str, str]]:
        return type(self), (self.reason, self.message)


class SessionError(ExplainError, RuntimeError):
    """Raised when Java, Spark or Delta is missing or of a version that does not fit."""


class DeviceError(ExplainError, RuntimeError):
    """Raised when a GPU was asked for and the task was given none."""


class WorkerError(ExplainError, RuntimeError):
    """Raised when a worker hung longer than the plan allows, crashed or was killed, each time that its task was tried."""


class TableError(ExplainError, RuntimeError):
    """Raised when a table is held by another writer or has another schema version."""


class AccountingError(ExplainError, RuntimeError):
    """Raised when committed rows do not add up to the documents planned."""


class LimitError(ExplainError, RuntimeError):
    """Raised when a limit of the plan was passed and the run stopped with what it has."""
