"""`dream-admin`: run the cluster, mint and revoke keys, grant credits, audit the ledger.

Tables for people; `--json` on any command for machines. Safe while the cluster runs and while it does not.
"""

import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer
from rich.console import Console

from billing import invariants
from billing.backup import back_up
from billing.commands import (
    CreateKey,
    Grant,
    Granted,
    KeyCreated,
    KeyId,
    KeyRevoked,
    KeyRotated,
    KeyTerms,
    KeyTermsSet,
    RevokeKey,
    RotateKey,
    SetKeyTerms,
)
from billing.keys import mint_customer_id, mint_grant_id, mint_key_id, mint_token, token_sha256
from billing.money import usd
from billing.reader import LedgerReader
from deployments.payments.errors import PaymentError
from serve_app.admin import ledger_writer, open_migrated
from serve_app.cli_accounts import close_month, set_limit, teams_app
from serve_app.cli_prices import prices_app
from serve_app.cli_tools import (
    CannotDo,
    Json,
    accepted,
    mils_of,
    one_clear_line,
    read_settings,
    settings_problems,
    show,
    when,
)

DEFAULT_REFILL_PER_S = 50.0
DEFAULT_BURST = 200

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
keys = typer.Typer(no_args_is_help=True, help="API keys.")
credits_app = typer.Typer(no_args_is_help=True, help="Prepaid credits.")
ledger_app = typer.Typer(no_args_is_help=True, help="The ledger.")
stripe_app = typer.Typer(no_args_is_help=True, help="Payments.")
app.add_typer(keys, name="keys")
app.add_typer(credits_app, name="credits")
app.add_typer(ledger_app, name="ledger")
app.add_typer(stripe_app, name="stripe")
app.add_typer(prices_app, name="prices")
app.add_typer(teams_app, name="teams")
credits_app.command("limit")(set_limit)
credits_app.command("close")(close_month)


@app.command()
def serve() -> None:
    """Run the whole cluster on this machine, in the foreground, until Ctrl-C."""
    from serve_app.launch import run

    with one_clear_line():
        settings = read_settings()
        with settings_problems():
            args = settings.cluster_args()
        run(settings, args)


@keys.command("create")
def create_key(
    customer: Annotated[str, typer.Option(help="The customer's name; one of that name is made if there is none.")],
    initial_credits: Annotated[str, typer.Option(help="Dollars credited with the key, such as 25.00.")] = "0",
    qps: Annotated[float, typer.Option(min=0.01, help="Requests per second that refill the bucket.")] = (
        DEFAULT_REFILL_PER_S
    ),
    burst: Annotated[int, typer.Option(min=1, help="Requests that may come at once.")] = DEFAULT_BURST,
    as_json: Json = False,
) -> None:
    """Mint a key. It is shown once: only its hash is stored."""
    with one_clear_line():
        token = mint_token()
        command = CreateKey(
            key_id=mint_key_id(),
            sha256=token_sha256(token),
            last4=token[-4:],
            customer_name=_name(customer),
            customer_id=mint_customer_id(),
            initial_credits_mils=mils_of(initial_credits, at_least=0),
            refill_per_s=qps,
            burst=burst,
        )
        with ledger_writer(read_settings()) as apply:
            outcome = accepted(apply(command), KeyCreated)
        show(
            [
                {
                    "key": token,
                    "key_id": outcome.key_id,
                    "customer": customer,
                    "customer_id": outcome.customer_id,
                    "balance_usd": usd(outcome.balance_after_mils),
                }
            ],
            as_json,
            single=True,
        )


@keys.command("list")
def list_keys(as_json: Json = False) -> None:
    """Every key, without its secret."""
    with one_clear_line():
        summaries = LedgerReader(open_migrated(read_settings())).keys()
        show(
            [
                {
                    "key_id": key.key_id,
                    "ends_in": key.last4,
                    "label": key.terms.label,
                    "customer": key.customer_name,
                    "customer_id": key.customer_id,
                    "balance_usd": usd(key.balance_mils),
                    "qps": key.refill_per_s,
                    "burst": key.burst,
                    "created": when(key.created_at),
                    "revoked": when(key.revoked_at),
                }
                for key in summaries
            ],
            as_json,
        )


@keys.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(help="key_..., as `keys list` shows it.")], as_json: Json = False
) -> None:
    """Revoke a key: no reservation that reaches the ledger later is accepted. Running work finishes and is charged."""
    with one_clear_line():
        with ledger_writer(read_settings()) as apply:
            outcome = accepted(apply(RevokeKey(KeyId(key_id))), KeyRevoked)
        show([{"key_id": outcome.key_id, "revoked": when(outcome.revoked_at)}], as_json, single=True)


@keys.command("rotate")
def rotate_key(key_id: Annotated[str, typer.Argument(help="key_... to replace.")], as_json: Json = False) -> None:
    """A new secret with the same wallet, limits, terms and spending. The old one is revoked in the same commit."""
    with one_clear_line():
        token = mint_token()
        command = RotateKey(KeyId(key_id), mint_key_id(), token_sha256(token), token[-4:])
        with ledger_writer(read_settings()) as apply:
            outcome = accepted(apply(command), KeyRotated)
        show(
            [
                {
                    "key": token,
                    "key_id": outcome.key_id,
                    "customer_id": outcome.customer_id,
                    "old_key_revoked": when(outcome.revoked_at),
                }
            ],
            as_json,
            single=True,
        )


