"""Statements of constant text for any number of rows, so that each is prepared once, on both databases."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from sqlalchemy import Column, Connection, Row, Select, Table, text

from billing.tables import INT64, SECONDS, billing_metadata

AnyRow = Row[*tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class ByText:
    """A query for the rows whose `column` is in `wanted`, a JSON array: constant text, so it is prepared once."""

    sqlite: Any
    postgresql: Any


def by(statement: Select[Any], column: Column[str]) -> ByText:
    # As text: SQLAlchemy's `in_` would put parentheses around the query, which makes it a single value.
    return ByText(
        statement.where(text(f"{column} IN (SELECT value FROM json_each(:wanted))")),  # noqa: S608 - our own name
        statement.where(text(f"{column} IN (SELECT json_array_elements_text(CAST(:wanted AS json)))")),
    )


# Statements of constant text for any number of rows: SQLite takes them in blocks of these sizes and then one by one,
# PostgreSQL all at once, over one array for each column. Row by row costs SQLite half as much again, and Python's
# driver lets go of the interpreter and waits to get it back with every row.
_BLOCKS = (64, 16)
_COLUMNS = {table.name: tuple(column.name for column in table.columns) for table in billing_metadata.sorted_tables}
_POSTGRESQL_TYPES = {INT64: "bigint", SECONDS: "float8"}


@dataclass(frozen=True, slots=True)
class Write:
    """One kind of change, of many rows at once. Rows are tuples in the order of `columns`."""

    sqlite: str
    """For one row."""
    sqlite_blocks: tuple[tuple[int, str], ...]
    """For that many rows, the largest number first."""
    postgresql: str

    def __call__(self, connection: Connection, rows: list[tuple[Any, ...]]) -> None:
        if not rows:
            return
        if connection.dialect.name != "sqlite":
            connection.exec_driver_sql(self.postgresql, tuple(map(_array, zip(*rows, strict=True))))
            return
        done = 0
        for size, statement in self.sqlite_blocks:
            while len(rows) - done >= size:
                connection.exec_driver_sql(statement, tuple(chain.from_iterable(rows[done : done + size])))
                done += size
        if done < len(rows):
            connection.exec_driver_sql(self.sqlite, rows[done:])


def _array(column: Sequence[Any]) -> str:
    """A PostgreSQL array, as text. All that is stored is printable, so JSON quotes it as PostgreSQL wants it."""
    return f"{{{json.dumps(column, ensure_ascii=False)[1:-1]}}}"


def recordset(table: Table, columns: Sequence[str]) -> str:
    """One array parameter for each column, as rows of the table's types."""
    arrays = ", ".join(f"%s::{_POSTGRESQL_TYPES.get(table.c[name].type, 'text')}[]" for name in columns)
    return f"SELECT * FROM unnest({arrays}) AS r ({', '.join(columns)})"  # noqa: S608 - our own names


def insert_all(table: Table, conflict: str = "") -> Write:
    columns = _COLUMNS[table.name]
    into = f"INSERT INTO {table.name} ({', '.join(columns)})"

    def values(count: int) -> str:
        return f"{into} VALUES {_values(columns, count)}{conflict}"

    return Write(
        values(1),
        tuple((size, values(size)) for size in _BLOCKS),
        f"{into} {recordset(table, columns)}{conflict}",
    )


def update_all(table: Table, key: str, columns: Sequence[str]) -> Write:
    """Rows are the new values and then the key."""
    given = [*columns, key]

    def update(rows: str, names: Sequence[str]) -> str:
        new = dict(zip(given, names, strict=True))
        changes = ", ".join(f"{name} = new.{new[name]}" for name in columns)
        return (
            f"UPDATE {table.name} SET {changes} FROM ({rows}) AS new"  # noqa: S608 - our own names
            f" WHERE {table.name}.{key} = new.{new[key]}"
        )

    one = ", ".join(f"{name} = ?" for name in columns)
    numbered = [f"column{position}" for position in range(1, len(given) + 1)]
    return Write(
        f"UPDATE {table.name} SET {one} WHERE {key} = ?",  # noqa: S608 - our own names
        tuple((size, update(f"VALUES {_values(given, size)}", numbered)) for size in _BLOCKS),
        update(recordset(table, given), given),
    )


def insert_missing(table: Table) -> Write:
    """Rows whose key is there already are left as they are."""
    return insert_all(table, " ON CONFLICT DO NOTHING")


def upsert_all(table: Table, key: str) -> Write:
    changes = ", ".join(f"{name} = excluded.{name}" for name in _COLUMNS[table.name] if name != key)
    return insert_all(table, f" ON CONFLICT ({key}) DO UPDATE SET {changes}")


def delete_all(table: Table, key: str) -> Write:
    """Rows hold nothing but the key."""
    delete = f"DELETE FROM {table.name} WHERE {key}"  # noqa: S608 - our own names
    return Write(f"{delete} = ?", (), f"{delete} IN ({recordset(table, [key])})")


def _values(columns: Sequence[str], count: int) -> str:
    row = f"({', '.join('?' * len(columns))})"
    return ", ".join([row] * count)
