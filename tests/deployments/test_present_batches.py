"""What is left of the present batches, against looking at each of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.messages import ReplicaId
from deployments.present_batches import PresentBatches

EVENTS = st.lists(
    st.tuples(st.integers(0, 5), st.one_of(st.none(), st.floats(0, 50)), st.floats(0, 5)),
    max_size=200,
)


@given(EVENTS)
def test_the_sum_is_that_over_each_replica(events: list[tuple[int, float | None, float]]) -> None:
    """A replica's batch begins anew, or it ends early, at times that go on."""
    present, ends, now = PresentBatches(), dict[int, float](), 1e6
    for replica, takes_s, after_s in events:
        now += after_s
        if takes_s is None:
            present.forget(ReplicaId(str(replica)))
            ends.pop(replica, None)
        else:
            present.expect(ReplicaId(str(replica)), now + takes_s)
            ends[replica] = now + takes_s
        assert present.left_s(now) == pytest.approx(sum(max(0.0, end - now) for end in ends.values()), abs=1e-6)