@keys.command("terms")
def set_terms(
    key_id: Annotated[str, typer.Argument(help="key_..., as `keys list` shows it.")],
    label: Annotated[str, typer.Option(help="What its owner calls it.")] = "",
    scope: Annotated[str, typer.Option(help="spend, or read for balances and lists only.")] = "spend",
    model: Annotated[list[str] | None, typer.Option(help="A model that it may use; repeat for more.")] = None,
    expires_in_days: Annotated[float | None, typer.Option(min=0.0, help="From now.")] = None,
    daily_budget: Annotated[str, typer.Option(help="Dollars per UTC day.")] = "",
    monthly_budget: Annotated[str, typer.Option(help="Dollars per UTC month.")] = "",
    as_json: Json = False,
) -> None:
    """Replace what a key may do; an option that is left out lifts its limit. Spending stays counted."""
    with one_clear_line():
        if scope not in ("spend", "read"):
            raise CannotDo(f"{scope!r} is not a scope; spend and read are")
        terms = KeyTerms(
            label=label,
            scope=cast(Literal["spend", "read"], scope),
            models=tuple(model or ()),
            expires_at=None if expires_in_days is None else time.time() + expires_in_days * 86_400,
            daily_budget_mils=mils_of(daily_budget, at_least=0) if daily_budget else None,
            monthly_budget_mils=mils_of(monthly_budget, at_least=0) if monthly_budget else None,
        )
        with ledger_writer(read_settings()) as apply:
            outcome = accepted(apply(SetKeyTerms(KeyId(key_id), terms)), KeyTermsSet)
        show([{"key_id": outcome.key_id} | _terms(terms)], as_json, single=True)


@credits_app.command("grant")
def grant_credits(
    customer: Annotated[str, typer.Option(help="Name or cus_... id of an existing customer.")],
    amount: Annotated[str, typer.Option(help="Dollars, such as 25.00.")],
    note: Annotated[str, typer.Option(help="What the customer reads in the transaction list.")] = "Operator credit",
    as_json: Json = False,
) -> None:
    """Add credit by an operator's decision."""
    with one_clear_line():
        settings = read_settings()
        known = LedgerReader(open_migrated(settings)).customer(customer)
        if known is None:
            raise CannotDo(f"there is no customer {customer!r}; `dream-admin keys create` makes one")
        command = Grant(known.customer_id, mils_of(amount, at_least=1), mint_grant_id(), note)
        with ledger_writer(settings) as apply:
            outcome = accepted(apply(command), Granted)
        show(
            [
                {
                    "id": outcome.public_id,
                    "customer_id": known.customer_id,
                    "amount_usd": usd(outcome.amount_mils),
                    "balance_usd": usd(outcome.balance_after_mils),
                }
            ],
            as_json,
            single=True,
        )


@ledger_app.command("audit")
def audit_ledger(as_json: Json = False) -> None:
    """Check every invariant of the ledger. Exit code 1 if one is violated."""
    with one_clear_line():
        started = time.perf_counter()
        violations = invariants.audit(open_migrated(read_settings()))
        took_s = round(time.perf_counter() - started, 3)
    if as_json:
        print(json.dumps({"violations": [str(violation) for violation in violations], "took_s": took_s}))
    else:
        show([{"violation": str(violation)} for violation in violations], as_json=False)
        Console().print(f"{len(violations)} violations of {len(invariants.AUDITS)} invariants, {took_s} s")
    if violations:
        raise typer.Exit(1)


@stripe_app.callback()
def stripe() -> None:
    """Payments."""


@stripe_app.command("reconcile")
def reconcile_stripe(
    days_ago: Annotated[int, typer.Option(min=0, max=365, help="Days of UTC; 0 is today, as far as it has come.")] = 1,
    as_json: Json = False,
) -> None:
    """Hear what was missed, compare a day of Stripe's books with ours, file the report. Exit code 1 if they differ."""
    from serve_app.reconcile import reconcile

    with one_clear_line():
        try:
            report = reconcile(read_settings(), days_ago)
        except (PaymentError, ValueError) as error:
            raise CannotDo(str(error)) from None
    body = json.loads(report.body)
    if as_json:
        print(json.dumps(body | {"signature": report.signature}))
    else:
        show([{"customer": customer} | row for customer, row in body["customers"].items()], as_json=False)
        Console().print(f"the books differ by {report.difference_cents} cents")
    if report.difference_cents or body["unknown_payments"] or body["unseen_payments"]:
        raise typer.Exit(1)


@ledger_app.command("backup")
def back_up_ledger(destination: Annotated[Path, typer.Argument(help="A file that does not exist yet.")]) -> None:
    """Copy the ledger as it is now, while it is in use; docs/04-operations.md says how to put a copy in its place."""
    with one_clear_line():
        engine = open_migrated(read_settings())
        try:
            back_up(engine, destination)
        except OSError as error:
            raise CannotDo(f"cannot write {destination}: {error.strerror or error}") from None
    print(f"{destination}: {destination.stat().st_size} bytes")


def _terms(terms: KeyTerms) -> dict[str, Any]:
    """As they are shown: only what limits the key."""
    shown = {
        "label": terms.label or None,
        "scope": terms.scope,
        "models": ", ".join(terms.models) or None,
        "expires": when(terms.expires_at),
        "daily_budget_usd": None if terms.daily_budget_mils is None else usd(terms.daily_budget_mils),
        "monthly_budget_usd": None if terms.monthly_budget_mils is None else usd(terms.monthly_budget_mils),
    }
    return {name: value for name, value in shown.items() if value is not None}


def _name(customer: str) -> str:
    if not 1 <= len(customer.strip()) <= 200:
        raise CannotDo("a customer's name has 1 to 200 characters")
    return customer.strip()


if __name__ == "__main__":
    app()
