from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.money import MAX_MILS, Mils, cents, cents_rounded_up, dollars, mils_from_usd, usd

AMOUNTS = st.integers(-MAX_MILS, MAX_MILS).map(Mils)


@pytest.mark.parametrize(
    ("mils", "shown"), [(0, 0), (49, 0), (50, 1), (245, 2), (250, 3), (-49, 0), (-50, -1), (-250, -3)]
)
def test_cents_are_half_up_away_from_zero(mils: int, shown: int):
    assert cents(Mils(mils)) == shown


@given(AMOUNTS)
def test_a_refund_shows_as_the_mirror_of_its_debit(amount: Mils):
    assert cents(Mils(-amount)) == -cents(amount)
    assert dollars(Mils(-amount)).lstrip("-") == dollars(amount).lstrip("-")


def test_shown_cents_do_not_add_up_and_mils_do():
    debits = [Mils(245)] * 100
    assert sum(map(cents, debits)) == 200
    assert cents(Mils(sum(debits))) == 245


@pytest.mark.parametrize(("mils", "covering"), [(0, 0), (1, 1), (99, 1), (100, 1), (101, 2), (245, 3)])
def test_rounded_up_cents_cover_the_amount(mils: int, covering: int):
    assert cents_rounded_up(Mils(mils)) == covering


@given(st.integers(-(2**51), 2**51).map(Mils))
def test_dollars_in_a_float_are_exact_to_the_mil(amount: Mils):
    assert round(usd(amount) * 10_000) == amount


@given(AMOUNTS)
def test_dollars_in_words_are_exact_to_the_mil(amount: Mils):
    assert mils_from_usd(Decimal(dollars(amount).replace("$", ""))) == amount


@pytest.mark.parametrize(
    ("mils", "text"),
    [(250_000, "$25.00"), (245, "$0.0245"), (100, "$0.01"), (1, "$0.0001"), (0, "$0.00"), (-2_450, "-$0.2450")],
)
def test_dollars_show_four_decimals_only_where_cents_are_not_enough(mils: int, text: str):
    assert dollars(Mils(mils)) == text


@pytest.mark.parametrize("text", ["0.00005", "25.00001", "NaN", "Infinity", "-Infinity"])
def test_what_is_not_a_whole_number_of_mils_is_refused(text: str):
    with pytest.raises(ValueError, match="whole number of mils"):
        mils_from_usd(Decimal(text))
