"""`dream-admin prices`: show the price book, and load versions from a file."""

import time
from pathlib import Path
from typing import Annotated

import typer

from billing.commands import AddPrice, PriceAdded
from billing.price_terms import read_price_file, terms_of
from billing.reader import LedgerReader
from serve_app.admin import ledger_writer, open_migrated
from serve_app.cli_tools import CannotDo, Json, accepted, one_clear_line, read_settings, show, when

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
