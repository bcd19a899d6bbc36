"""`python -m benchmarks.ledger_mutations` takes minutes; here only that it still finds what it would switch off."""

import importlib

import pytest

from benchmarks.ledger_mutations import EDITS, REFUSALS, Edit, schema_rules


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_the_code_still_says_what_is_switched_off(edit: Edit):
    module = importlib.import_module(edit.module)
    assert module.__file__ is not None
    with open(module.__file__) as source:
        assert edit.old in source.read()


def test_the_schema_has_rules():
    assert len(schema_rules()) > 50
    assert REFUSALS
