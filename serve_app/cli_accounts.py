"""`dream-admin teams`, `credits limit` and `credits close`: who spends whose money, who pays later, closed months."""

from dataclasses import asdict
from typing import Annotated, Any, Literal, cast

import typer

from billing.commands import (
    CloseStatement,
    CreditLineSet,
    InsufficientCredits,
    MemberSet,
    SetCreditLine,
    SetMember,
    StatementClosed,
    Transfer,
    Transferred,
)
from billing.keys import mint_customer_id, mint_transfer_id
from billing.money import Mils, usd
from billing.reader import CustomerRecord, LedgerReader
from serve_app.admin import ledger_writer, open_migrated
from serve_app.cli_tools import CannotDo, Json, accepted, mils_of, one_clear_line, read_settings, show, when
from serve_app.settings import Settings

teams_app = typer.Typer(no_args_is_help=True, help="Customers that spend another one's money.")

Customer = Annotated[str, typer.Option(help="Name or cus_... id.")]


@teams_app.command("set")
def set_member(
    parent: Annotated[str, typer.Option(help="Whose team: name or cus_... id.")],
    member: Annotated[str, typer.Option(help="The member's name; a customer is made if there is none.")],
    cap: Annotated[str, typer.Option(help="Dollars of the parent's that it may spend; without, only its own.")] = "",
    period: Annotated[str, typer.Option(help="What the cap is for: day or month, of UTC.")] = "month",
    as_json: Json = False,
) -> None:
    """Put a customer into a team, or change its cap there."""
    with one_clear_line():
        if period not in ("day", "month"):
            raise CannotDo(f"{period!r} is not a period; day and month are")
        settings = read_settings()
        terms: dict[str, Any] = {}
        if cap:
            terms = {
                "cap_mils": mils_of(cap, at_least=0),
                "cap_period": cast(Literal["day", "month"], period),
            }
        command = SetMember(mint_customer_id(), member, _known(settings, parent).customer_id, **terms)
        with ledger_writer(settings) as apply:
            done = accepted(apply(command), MemberSet)
        show([asdict(done)], as_json, single=True)


@teams_app.command("transfer")
def transfer(
    source: Annotated[str, typer.Option("--from", help="Name or cus_... id.")],
    target: Annotated[str, typer.Option("--to", help="Name or cus_... id; one of the two is the other's parent.")],
    amount: Annotated[str, typer.Option(help="Dollars, such as 25.00.")],
    note: Annotated[str, typer.Option(help="What both read in their transaction lists.")] = "Team transfer",
    as_json: Json = False,
) -> None:
    """Move money between a parent and a member of its team."""
    with one_clear_line():
        settings = read_settings()
        sender, receiver = _known(settings, source), _known(settings, target)
        command = Transfer(
            mint_transfer_id(), sender.customer_id, receiver.customer_id, mils_of(amount, at_least=1), note
        )
        with ledger_writer(settings) as apply:
            outcome = apply(command)
        if isinstance(outcome, InsufficientCredits):
            raise CannotDo(f"{sender.name} has {usd(outcome.balance_mils)} dollars, which is too little")
        done = accepted(outcome, Transferred)
        show(
            [
                {
                    "id": done.transfer_id,
                    "amount_usd": usd(done.amount_mils),
                    "from_balance_usd": usd(done.from_balance_after_mils),
                    "to_balance_usd": usd(done.to_balance_after_mils),
                }
            ],
            as_json,
            single=True,
        )


def set_limit(
    customer: Customer,
    limit: Annotated[str, typer.Option(help="Dollars that the balance may be below zero.")],
    overdue: Annotated[bool, typer.Option(help="Let it not spend below zero for now.")] = False,
    as_json: Json = False,
) -> None:
    """Let a customer pay later, up to a limit; or stop it while an invoice is overdue."""
    with one_clear_line():
        settings = read_settings()
        command = SetCreditLine(_known(settings, customer).customer_id, mils_of(limit, at_least=0), overdue)
        with ledger_writer(settings) as apply:
            done = accepted(apply(command), CreditLineSet)
        show(
            [
                {
                    "customer_id": done.customer_id,
                    "limit_usd": usd(done.limit_mils),
                    "spends_down_to_usd": usd(done.floor_mils),
                }
            ],
            as_json,
            single=True,
        )


def close_month(
    customer: Customer,
    month: Annotated[str, typer.Option(help="YYYY-MM, this month or one before it.")],
    as_json: Json = False,
) -> None:
    """Close a month of a customer with its newest entry. Again, it shows the same statement."""
    with one_clear_line():
        settings = read_settings()
        command = CloseStatement(_known(settings, customer).customer_id, month)
        with ledger_writer(settings) as apply:
            done = accepted(apply(command), StatementClosed)
        shown = {
            name.replace("_mils", "_usd"): usd(Mils(value)) if name.endswith("_mils") else value
            for name, value in asdict(done).items()
        }
        show([shown | {"closed_at": when(done.closed_at)}], as_json, single=True)


def _known(settings: Settings, name_or_id: str) -> CustomerRecord:
    known = LedgerReader(open_migrated(settings)).customer(name_or_id)
    if known is None:
        raise CannotDo(f"there is no customer {name_or_id!r}; `dream-admin keys create` makes one")
    return known
