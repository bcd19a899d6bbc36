"""Between the book and the database: loads what a batch can see, and writes what it decided, in few statements.

Decides nothing. Everything happens on the caller's connection, inside the caller's transaction.
"""

from billing.store.connection import WriterConnection
from billing.store.fence import ask_fence, extend_open_leases, newest_ts, take_fence
from billing.store.load import load
from billing.store.rows import terms_of
from billing.store.write import write

__all__ = [
    "WriterConnection",
    "ask_fence",
    "extend_open_leases",
    "load",
    "newest_ts",
    "take_fence",
    "terms_of",
    "write",
]
