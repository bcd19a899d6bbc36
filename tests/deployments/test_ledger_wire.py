from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing.commands import Command, KeyRefused, Outcome, PaymentCommand, PaymentOutcome
from billing.payments import commands as payments
from deployments.ledger_wire import pack, unpack_commands, unpack_outcomes

COMMANDS = [*(each for each in get_args(Command) if each is not PaymentCommand), *payments.COMMANDS]
OUTCOMES = [*(each for each in get_args(Outcome) if each is not PaymentOutcome), *payments.OUTCOMES]
of_each = settings(max_examples=settings().max_examples // 4)  # there are 79 kinds, of the same few types


@pytest.mark.parametrize("command", COMMANDS, ids=lambda each: each.__name__)
@of_each
@given(data=st.data())
def test_every_command_arrives_as_it_was_sent(command: type[Any], data: st.DataObject) -> None:
    sent = data.draw(st.lists(st.builds(command), max_size=3))
    assert repr(unpack_commands(pack(sent))) == repr(sent)  # a float that is no number is not equal to itself


@pytest.mark.parametrize("outcome", OUTCOMES, ids=lambda each: each.__name__)
@of_each
@given(data=st.data())
def test_every_outcome_arrives_as_it_was_sent(outcome: type[Any], data: st.DataObject) -> None:
    sent = data.draw(st.lists(st.builds(outcome), max_size=3))
    assert repr(unpack_outcomes(pack([*sent, KeyRefused()]))) == repr([*sent, KeyRefused()])


def test_what_the_ledger_does_not_know_is_not_sent() -> None:
    with pytest.raises(KeyError, match="object"):
        pack([object()])  # type: ignore[list-item]
