"""A corpus of what a web crawl, a broken export or an attacker may hold, with what must become of each document."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from core.models import FILLER

CANARY = "/tmp/lexplain-hostile-canary"
"""Made by whoever runs what stands in a document."""

NAN_WORD = "bank"
"""The models' embedding of it is NaN."""

LABELS = (
    "it's",
    'a "b" `c`\n\td',
    "<script>alert(1)</script>",
    "${env:PATH}",
    "NA",
    "x' OR '1'='1",
    "{0.__class__}%s\\",
)
"""Of the models: what a label may look like that somebody else has written."""

ANYTHING = frozenset({None})
EMPTY = frozenset({"empty_text"})


class Document(NamedTuple):
    """A document and the reasons that it may be rejected for; None: it is explained.

    Attributes:
        kind: What it is an example of.
        doc_id: Its id.
        text: Its bytes, or None.
        labels: Gold labels.
        reasons: Allowed.
    """

    kind: str
    doc_id: str
    text: bytes | None
    labels: Sequence[str]
    reasons: frozenset[str | None]


def prose(draw: random.Random) -> str:
    """Words that the models know, none of which is NaN."""
    return " ".join(draw.choices(FILLER, k=draw.randint(3, 9)))


INJECTIONS = {
    "SQL": (
        "'; DROP TABLE explanations; --", "' OR '1'='1", '"; DELETE FROM keywords WHERE true; --', "`; VACUUM `", "\\'; SELECT 1 --",
        "/* */ UNION SELECT * FROM runs --", "1); DROP VIEW keywords_current; --", "\\", "'", "''", "\\\\'", "%' ESCAPE '\\",
    ),
    "HTML": (
        "</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<!-- <script>", "]]><svg onload=alert(1)>", "&lt;b&gt; &#0;",
        "<base href=//evil>", "<meta http-equiv=refresh content=0>", "javascript:alert(1)", "\u2028\u2029</style><b>", "<%= 1 %> {% raw %}",
    ),
    "Spark": (
        "${env:PATH}", "${spark.app.name}", "${system:java.version}", "`${env:PATH}`", "$\\{env:PATH} \\${env:PATH}", "current_user()",
        "java_method('java.lang.System', 'exit', '1')", "input_file_name()", "array(1)[0] :: INT", "IDENTIFIER('runs')", ":name ? ??", "{rows}",
    ),
    "YAML": (
        f"!!python/object/apply:os.system ['touch {CANARY}']", "a: &a [x]\nb: *a\n<<: *a", "--- !ruby/object:Gem::Installer", "{{ 1 }}",
    ),
    "formats": (
        "${jndi:ldap://127.0.0.1:1/a}", "${${lower:j}ndi:rmi://127.0.0.1:1/a}", "%s%n%x%p %1$999999999s", "{0.__class__.__mro__}", "{!r:>9999999}",
        f"$(touch {CANARY})", f"`touch {CANARY}`", f"; touch {CANARY} #", f"=cmd|'/c touch {CANARY}'!A0", "{{7*7}} #{7*7}", "\x1b]0;title\x07\x1b[2J",
    ),
}  # fmt: skip


class _Payload:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (Path(CANARY),)


def _pickled(draw: random.Random) -> str:
    """A pickle as text of which every byte is a character, and that of an older protocol, which is ASCII."""
    protocol = draw.choice([0, 2, 4])
    return pickle.dumps(_Payload(), protocol).decode("latin-1")


# Kind: how many, how one is made, reasons. Each is made of its own random numbers, so that kinds can come and go.
KINDS: dict[str, tuple[int, Callable[[random.Random], bytes | str | None], frozenset[str | None]]] = {
    "null": (60, lambda draw: None, frozenset({"null_text"})),
    "empty": (40, lambda draw: "", EMPTY),
    "white space only": (80, lambda draw: "".join(draw.choices(" \t\r\n\v\f\u00a0\u1680\u2003\u2028\u3000\x1c\x85", k=draw.randint(1, 30))), EMPTY),
    "control characters only": (80, lambda draw: "\x00" + "".join(draw.choices("\x00\x01\x07\x08\x1b\x7f\x9f", k=9)), frozenset({"no_words"})),
    "no word": (80, lambda draw: "".join(draw.choices(".,;:!?-_*#@«»…€©😀👩‍👧🇸🇪", k=draw.randint(1, 40))), frozenset({"no_words"})),
    "zero width only": (80, lambda draw: "".join(draw.choices("\u200b\u200c\u200d\u2060\ufeff\u00ad\u180e", k=draw.randint(1, 40))), frozenset({"no_words"})),
    "invalid UTF-8": (90, lambda draw: prose(draw).encode() + draw.choice([b"\xff", b"\xc0\x80", b"\xf0\x9f", b"caf\xe9 x", b"\xf5aaa"]), frozenset({"invalid_utf8"})),
    "surrogates in UTF-8": (40, lambda draw: b"\xed\xa0\x80" + prose(draw).encode() + b"\xed\xb0\x80", frozenset({"invalid_utf8"})),
    "ten megabytes in one line": (3, lambda draw: prose(draw) + " word" * 2_000_000, frozenset({"too_long"})),
    "a word of a megabyte": (2, lambda draw: "a" * 999_000 + prose(draw), ANYTHING),
    "marks on one letter": (4, lambda draw: prose(draw) + " a" + "\u0301\u0327\u0308\u0323" * 25_000, ANYTHING),
    "spaces between two words": (10, lambda draw: f"{prose(draw)}{' ' * 50_000}team", ANYTHING),
    "right to left overrides": (90, lambda draw: f"\u202e{prose(draw)}\u202c \u2066שלום\u2069 \u200f{prose(draw)}", ANYTHING),
    "NUL inside": (90, lambda draw: prose(draw).replace(" ", "\x00", 2) + "\x00", ANYTHING),
    "special tokens": (60, lambda draw: f"[CLS] {prose(draw)} [SEP] [MASK] [PAD] [UNK] ##s </s> <pad>", ANYTHING),
    "pickles as text": (40, lambda draw: f"{_pickled(draw)} {prose(draw)}", ANYTHING),
    "decomposed and composed": (60, lambda draw: f"{prose(draw)} cafe\u0301 café ſ ﬁ Å Å K", ANYTHING),
    "scripts without spaces": (60, lambda draw: f"{prose(draw)} 今日は晴れです ภาษาไทย 𝒜𐐷𠮷 नमस्ते", ANYTHING),
    "NaN": (90, lambda draw: f"{prose(draw)} {NAN_WORD} {prose(draw)}", frozenset({"not_finite"})),
    **{
        f"{name} injection": (100, lambda draw, some=some: f"{prose(draw)} {draw.choice(some)} {prose(draw)}", ANYTHING)
        for name, some in INJECTIONS.items()
    },
}  # fmt: skip

