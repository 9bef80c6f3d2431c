"""Secrets: whatever text they stand in, none is left of them, what names a place stays, and it takes no time."""

from __future__ import annotations

import time

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lexplain import keys
from lexplain.errors import CorpusError, redact, redact_uris
from lexplain.plan import Source

WORDS = st.text(st.sampled_from("ab 1,.:/?&=@'\"{}[]()\n\t#;éß"), max_size=20)
PLAIN = "abcXYZ0189"
RAW = st.text(st.sampled_from(PLAIN + "-._~!$&'()*+,;=%:@"), min_size=8, max_size=40)
ENCODED = st.text(st.sampled_from(PLAIN + "-._~%+/="), min_size=8, max_size=60)
HEX = st.text(st.sampled_from("0123456789abcdef"), min_size=32, max_size=32)

USER_INFO = (
    "https://{}@host/x", "https://me:{}@host:5000/x?page=2", "postgresql+psycopg2://me:{}@db/lexplain", "s3://AKID:{}@bucket/a@b/c",
    "ftp://me:{}@host/a%40b.csv", "abfss://me:{}@account.dfs.core.windows.net/x", "mysql://:{}@host", "sqlite://me:{}@host/x y",
)  # fmt: skip
PARAMETERS = (
    "https://host/x?sv=1&sig={}", "https://host/x?X-Amz-Signature={}&b=1", "https://host/#access_token={}", "https://h/?api_key={}",
    "postgresql://h/db?user=me&password={}", "https://h/p;token={};b=1", "https://h/p?X-Amz-Security-Token={}", "/x?SharedAccessKey={}",
    "DefaultEndpointsProtocol=https;AccountName=a;AccountKey={};EndpointSuffix=core.windows.net", "url: /p?auth={} (reset)",
)  # fmt: skip
ASSIGNMENTS = (
    "AWS_SECRET_ACCESS_KEY={}", "aws_secret_access_key = {}", "{{'AWS_SECRET_ACCESS_KEY': '{}', 'HOME': '/'}}", '{{"password": "{}"}}',
    "fs.s3a.secret.key -> {}", "spark.hadoop.fs.azure.account.key.a.dfs.core.windows.net={}", "HF_TOKEN: {}", "client_secret={}, x",
    "Authorization: Bearer {}", "{{'Authorization': 'Basic {}'}}", "DATABRICKS_TOKEN={}", "AccountKey={}", "passphrase => {}",
    "sasToken={}", "PGPASSWORD={}", "api-key: {}",
)  # fmt: skip


@given(st.sampled_from(USER_INFO), RAW | ENCODED.map(lambda secret: f"x{secret}"), WORDS, WORDS)
def test_no_user_info_is_left(form: str, secret: str, before: str, after: str) -> None:
    assume(secret not in f"{before} {after}")
    secret = (
        secret.replace("/", "-") if form.startswith("https://{}@") else secret
    )  # what begins with no name ends with a slash
    assert secret not in redact_uris(f"{before} {form.format(secret)} {after}")


@given(st.sampled_from(PARAMETERS), ENCODED, WORDS, WORDS)
def test_no_parameter_is_left(form: str, secret: str, before: str, after: str) -> None:
    assume(secret not in f"{before} {after}")
    assert secret not in redact_uris(f"{before} {form.format(secret)} {after}")


@given(st.sampled_from(ASSIGNMENTS), ENCODED, WORDS, WORDS)
def test_no_value_is_left_that_its_name_calls_secret(form: str, secret: str, before: str, after: str) -> None:
    assume(secret not in f"{before} {after}")
    assert secret not in redact(f"{before} {form.format(secret)} {after}")


@pytest.mark.parametrize("form", ["{}", "token {} is invalid", "['{}']", "https://host/{}/x", "Bearer {}", "\\n{}\\n"])
@given(HEX, WORDS)
def test_tokens_are_known_by_their_form(form: str, digits: str, before: str) -> None:
    upper = digits.upper()[:16]
    for token in (
        f"hf_{digits}", f"dapi{digits}", f"dapi{digits}-2", f"AKIA{upper}", f"ASIA{upper}", f"ghp_{digits}", f"glpat-{digits[:20]}",
        f"github_pat_{digits}", f"xoxb-{digits}", f"eyJ{digits}.eyJ{digits}.{digits}", f"AIza{digits}abc",
    ):  # fmt: skip
        shown = redact_uris(f"{before} {form.format(token)}")
        assert digits[:16] not in shown
        assert upper not in shown


@given(st.text() | WORDS, st.sampled_from(("", *USER_INFO, *PARAMETERS, *ASSIGNMENTS)), ENCODED)
def test_what_is_masked_stays_as_it_is(text: str, form: str, secret: str) -> None:
    shown = redact(text + form.format(secret))
    assert redact(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "http://host:5000/api?mail=a@b", "http://host:5000", "s3://bucket/key:with@signs", "abfss://box@account/x", "models:/a@champion",
        "text.max_tokens=100 must be at most 64", "budget_tokens: 16384", "baseline='[MASK]' must be a token of this model",
        "explain_key='0a1b' corpus_key='2c3d'", "name='keywords' (secretary, passwordless)", "dapi, hf_ and AKIA", "a@b.c wrote: 5:30",
        "the tokens a@b, ://, ?=&",
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    "part",
    ["?key", "&token=", "://", "://a:", "://a:b@", "secret", "secret-", "password=", "'", "a-", "hf_", "eyJ.", "@"],
)
def test_a_long_text_takes_no_time(part: str) -> None:
    """Each repetition of a pattern within another would be a factor of the length: seconds at 10 kB, for ever at 1 MB."""
    started = time.process_time()
    redact(part * 50_000)
    assert time.process_time() - started < 10


def test_a_new_password_is_no_new_corpus() -> None:
    old, new = (Source(path=f"ftp://me:{secret}@host/a.csv?sig={secret}") for secret in ("secret1", "secret2"))
    assert keys.corpus_key(old) == keys.corpus_key(new)
    assert keys.corpus_key(old) != keys.corpus_key(Source(path="ftp://me:secret1@host/b.csv?sig=secret1"))
    conditions = (Source(path="a.csv", where=f"password = '{word}'") for word in ("a", "b"))
    assert len({keys.corpus_key(source) for source in conditions}) == 2, "a condition on a column is no secret"


def test_errors_show_no_secret() -> None:
    assert str(CorpusError("no answer: password='hunter2'")) == "no answer: password=***"
