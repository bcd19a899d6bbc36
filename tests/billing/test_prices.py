"""Prices that others publish, expressed in the book; and what rounding may and may not do."""

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.money import Mils, dollars
from billing.price_terms import PriceTerms, read_price_file, terms_of, version_of
from billing.prices import NANO_PER_MIL, CreditPack, PriceBook, PriceVersion, Rate, Tier, Work, price

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

    @given(st.integers(1, 10**7), st.integers(1, 10**9), st.integers(1, 10**6))
    def test_a_line_is_never_below_its_exact_price_and_never_a_mil_above(self, count: int, nano: int, per: int):
        exact = Fraction(count * nano, per * NANO_PER_MIL)
        mils = price(only(Rate("frame", nano, per)), frames(count)).total_mils
        assert exact <= mils < exact + 1

    @given(st.integers(1, 10**6), st.integers(1, 1_000))
    def test_whole_mils_per_frame_price_as_a_reservation_does(self, count: int, mils: int):
        version = only(Rate("frame", mils * NANO_PER_MIL))
        priced = price(version, frames(count))
        assert (priced.mils_per_frame, priced.per_frames, priced.total_mils) == (mils, 1, count * mils)

    @given(
        st.integers(1, 10**5),
        st.lists(st.builds(Rate, st.sampled_from(["frame", "second", "request"]), st.integers(1, 10**9)), min_size=1),
        st.data(),
    )
    def test_the_frozen_rate_settles_parts_monotonely_and_the_whole_exactly(
        self, count: int, rates: list[Rate], data: st.DataObject
    ):
        priced = price(PriceVersion("model", 1, 0.0, tuple(rates)), frames(count))
        fewer = data.draw(st.integers(0, count))
        more = data.draw(st.integers(fewer, count))
        assert 0 == priced.of(0) <= priced.of(fewer) <= priced.of(more) <= priced.of(count) == priced.total_mils

    def test_a_part_of_a_rate_below_a_mil_is_rounded_as_if_it_were_the_whole(self):
        priced = price(only(Rate("frame", 50_000)), frames(49))  # half a mil a frame
        assert [priced.of(count) for count in (1, 2, 3, 48, 49)] == [1, 1, 2, 24, 25]

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
            PriceBook([self.FIRST, PriceVersion("model", version, effective_from, (Rate("frame", 1),))])

    def test_a_customers_own_price_goes_before_the_list_and_the_list_before_the_default(self):
        own = PriceVersion("model", 1, 150.0, (Rate("frame", 300_000),), customer_id="cus_ann")
        book = PriceBook([self.FIRST, self.SECOND, own], default=(Rate("frame", 100_000),))

        def total(model: str, ts: float, customer_id: str = "") -> int:
            priced = book.price(model, frames(10), ts, customer_id)
            assert priced is not None
            return priced.total_mils

        assert [total("model", ts, "cus_ann") for ts in (99.0, 100.0, 150.0, 200.0)] == [10, 50, 30, 30]
        assert [total("model", ts, "cus_bob") for ts in (99.0, 100.0, 150.0, 200.0)] == [10, 50, 50, 40]
        assert total("other", 0.0) == 10
        assert PriceBook([]).price("model", frames(1), 0.0) is None


