import pytest

from billing.money import Mils, usd
from billing.pricing import Price


@pytest.mark.parametrize(("frames", "mils"), [(1, 5), (49, 245), (8 * 49, 1_960), (14_112_000, 70_560_000)])
def test_a_frame_costs_exactly_five_mils(frames: int, mils: int):
    assert Price(Mils(5)).cost(frames) == mils


def test_the_list_price_of_a_year_of_rollouts_is_exact_in_dollars():
    assert usd(Price(Mils(5)).cost(14_112_000)) == 7_056
