"""What the commands of `dream-admin` share: settings, amounts, refusals in one line, tables for people and JSON."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, TypeVar

import typer
from pydantic import ValidationError
from pydantic_settings import SettingsError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from billing.commands import KeyRefused, Outcome, Rejected, UnknownCustomer, UnknownKey
from billing.errors import BillingError
from billing.money import Mils, mils_from_usd, usd
from serve_app.admin import ClusterUnreachable, DataDirectoryBusy
from serve_app.settings import Settings

Accepted = TypeVar("Accepted")

UNUSABLE = 2
"""Exit code when the command could not be carried out; 1 is an audit that found something."""
INTERRUPTED = 130
PIPE_WIDTH = 200
"""Columns of a table that no terminal bounds."""
Json = Annotated[bool, typer.Option("--json", help="One JSON document instead of a table.")]


class CannotDo(Exception):
    """The command cannot be carried out; the message says why and what to do."""


@contextmanager
def one_clear_line() -> Iterator[None]:
    """Expected failures become one line on standard error and exit code 2."""
    from serve_app.launch import CannotStart

    try:
        yield
    except (CannotDo, CannotStart, ClusterUnreachable, DataDirectoryBusy, BillingError) as error:
        print(f"dream-admin: {error}", file=sys.stderr)
        raise typer.Exit(UNUSABLE) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def accepted(outcome: Outcome, expected: type[Accepted]) -> Accepted:
    """The outcome, if the ledger did what was asked."""
    match outcome:
        case Rejected(reason):
            raise CannotDo(f"the ledger refused: {reason}")
        case KeyRefused():
            raise CannotDo("this key was revoked or has expired; create another")
        case UnknownCustomer(customer):
            raise CannotDo(f"there is no customer {customer!r}")
        case UnknownKey(key_id):
            raise CannotDo(f"there is no key {key_id}; see `dream-admin keys list`")
    assert isinstance(outcome, expected), outcome
    return outcome


def read_settings() -> Settings:
    with settings_problems():
        return Settings()


@contextmanager
def settings_problems() -> Iterator[None]:
    """The first thing wrong with the environment, by the variable's name."""
    try:
        yield
    except SettingsError as error:
        raise CannotDo(f"{error}; it takes a JSON object") from None
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in problem["loc"]).upper() or "settings"
        raise CannotDo(f"{name}: {problem['msg']}") from None


def mils_of(dollars: str, at_least: int) -> Mils:
    try:
        amount = mils_from_usd(Decimal(dollars))
    except (ArithmeticError, ValueError):
        raise CannotDo(f"{dollars!r} is not an amount of dollars with at most four decimals") from None
    if amount < at_least:
        raise CannotDo(f"{dollars} dollars is too little; at least {usd(Mils(at_least))} is accepted")
    return amount


def when(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def show(rows: Sequence[dict[str, Any]], as_json: bool, single: bool = False) -> None:
    """A list as a table; a single record as one line per field, so that a secret can be copied whole."""
    if as_json:
        print(json.dumps(rows[0] if single else rows))
        return
    table = Table(show_header=not single)
    names = ("", "") if single else tuple(rows[0] if rows else ())
    for name in names:
        table.add_column(name, overflow="fold")
    for values in rows[0].items() if single else (row.values() for row in rows):
        table.add_row(*(Text("" if value is None else str(value)) for value in values))
    if rows:
        Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)
