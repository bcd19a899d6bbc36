import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.keys import (
    TOKEN_ALPHABET,
    initial_grant_id,
    is_token_shaped,
    mint_customer_id,
    mint_grant_id,
    mint_key_id,
    mint_request_id,
    mint_token,
    token_sha256,
)


def test_a_token_is_the_prefix_and_43_symbols_of_lower_case_base32():
    assert string.ascii_lowercase + "234567" == TOKEN_ALPHABET
    for _ in range(100):
        assert re.fullmatch(r"dre_[a-z2-7]{43}", mint_token())


def test_every_minted_token_is_token_shaped_and_none_repeats():
    tokens = {mint_token() for _ in range(1000)}
    assert len(tokens) == 1000
    assert all(map(is_token_shaped, tokens))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "dre_",
        "dre_" + "a" * 42,
        "dre_" + "a" * 44,
        "DRE_" + "a" * 43,
        "dre_" + "A" * 43,
        "dre_" + "a" * 42 + "1",
        "dre_" + "a" * 42 + "=",
        "dre_" + "a" * 42 + "\u0661",  # a digit, in another alphabet
        " dre_" + "a" * 43,
        "dre_" + "a" * 43 + "\n",
        "Bearer dre_" + "a" * 43,
    ],
)
def test_anything_else_is_not_token_shaped(text):
    assert not is_token_shaped(text)


@given(st.text())
def test_any_text_can_be_asked_about(text):
    assert isinstance(is_token_shaped(text), bool)


def test_the_hash_covers_the_whole_token():
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert token_sha256("abc") == known
    assert token_sha256("dre_a") != token_sha256("dre_b")
    assert re.fullmatch(r"[0-9a-f]{64}", token_sha256(mint_token()))


@pytest.mark.parametrize(
    ("mint", "prefix"),
    [(mint_key_id, "key_"), (mint_customer_id, "cus_"), (mint_grant_id, "adm_"), (mint_request_id, "req_")],
)
def test_an_id_names_its_kind_and_has_32_random_hex_digits(mint, prefix):
    assert re.fullmatch(prefix + r"[0-9a-f]{32}", mint())
    assert mint() != mint()


def test_the_credit_that_comes_with_a_key_has_one_id_per_key():
    assert initial_grant_id("key_1") == initial_grant_id("key_1")
    assert initial_grant_id("key_1") != initial_grant_id("key_2")
    assert re.fullmatch(r"adm_[0-9a-f]{32}", initial_grant_id("key_1"))


def test_request_ids_sort_by_the_millisecond_they_were_made_in_and_are_not_guessable(monkeypatch: pytest.MonkeyPatch):
    now = 1_800_000_000_000_000_000
    monkeypatch.setattr("billing.keys.time.time_ns", lambda: now)
    first = [mint_request_id() for _ in range(100)]
    now += 1_000_000
    later = [mint_request_id() for _ in range(100)]
    assert max(first) < min(later)
    assert len({request_id[-20:] for request_id in first + later}) == 200
