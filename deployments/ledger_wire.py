"""How the ledger's commands and outcomes cross processes: as tuples of their fields, pickled in one piece.

Pickling a frozen dataclass goes through Python for each object and field, and Ray's pickler through more of it, at four
times the cost. Both ends are this version's, since the ledger's actor has it in its name.
"""

import pickle
from collections.abc import Callable, Iterable
from dataclasses import fields
from operator import attrgetter
from typing import Any, get_args

from billing.commands import Command, Outcome, PaymentCommand, PaymentOutcome
from billing.payments import commands as payments

_TYPES: dict[str, type[Any]] = {
    each.__name__: each
    for each in (*get_args(Command), *get_args(Outcome), *payments.COMMANDS, *payments.OUTCOMES)
    if each not in (PaymentCommand, PaymentOutcome)
}


def _values_of(message: type[Any]) -> Callable[[Any], tuple[Any, ...]]:
    names = [field.name for field in fields(message)]
    if len(names) > 1:
        return attrgetter(*names)
    return lambda value: tuple(getattr(value, name) for name in names)


_VALUES = {each: (name, _values_of(each)) for name, each in _TYPES.items()}


def pack(messages: Iterable[Command] | Iterable[Outcome]) -> bytes:
    rows = []
    for message in messages:
        name, values = _VALUES[type(message)]
        rows.append((name, values(message)))
    return pickle.dumps(rows, protocol=5)


def unpack_commands(packed: bytes) -> list[Command]:
    return [_TYPES[name](*values) for name, values in pickle.loads(packed)]  # noqa: S301 - from our own processes


def unpack_outcomes(packed: bytes) -> list[Outcome]:
    return [_TYPES[name](*values) for name, values in pickle.loads(packed)]  # noqa: S301 - from our own processes
