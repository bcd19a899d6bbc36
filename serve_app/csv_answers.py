"""Tables as CSV: streamed in parts, and harmless to the spreadsheet that opens them."""

import csv
import io
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Annotated, Literal

from fastapi import Depends, Query, Request
from fastapi.responses import StreamingResponse

CSV: dict[int | str, dict[str, object]] = {200: {"content": {"text/csv": {"schema": {"type": "string"}}}}}
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")
"""What a spreadsheet takes for the beginning of a formula, also inside quotes."""

Cell = str | int | float | None


def wants_csv(
    request: Request,
    format: Annotated[  # noqa: A002 - the name on the wire
        Literal["json", "csv"] | None, Query(description="In place of the Accept header")
    ] = None,
) -> bool:
    if format is not None:
        return format == "csv"
    accepted = [part.split(";")[0].strip().lower() for part in request.headers.get("accept", "").split(",")]
    return "text/csv" in accepted and "application/json" not in accepted


WantsCsv = Annotated[bool, Depends(wants_csv)]


def csv_answer(name: str, columns: Sequence[str], parts: AsyncIterator[Iterable[Sequence[Cell]]]) -> StreamingResponse:
    """A file of `name`, written as the parts come."""
    headers = {"Content-Disposition": f'attachment; filename="{name}.csv"'}
    return StreamingResponse(_lines(columns, parts), media_type="text/csv; charset=utf-8", headers=headers)


async def one_part(rows: Iterable[Sequence[Cell]]) -> AsyncIterator[Iterable[Sequence[Cell]]]:
    yield rows


async def _lines(columns: Sequence[str], parts: AsyncIterator[Iterable[Sequence[Cell]]]) -> AsyncIterator[str]:
    yield _text([columns])
    async for rows in parts:
        yield _text(rows)


def _text(rows: Iterable[Sequence[Cell]]) -> str:
    output = io.StringIO()
    csv.writer(output).writerows([_harmless(cell) for cell in row] for row in rows)
    return output.getvalue()


def _harmless(cell: Cell) -> Cell:
    """Text that would be a formula gets an apostrophe in front; numbers stay numbers, also negative ones."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA_STARTS) else cell
