import inspect
import pickle
import re

import pytest

from billing import errors
from billing.errors import (
    BillingError,
    DatabaseUnusable,
    Fenced,
    LedgerUnavailable,
    TooManyRows,
    UnknownCursor,
    UnknownWallet,
)

EXAMPLES = [
    DatabaseUnusable("cannot use it"),
    LedgerUnavailable("the disk is full"),
    Fenced(1, 2),
    Fenced(0, 2),
    UnknownWallet("cus_1"),
    UnknownCursor("req_1"),
    TooManyRows(10),
]


def test_the_tree_in_the_docstring_is_complete():
    drawn = set(re.findall(r"[├└]── (\w+)", errors.__doc__ or ""))
    raised = {
        name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, BillingError)
    }
    assert drawn == raised - {"BillingError"}
    assert {type(example).__name__ for example in EXAMPLES} == drawn


@pytest.mark.parametrize("error", EXAMPLES, ids=repr)
def test_an_error_crosses_processes_unchanged(error: BillingError):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), vars(copy)) == (str(error), vars(error))


@pytest.mark.parametrize("error", EXAMPLES, ids=repr)
def test_an_error_is_one_line(error: BillingError):
    assert str(error)
    assert "\n" not in str(error)
