"""`dream-admin prices`: show the price book, load versions from a file, sell provisioned units."""

import time
from pathlib import Path
from typing import Annotated

import typer

from billing.commands import AddPrice, ChargeUnits, PriceAdded, SetUnits, UnitsCharged, UnitsSet
from billing.keys import unit_charge_id
from billing.money import usd
from billing.price_terms import read_price_file, terms_of
from billing.reader import LedgerReader
from billing.statements import Month
from billing.units import UnitsReader
from serve_app.admin import ledger_writer, open_migrated
from serve_app.cli_tools import CannotDo, Json, accepted, mils_of, one_clear_line, read_settings, show, when

prices_app = typer.Typer(no_args_is_help=True, help="The price book.")


@prices_app.command("show")
def show_prices(as_json: Json = False) -> None:
    """Every version of every price. A model without one costs its catalog's list price."""
    with one_clear_line():
        now = time.time()
        versions = LedgerReader(open_migrated(read_settings())).prices()
        newest = {(each.model, each.customer_id): each for each in versions if each.effective_from <= now}
        show(
            [
                {
                    "model": each.model,
                    "customer_id": each.customer_id or None,
                    "version": each.version,
                    "effective": when(each.effective_from),
                    "in_force": newest.get((each.model, each.customer_id)) is each,
                    "terms": terms_of(each),
                }
                for each in versions
            ],
            as_json,
        )


@prices_app.command("load")
def load_prices(
    file: Annotated[Path, typer.Argument(help="TOML with [[price]] tables; docs/07-prices.md says how.")],
    as_json: Json = False,
) -> None:
    """Add the prices of a file as new versions. One that is already the newest of its model is left as it is."""
    with one_clear_line():
        settings = read_settings()
        try:
            given = read_price_file(file.read_text())
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise CannotDo(f"{file}: {error}") from None
        reader = LedgerReader(open_migrated(settings))
        newest = {(each.model, each.customer_id): each for each in reader.prices()}
        rows = []
        with ledger_writer(settings) as apply:
            for each in given:
                customer_id = ""
                if each.customer:
                    known = reader.customer(each.customer)
                    if known is None:
                        raise CannotDo(f"there is no customer {each.customer!r}; `dream-admin keys create` makes one")
                    customer_id = known.customer_id
                last = newest.get((each.model, customer_id))
                version = 1 if last is None else last.version + 1
                is_new = last is None or (last.effective_from, terms_of(last)) != (each.effective_from, each.terms)
                if is_new:
                    command = AddPrice(each.model, customer_id, version, each.effective_from, each.terms)
                    accepted(apply(command), PriceAdded)
                rows.append(
                    {
                        "model": each.model,
                        "customer_id": customer_id or None,
                        "version": version if is_new or last is None else last.version,
                        "effective": when(each.effective_from),
                        "added": is_new,
                    }
                )
        show(rows, as_json)


@prices_app.command("units")
def show_units(as_json: Json = False) -> None:
    """Every version of every customer's provisioned units."""
    with one_clear_line():
        show(
            [
                {
                    "customer_id": each.customer_id,
                    "model": each.model,
                    "version": each.version,
                    "from": each.from_period,
                    "units": each.units,
                    "unit_usd": usd(each.unit_mils),
                    "unit_frames": each.unit_frames,
                    "units_per_replica": each.units_per_replica,
                }
                for each in UnitsReader(open_migrated(read_settings())).versions()
            ],
            as_json,
        )


@prices_app.command("set-units")
def set_units(
    customer: Annotated[str, typer.Argument(help="Name or cus_... id.")],
    model: Annotated[str, typer.Argument()],
    units: Annotated[int, typer.Option(help="How many a month; 0 ends it.")],
    usd_per_unit: Annotated[str, typer.Option(help="Dollars a month for each, such as 500.")],
    frames_per_unit: Annotated[int, typer.Option(help="Frames a month that each pays for.")],
    since: Annotated[str, typer.Option("--from", help="The first month, such as 2027-01; this one if left out.")] = "",
    units_per_replica: Annotated[
        int, typer.Option(help="So many are a replica that is always there; 0 promises no capacity.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Sell a customer provisioned units from a month on. The month is charged as soon as the balance covers it."""
    with one_clear_line():
        settings = read_settings()
        price = mils_of(usd_per_unit, at_least=1)
        engine = open_migrated(settings)
        known = LedgerReader(engine).customer(customer)
        if known is None:
            raise CannotDo(f"there is no customer {customer!r}; `dream-admin keys create` makes one")
        mine = (known.customer_id, model)
        versions = [each for each in UnitsReader(engine).versions() if (each.customer_id, each.model) == mine]
        period = since or str(Month.of(time.time()))
        terms = (period, units, price, frames_per_unit, units_per_replica)
        last = versions[-1] if versions else None
        same = last is not None and terms == (
            last.from_period,
            last.units,
            last.unit_mils,
            last.unit_frames,
            last.units_per_replica,
        )
        version = len(versions) if same else len(versions) + 1
        with ledger_writer(settings) as apply:
            accepted(apply(SetUnits(known.customer_id, model, version, *terms)), UnitsSet)
            charged = accepted(apply(ChargeUnits()), UnitsCharged)
        row = {
            "customer_id": known.customer_id,
            "model": model,
            "version": version,
            "from": period,
            "units": units,
            "charged_now": unit_charge_id(known.customer_id, model, period) in charged.charged,
            "waits_for_credit": known.customer_id in charged.unpaid,
            "replicas_promised": UnitsReader(engine).replicas(time.time()).get(model, 0),
        }
        show([row], as_json, single=True)