IDS = (
    "'", '"', "`", "\\", "a'b\"c`d", "' OR 1=1 --", "../../etc/passwd", "/", "//", "a/b/c", "a\nb", "\n", "\t", "a\r\nb", " a", "a ", "a", "A", "é",
    "e\u0301", "😀", "👩‍👧", "${env:PATH}", "${spark.app.name}", "$\\{x}", "<img src=x onerror=alert(1)>", "</script>", "NULL", "null", "None", "",
    "0", "00", "1e3", "true", "%", "_", "?", "*", "[a]", "{a}", ";", "a;b", "--", "/*", "\x00", "a\x00b", "\ufeff", "\u200b", "\u202e", "שלום", "x" * 10_000,
    "=1+1", "@a", "nan", "\\u0041", "\\x41", "&amp;", "doc_id", "#", "{{1}}", "%s", "\u2028", "\uffff", "\U0010ffff",
)  # fmt: skip

BAD_LABELS = (
    "no such label",
    "",
    " ",
    "it''s",
    "<b>",
    "${env:HOME}",
    "x\x00y",
    "l" * 5000,
    "a,b;c|d",
    "'",
    "\\",
    "NULL",
    "😀",
    "\n",
)


def make_corpus() -> list[Document]:
    """About 1,800 documents of 30 kinds."""
    documents = []
    for kind, (count, make, reasons) in KINDS.items():
        draw = random.Random(kind)
        for number in range(count):
            text = make(draw)
            data = text.encode() if isinstance(text, str) else text
            documents.append(Document(kind, f"{kind} {number}", data, draw.choices(LABELS, k=1), reasons))
    draw = random.Random("the rest")
    documents += [Document("ids", one, prose(draw).encode(), draw.choices(LABELS, k=1), ANYTHING) for one in IDS]
    copies = [prose(draw).encode() for _ in range(20)]
    documents += [Document("copies", f"copy {n}", copies[n % 20], [LABELS[n % 3]], ANYTHING) for n in range(120)]
    documents += [
        Document("labels", f"label {n}", prose(draw).encode(), draw.sample(BAD_LABELS, draw.randint(0, 4)), ANYTHING)
        for n in range(100)
    ]
    return documents


def make_lines() -> list[tuple[Document, bytes]]:
    """About 400 documents as lines of JSON, with the lines: some are broken, and then their text is the line."""
    draw, found = random.Random("lines"), list[tuple[Document, bytes]]()

    def add(kind: str, line: bytes, text: bytes | None, reason: str | None) -> None:
        found.append((Document(kind, f"line {len(found)}", text, [], frozenset({reason})), line))

    for number in range(90):
        some = draw.choice([text for texts in INJECTIONS.values() for text in texts])
        text = f"{prose(draw)} {some}"
        doc_id = f"line {len(found)}"
        add(
            "text in JSON",
            json.dumps({"doc_id": doc_id, "text": text}, ensure_ascii=number % 2 == 0).encode(),
            text.encode(),
            None,
        )
    for half in ("\\ud800", "\\udc00", "\\uDBFF x", "\\ud83d\\ud83d", "\\ude00\\ud83d"):
        for _ in range(20):
            line = f'{{"doc_id": "line {len(found)}", "text": "{prose(draw)} {half}"}}'.encode()
            add("half of a surrogate pair in JSON", line, line, "lone_surrogate")
    for broken in (b"\xff", b"caf\xe9", b"\xed\xa0\x80"):
        for _ in range(25):
            line = f'{{"doc_id": "line {len(found)}", "text": "'.encode() + prose(draw).encode() + broken + b'"}'
            add("invalid UTF-8 in JSON", line, line, "invalid_utf8")
    for number, broken in enumerate(
        ('{"doc_id": "line', "[1, 2]", "null", "no JSON", '"text"', '{"a": 1} {"b": 2}', "{'doc_id': 1}", "{" * 3000)
    ):
        for _ in range(12):
            line = f"{broken} {number} {prose(draw)}".encode()
            add("a line that is no JSON object", line, line, "malformed_row")
    for _ in range(40):
        add(
            "text that is null or missing",
            f'{{"doc_id": "line {len(found)}", "text": null}}'.encode(),
            None,
            "null_text",
        )
    return found
