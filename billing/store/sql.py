"""Statements of constant text for any number of rows, so that each is prepared once, on both databases."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
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


# One statement of constant text for any number of rows: SQLite runs it once per row, prepared; PostgreSQL once, over
# one array for each column.
_COLUMNS = {table.name: tuple(column.name for column in table.columns) for table in billing_metadata.sorted_tables}
_POSTGRESQL_TYPES = {INT64: "bigint", SECONDS: "float8"}


@dataclass(frozen=True, slots=True)
class Write:
    """One kind of change, of many rows at once. Rows are tuples in the order of `columns`."""

    sqlite: str
    postgresql: str

    def __call__(self, connection: Connection, rows: list[tuple[Any, ...]]) -> None:
        if not rows:
            return
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql(self.sqlite, rows)
        else:
            connection.exec_driver_sql(self.postgresql, tuple(map(_array, zip(*rows, strict=True))))


def _array(column: Sequence[Any]) -> str:
    """A PostgreSQL array, as text. All that is stored is printable, so JSON quotes it as PostgreSQL wants it."""
    return f"{{{json.dumps(column, ensure_ascii=False)[1:-1]}}}"


def recordset(table: Table, columns: Sequence[str]) -> str:
    """One array parameter for each column, as rows of the table's types."""
    arrays = ", ".join(f"%s::{_POSTGRESQL_TYPES.get(table.c[name].type, 'text')}[]" for name in columns)
    return f"SELECT * FROM unnest({arrays}) AS r ({', '.join(columns)})"  # noqa: S608 - our own names


def insert_all(table: Table) -> Write:
    columns = _COLUMNS[table.name]
    into = f"INSERT INTO {table.name} ({', '.join(columns)})"
    return Write(f"{into} VALUES ({', '.join('?' * len(columns))})", f"{into} {recordset(table, columns)}")


def update_all(table: Table, key: str, columns: Sequence[str], only: str = "") -> Write:
    """Rows are the new values and then the key."""
    condition = f" AND {table.name}.{only}" if only else ""
    rows = recordset(table, [*columns, key])
    one = ", ".join(f"{name} = ?" for name in columns)
    many = ", ".join(f"{name} = new.{name}" for name in columns)
    return Write(
        f"UPDATE {table.name} SET {one} WHERE {key} = ?{condition}",  # noqa: S608 - our own names
        f"UPDATE {table.name} SET {many} FROM ({rows}) AS new"  # noqa: S608 - our own names
        f" WHERE {table.name}.{key} = new.{key}{condition}",
    )


def upsert_all(table: Table, key: str) -> Write:
    changes = ", ".join(f"{name} = excluded.{name}" for name in _COLUMNS[table.name] if name != key)
    write = insert_all(table)
    conflict = f" ON CONFLICT ({key}) DO UPDATE SET {changes}"
    return Write(write.sqlite + conflict, write.postgresql + conflict)