class TestFactors:
    def test_a_resolution_and_a_latency_class_multiply(self):
        version = PriceVersion(
            "model",
            1,
            0.0,
            (Rate("frame", 500_000),),
            resolutions=((720, 1280, Fraction(3)),),
            latency_classes=(("batch", Fraction(1, 2)),),
        )
        assert price(version, Work(10, 10, 720, 1280, "batch")).total_mils == 75
        assert price(version, Work(10, 10, 720, 1280)).total_mils == 150
        assert price(version, Work(10, 10, 480, 640, "batch")).total_mils == 25

    def test_the_request_that_crosses_a_tier_is_split_by_line(self):
        tiers = (Tier(100, Fraction(4, 5)), Tier(200, Fraction(1, 2)))
        version = PriceVersion("model", 1, 0.0, (Rate("frame", 500_000), Rate("request", 100_000)), tiers=tiers)
        priced = price(version, Work(150, 10, 480, 640, used_frames=90))
        assert [(line.rate.metric, line.quantity, line.mils) for line in priced.lines] == [
            ("frame", 10, 50),
            ("request", 1, 1),
            ("frame", 100, 400),
            ("frame", 40, 100),
        ]
        assert price(version, Work(10, 10, 480, 640, used_frames=10**6)).total_mils == 26

    @pytest.mark.parametrize(
        ("given", "reason"),
        [
            ({"rates": ()}, "rate above nothing"),
            ({"rates": (Rate("frame", 0),)}, "rate above nothing"),
            ({"tiers": (Tier(5, Fraction(1)), Tier(5, Fraction(1)))}, "ascend"),
            ({"tiers": (Tier(0, Fraction(1)),)}, "ascend"),
            ({"tiers": (Tier(5, Fraction(0)),)}, "positive"),
            ({"latency_classes": (("batch", Fraction(-1)),)}, "positive"),
            ({"resolutions": ((1, 1, 0.5),)}, "positive"),
        ],
    )
    def test_what_is_not_a_price_is_refused(self, given: dict[str, Any], reason: str):
        with pytest.raises(ValueError, match=reason):
            PriceVersion("model", 1, 0.0, **({"rates": (Rate("frame", 1),)} | given))


FILE = """
[[price]]
model = "tiny-pusher"
effective_from = 2027-01-01T00:00:00Z
rates = [
    { metric = "frame", usd = "0.0005" },
    { metric = "second", credits = 100, per = 5, pack = { credits = 1200, usd = "4" } },
]
resolutions = [{ height = 480, width = 640, factor = "1.5" }]
latency_classes = { batch = "0.5" }
tiers = [{ after_frames = 1000000, factor = "0.8" }]

[[price]]
model = "tiny-pusher"
customer = "ann"
rates = [{ metric = "frame", usd = "0.000000001", per = 10 }]
"""


class TestFiles:
    def test_a_file_says_what_a_version_says(self):
        first, second = read_price_file(FILE)
        assert (first.model, first.customer, first.effective_from) == ("tiny-pusher", "", 1798761600.0)
        assert version_of("tiny-pusher", "", 3, 5.0, first.terms) == PriceVersion(
            "tiny-pusher",
            3,
            5.0,
            (Rate("frame", 500_000), LUMA.rate("second", 100, per=5)),
            "",
            ((480, 640, Fraction(3, 2)),),
            (("batch", Fraction(1, 2)),),
            (Tier(10**6, Fraction(4, 5)),),
        )
        assert second == PriceTerms("tiny-pusher", "ann", 0.0, terms_of(only(Rate("frame", 1, 10))))

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("[[price", "not TOML"),
            ("x = 1", "nothing else"),
            ("[[price]]\nrates = []", "no model.*'model' is missing"),
            ("[[price]]\nmodel = 'm'", "'rates' is missing"),
            ("[[price]]\nmodel = 'm'\nrates = []", "rate above nothing"),
            ("[[price]]\nmodel = 'm'\nrates = [{metric = 'token', usd = '1'}]", "'token' is not a metric"),
            ("[[price]]\nmodel = 'm'\nrates = [{metric = 'frame', usd = 0.0005}]", "must be a string"),
            ("[[price]]\nmodel = 'm'\nrates = [{metric = 'frame', usd = 'x'}]", "price 1"),
            ("[[price]]\nmodel = 'm'\nrates = [{metric = 'frame', usd = '0.0000000001'}]", "use `per`"),
            ("[[price]]\nmodel = 'm'\nprice = 1\nrates = [{metric = 'frame', usd = '1'}]", "are not fields"),
        ],
    )
    def test_what_is_wrong_is_said_with_its_place(self, text: str, reason: str):
        with pytest.raises(ValueError, match=reason):
            read_price_file(text)

    @pytest.mark.parametrize("terms", ["", "[]", "{}", '{"rates":[["frame",1]],"resolutions":[]}', '{"rates":5}'])
    def test_terms_that_nobody_wrote_are_refused(self, terms: str):
        with pytest.raises(ValueError):  # noqa: PT011 - every reason is a good one
            version_of("model", "", 1, 0.0, terms)
