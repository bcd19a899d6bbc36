"""Which payment commands are malformed: every field in every command is held to what any database can store."""

import math
from dataclasses import fields, is_dataclass

from billing.money import MAX_MILS

MAX_TEXT_CHARS = 4 * 2**20
"""A day's report is the longest."""


def wrong_value(name: str, value: object) -> str | None:
    """What is wrong with a field's value, or one inside it."""
    if isinstance(value, str):
        if len(value) <= MAX_TEXT_CHARS and value.isprintable():
            return None
        return f"{name} must be at most {MAX_TEXT_CHARS} printable characters"
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, int):
        return None if abs(value) <= MAX_MILS else f"{name} must be between -{MAX_MILS} and {MAX_MILS}"
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{name} must be finite"
    if isinstance(value, tuple):
        return next(filter(None, (wrong_value(name, each) for each in value)), None)
    if is_dataclass(value):
        return next(filter(None, (wrong_value(each.name, getattr(value, each.name)) for each in fields(value))), None)
    return f"{name} is a {type(value).__name__}"
