"""Changes what a SQLite table declares without touching its rows: SQLite has no ALTER TABLE for constraints.

The way that SQLite documents for changes which need no row rewritten (sqlite.org/lang_altertable.html, section 7):
the declaration is replaced in the schema itself, inside the migration's transaction. Triggers, indexes and the foreign
keys of other tables stay as they are. Columns may be added at the end, with a default or nullable.
"""

from typing import Any

from alembic import op
from alembic.operations.schemaobj import SchemaObjects
from sqlalchemy.schema import CreateTable


def redeclare(name: str, *columns_and_constraints: Any) -> None:
    """Said like `op.create_table`; the rows that there are must already obey it.

    Raises:
        ValueError: some row does not.
    """
    connection = op.get_bind()
    table = SchemaObjects(op.get_context()).table(name, *columns_and_constraints, sqlite_strict=True)
    declaration = str(CreateTable(table).compile(dialect=connection.dialect)).lstrip()
    version = connection.exec_driver_sql("PRAGMA schema_version").scalar_one()
    connection.exec_driver_sql("PRAGMA writable_schema = ON")
    connection.exec_driver_sql(
        "UPDATE sqlite_master SET sql = ? WHERE type = 'table' AND name = ?", (declaration, name)
    )
    connection.exec_driver_sql(f"PRAGMA schema_version = {version + 1}")
    connection.exec_driver_sql("PRAGMA writable_schema = RESET")
    problem = connection.exec_driver_sql(f"PRAGMA quick_check({name})").scalar_one()
    if problem != "ok":
        raise ValueError(f"the rows of {name} do not obey their new declaration: {problem}")
