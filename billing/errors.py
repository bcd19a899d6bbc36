"""What can break in billing. Expected refusals (no credits, a revoked key) are answers, see `billing.commands`.

    BillingError
    ├── DatabaseUnusable    the database cannot be opened; an operator has to act
    ├── LedgerUnavailable   the database failed in the middle of a write; whether it took effect is not known
    ├── Fenced              another writer has taken over; this one must stop
    ├── UnknownWallet       a reader was asked about a customer that does not exist
    ├── UnknownCursor       a reader was asked to go on from what this customer does not have
    └── TooManyRows         a reader was asked for more than one answer holds

Fields are positional and reach `super().__init__`, so that every error survives pickling.
"""


class BillingError(Exception):
    """Base of every error that this package raises on purpose."""


class DatabaseUnusable(BillingError):
    """One line for the operator: which database, what is wrong, what to do. Never holds a password."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class LedgerUnavailable(BillingError):
    """The commands may or may not have taken effect. Send the same ones again: their ids make that safe."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class Fenced(BillingError):
    """The database knows a newer writer than this one, or this one never took over. Nothing was written."""

    def __init__(self, held_epoch: int, current_epoch: int) -> None:
        super().__init__(held_epoch, current_epoch)
        self.held_epoch = held_epoch
        self.current_epoch = current_epoch

    def __str__(self) -> str:
        if self.held_epoch == 0:
            return "this ledger has not taken over the database; call take_over() first"
        return f"this ledger holds epoch {self.held_epoch}, but epoch {self.current_epoch} has taken over; stop writing"


class UnknownWallet(BillingError):
    """There is no such customer in this database."""

    def __init__(self, customer_id: str) -> None:
        super().__init__(customer_id)
        self.customer_id = customer_id

    def __str__(self) -> str:
        return f"no customer {self.customer_id!r}"


class UnknownCursor(BillingError):
    """A list was to go on from a row that this customer does not have."""

    def __init__(self, cursor: str) -> None:
        super().__init__(cursor)
        self.cursor = cursor

    def __str__(self) -> str:
        return f"there is no {self.cursor!r} to go on from"


class TooManyRows(BillingError):
    """Ask for less: a shorter time, or rows that are counted together."""

    def __init__(self, at_most: int) -> None:
        super().__init__(at_most)
        self.at_most = at_most

    def __str__(self) -> str:
        return f"the answer would have more than {self.at_most} rows"
