"""Prices that others publish, expressed in the book; and what rounding may and may not do."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.money import Mils, dollars
from billing.prices import NANO_PER_MIL, CreditPack, PriceBook, PriceVersion, Rate, Work, price, whole_mils_per_frame

PER_FRAME = PriceVersion("dreamdojo-2b", 1, 0.0, (Rate("frame", 500_000),))
LUMA = CreditPack(credits=1_200, costs=Mils(40_000))


def frames(count: int) -> Work:
    return Work(count, fps=10, height=480, width=640)


def clip(seconds: int, height: int, width: int) -> Work:
    return Work(seconds * 24, fps=24, height=height, width=width)


def only(rate: Rate) -> PriceVersion:
    return PriceVersion("model", 1, 0.0, (rate,))


@pytest.mark.parametrize(
    ("count", "shown"),
    [(1, "$0.0005"), (49, "$0.0245"), (4_900, "$2.45"), (14_112_000, "$7056.00"), (1_000_000, "$500.00")],
)
def test_the_pricing_pages_examples(count: int, shown: str):
    assert dollars(price(PER_FRAME, frames(count)).total_mils) == shown


class TestLuma:
    """1,200 credits for $4; credits are not a whole number of anything, their prices still are exact."""

    def test_about_11_credits_a_second_for_the_flash_model_at_720p(self):
        rate = LUMA.rate("second", 11)
        assert price(only(rate), clip(60, 720, 1280)).total_mils == 22_000  # 660 credits: $2.20
        assert price(only(rate), clip(1, 720, 1280)).total_mils == 367  # $0.036666..., up

    @pytest.mark.parametrize(("num_credits", "mils"), [(100, 3_334), (400, 13_334)])
    def test_100_and_400_credits_for_a_clip_of_5_seconds(self, num_credits: int, mils: int):
        rate = LUMA.rate("second", num_credits, per=5)
        assert price(only(rate), clip(5, 720, 1280)).total_mils == mils
        assert price(only(rate), clip(60, 720, 1280)).total_mils == num_credits * 12 * 40_000 // 1_200

    def test_by_the_pixel(self):
        """The same 100 credits for 5 seconds of 720p, said per megapixel-frame."""
        pixels = 5 * 24 * 720 * 1280
        rate = LUMA.rate("megapixel_frame", 100 * 10**6, per=pixels)
        assert price(only(rate), clip(5, 720, 1280)).total_mils == 3_334
        assert price(only(rate), clip(5, 1440, 2560)).total_mils == 13_334  # four times the pixels


class TestRounding:
    def test_a_rate_far_below_a_mil_costs_what_it_costs(self):
        rate = Rate("frame", 1)
        assert price(only(rate), frames(1)).total_mils == 1
        assert price(only(rate), frames(NANO_PER_MIL)).total_mils == 1
        assert price(only(rate), frames(NANO_PER_MIL + 1)).total_mils == 2

    def test_each_line_is_rounded_once_and_not_each_frame(self):
        version = PriceVersion("model", 1, 0.0, (Rate("frame", 50_000), Rate("request", 150_000)))
        priced = price(version, frames(49))  # 24.5 mils and 1.5 mils
        assert [line.mils for line in priced.lines] == [25, 2]
        assert priced.total_mils == 27

    @given(st.integers(1, 10**7), st.integers(0, 10**9), st.integers(1, 10**6))
    def test_a_line_is_never_below_its_exact_price_and_never_a_mil_above(self, count: int, nano: int, per: int):
        exact = Fraction(count * nano, per * NANO_PER_MIL)
        mils = price(only(Rate("frame", nano, per)), frames(count)).total_mils
        assert exact <= mils < exact + 1

    @given(st.integers(1, 10**6), st.integers(1, 1_000))
    def test_whole_mils_per_frame_price_as_a_reservation_does(self, count: int, mils: int):
        version = only(Rate("frame", mils * NANO_PER_MIL))
        assert whole_mils_per_frame(version) == mils
        assert price(version, frames(count)).total_mils == count * mils

    @pytest.mark.parametrize(
        "rates",
        [(Rate("frame", 50_000),), (Rate("second", 100_000),), (Rate("frame", 100_000), Rate("request", 1)), ()],
    )
    def test_what_a_reservation_cannot_freeze_is_said_so(self, rates: tuple[Rate, ...]):
        assert whole_mils_per_frame(PriceVersion("model", 1, 0.0, rates)) is None

    @pytest.mark.parametrize(("nano", "per"), [(-1, 1), (1, 0), (1, -5)])
    def test_what_is_not_a_rate_is_refused(self, nano: int, per: int):
        with pytest.raises(ValueError, match="not a rate"):
            Rate("frame", nano, per)


class TestVersions:
    FIRST = PriceVersion("model", 1, 100.0, (Rate("frame", 500_000),))
    SECOND = PriceVersion("model", 2, 200.0, (Rate("frame", 400_000),))

    @pytest.mark.parametrize(("ts", "version"), [(100.0, 1), (199.999, 1), (200.0, 2), (1e12, 2)])
    def test_a_version_is_in_force_from_its_date_until_the_next(self, ts: float, version: int):
        in_force = PriceBook([self.SECOND, self.FIRST]).at("model", ts)
        assert in_force is not None
        assert in_force.version == version

    def test_before_the_first_date_and_for_other_models_there_is_no_price(self):
        book = PriceBook([self.FIRST])
        assert book.at("model", 99.999) is None
        assert book.at("other", 100.0) is None

    @pytest.mark.parametrize(
        ("version", "effective_from"),
        [(1, 300.0), (3, 300.0), (2, 100.0), (2, 50.0)],
    )
    def test_versions_that_do_not_follow_each_other_are_refused(self, version: int, effective_from: float):
        with pytest.raises(ValueError, match=f"version {version} of model does not"):
            PriceBook([self.FIRST, PriceVersion("model", version, effective_from, ())])
