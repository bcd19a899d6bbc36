"""Statements of constant text for any number of rows, so that each is prepared once, on both databases."""

import json
from collections import namedtuple
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import Any

from sqlalchemy import ColumnElement, Select, Table, text

from billing.store.connection import WriterConnection
from billing.tables import INT64, SECONDS, billing_metadata


class Query:
    """A statement with named parameters, made into text when it is first asked."""

    def __init__(self, sqlite: Any, postgresql: Any = None, columns: Sequence[str] = ()) -> None:
        """`columns` are for a statement that is text; any other knows them."""
        self._statements = {True: sqlite, False: sqlite if postgresql is None else postgresql}
        self._columns = columns
        self._texts: dict[bool, _Text] = {}

    def __call__(self, connection: WriterConnection, **values: Any) -> Iterator[Any]:
        """Rows that know their columns' names."""
        text = self._texts.get(connection.is_sqlite) or self._compile(connection)
        return text.rows(connection, values)

    def _compile(self, connection: WriterConnection) -> "_Text":
        statement = self._statements[connection.is_sqlite]
        compiled = statement.compile(dialect=connection.dialect)
        columns = self._columns or [column.name for column in statement.exported_columns]
        made = _Text(
            str(compiled),
            compiled.positiontup,
            {name: bound.value for name, bound in compiled.binds.items()},
            namedtuple("Row", columns, rename=True),
        )
        self._texts[connection.is_sqlite] = made
        return made


@dataclass(frozen=True, slots=True)
class _Text:
    statement: str
    order: Sequence[str] | None
    """Of its parameters, by name; None where the driver knows names."""
    constants: dict[str, Any]
    row: Any

    def rows(self, connection: WriterConnection, values: dict[str, Any]) -> Iterator[Any]:
        named = self.constants | values
        parameters = named if self.order is None else [named[name] for name in self.order]
        return map(self.row._make, connection.execute(self.statement, parameters))


def by(statement: Select[Any], *columns: ColumnElement[str]) -> Query:
    """For the rows whose columns are among `wanted`: a JSON array of texts, or of arrays for several columns."""
    # As text: SQLAlchemy's `in_` would put parentheses around the query, which makes it a single value.
    if len(columns) == 1:
        return Query(
            statement.where(text(f"{columns[0]} IN (SELECT value FROM json_each(:wanted))")),  # noqa: S608 - our own name
            statement.where(text(f"{columns[0]} IN (SELECT json_array_elements_text(CAST(:wanted AS json)))")),
        )
    names = ", ".join(map(str, columns))
    values = ", ".join(f"value ->> {position}" for position in range(len(columns)))
    return Query(
        statement.where(text(f"({names}) IN (SELECT {values} FROM json_each(:wanted))")),  # noqa: S608 - our own names
        statement.where(
            text(f"({names}) IN (SELECT {values} FROM json_array_elements(CAST(:wanted AS json)))")  # noqa: S608
        ),
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

    def __call__(self, connection: WriterConnection, rows: Sequence[tuple[Any, ...]]) -> None:
        if not rows:
            return
        if not connection.is_sqlite:
            connection.execute(self.postgresql, tuple(map(_array, zip(*rows, strict=True))))
            return
        done = 0
        for size, statement in self.sqlite_blocks:
            while len(rows) - done >= size:
                connection.execute(statement, tuple(chain.from_iterable(rows[done : done + size])))
                done += size
        if done < len(rows):
            connection.executemany(self.sqlite, rows[done:])


def _array(column: Sequence[Any]) -> str:
    """A PostgreSQL array, as text. All that is stored is printable, so JSON quotes it as PostgreSQL wants it."""
    return f"{{{json.dumps(column, ensure_ascii=False)[1:-1]}}}"


def recordset(table: Table, columns: Sequence[str], same: Iterable[str] = ()) -> str:
    """One array parameter for each column, as rows of the table's types; and after them what is the `same` in each."""
    arrays = ", ".join(f"%s::{_POSTGRESQL_TYPES.get(table.c[name].type, 'text')}[]" for name in columns)
    return f"SELECT {', '.join(['*', *same])} FROM unnest({arrays}) AS r ({', '.join(columns)})"  # noqa: S608 - our own


def insert_all(table: Table, conflict: str = "", same: Mapping[str, str] = MappingProxyType({})) -> Write:
    """Rows have all columns but those that are the `same` in each, given as SQL: binding a value takes as long as
    checking it."""
    columns = [column for column in _COLUMNS[table.name] if column not in same]
    into = f"INSERT INTO {table.name} ({', '.join([*columns, *same])})"

    def values(count: int) -> str:
        return f"{into} VALUES {_values(columns, count, same.values())}{conflict}"

    return Write(
        values(1),
        tuple((size, values(size)) for size in _BLOCKS),
        f"{into} {recordset(table, columns, same.values())}{conflict}",
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


def _values(columns: Sequence[str], count: int, same: Iterable[str] = ()) -> str:
    row = f"({', '.join([*('?' * len(columns)), *same])})"
    return ", ".join([row] * count)
