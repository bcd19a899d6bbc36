"""Between the book and the database: loads what a batch can see, and writes what it decided, in few statements.

Decides nothing. Everything happens on the caller's connection, inside the caller's transaction.
"""

from billing.store.fence import extend_open_leases, newest_ts, read_fence, take_fence
from billing.store.load import load
from billing.store.rows import terms_of
from billing.store.write import write

__all__ = ["extend_open_leases", "load", "newest_ts", "read_fence", "take_fence", "terms_of", "write"]
