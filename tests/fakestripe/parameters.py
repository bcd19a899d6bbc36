"""Form bodies as Stripe reads them, held to the parameter types of the pinned library.

A name that `stripe.params` does not know is refused, as Stripe refuses it; so a test that sends one fails.
"""

import builtins
import sys
import typing
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints
from urllib.parse import parse_qsl

import stripe
import typing_extensions

from tests.fakestripe.state import invalid

Parameters = dict[str, Any]


def read_form(body: str) -> Parameters:
    """`a[b][0]=c` as nested dictionaries; those whose keys count from 0 become lists."""
    root: Parameters = {}
    for name, value in parse_qsl(body, keep_blank_values=True):
        keys = name.replace("]", "").split("[")
        node = root
        for key in keys[:-1]:
            node = node.setdefault(key or str(len(node)), {})
        node[keys[-1] or str(len(node))] = value
    return typing.cast(Parameters, _lists(root))


def _lists(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    values = {key: _lists(value) for key, value in node.items()}
    if values and list(values) == [str(index) for index in range(len(values))]:
        return list(values.values())
    return values


class _Names(dict[str, Any]):
    """A module's names, and what it imports for type checkers only."""

    def __missing__(self, name: str) -> Any:
        for place in (builtins, typing, stripe):
            if hasattr(place, name):
                return getattr(place, name)
        return Any


_hints: dict[type, dict[str, Any]] = {}


def hints_of(cls: type) -> dict[str, Any]:
    if cls not in _hints:
        _hints[cls] = get_type_hints(cls, {}, _Names(vars(sys.modules[cls.__module__])))
    return _hints[cls]


def checked(value: Any, hint: Any, path: str = "") -> Any:
    """`value` with its text turned into what `hint` says, or `Refused`."""
    origin = get_origin(hint)
    if origin in (typing_extensions.NotRequired, typing_extensions.Required, typing.NotRequired, typing.Required):
        return checked(value, get_args(hint)[0], path)
    if origin is Union:
        return _checked_union(value, [each for each in get_args(hint) if each is not type(None)], path)
    if typing_extensions.is_typeddict(hint) or typing.is_typeddict(hint):
        if not isinstance(value, dict):
            raise invalid(f"Invalid object: {path}")
        hints = hints_of(hint)
        for name in value:
            if name not in hints:
                raise invalid(f"Received unknown parameter: {path}{name}", "parameter_unknown")
        return {name: checked(each, hints[name], f"{path}{name}.") for name, each in value.items()}
    if origin is list:
        if not isinstance(value, list):
            raise invalid(f"Invalid array: {path}")
        return [checked(each, get_args(hint)[0], path) for each in value]
    if origin is Literal:
        if value not in get_args(hint):
            raise invalid(f"Invalid {path}: must be one of {get_args(hint)}")
        return value
    if hint is bool:
        if str(value).lower() not in ("true", "false"):
            raise invalid(f"Invalid boolean: {path}")
        return str(value).lower() == "true"
    if hint is int:
        try:
            return int(value)
        except (TypeError, ValueError):
            raise invalid(f"Invalid integer: {path}") from None
    if hint is str and not isinstance(value, str):
        raise invalid(f"Invalid string: {path}")
    return value


def _checked_union(value: Any, choices: list[Any], path: str) -> Any:
    refusals = []
    # An empty string clears a field; it is the last thing that a value is taken for.
    for choice in sorted(choices, key=lambda each: each is str or get_origin(each) is Literal):
        try:
            return checked(value, choice, path)
        except Exception as refused:
            refusals.append(refused)
    raise refusals[0]
