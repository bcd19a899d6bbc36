"""Multipart forms with exact rules: which parts there must be, how often, and which fields may stand beside them."""

import asyncio
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import aclosing
from functools import lru_cache
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from serve_app.errors import BodyTooSlow, InvalidRequest, UnsupportedBody

Schema = TypeVar("Schema", bound=BaseModel)
Part = TypeVar("Part", str, bytes)

MAX_FIELDS = 32
MAX_FIELD_BYTES = 2**20


class Form:
    """A parsed form whose parts are asked for by name, after those that nobody will ask for have been refused."""

    def __init__(self, files: Mapping[str, Sequence[bytes]], fields: Mapping[str, Sequence[str]]) -> None:
        self._files = files
        self._fields = fields

    def only(self, files: Collection[str], fields: Collection[str]) -> None:
        """Refuse any part beside these; a name is a file or a text field, never either."""
        accepted = ", ".join((*files, *fields))
        for name in self._files:
            if name in fields:
                raise InvalidRequest(name, "is a file part; a text field, which has no filename, is accepted")
            if name not in files:
                raise InvalidRequest(name, f"is not a part of this request; {accepted} are accepted")
        for name in self._fields:
            if name in files:
                raise InvalidRequest(name, "is a text field; a file part, which has a filename, is accepted")
            if name not in fields:
                raise InvalidRequest(name, f"is not a part of this request; {accepted} are accepted")

    def file(self, name: str) -> bytes:
        """The one file part of that name."""
        return self._one("file part", name, self._files)

    def optional_file(self, name: str) -> bytes | None:
        """The one file part of that name, or None if there is none."""
        return self.file(name) if name in self._files else None

    def files(self, name: str, at_most: int) -> Sequence[bytes]:
        """One or more file parts of that name, in the order sent."""
        parts = self._files.get(name, ())
        if not 1 <= len(parts) <= at_most:
            raise InvalidRequest(name, f"is there {len(parts)} times; 1 to {at_most} file parts are accepted")
        return parts

    def count(self, name: str) -> int:
        """File parts of that name."""
        return len(self._files.get(name, ()))

    def field(self, name: str) -> str:
        """The one text field of that name."""
        return self._one("text field", name, self._fields)

    def fields(self, schema: type[Schema]) -> Schema:
        """All text fields, as `schema`."""
        return validate(schema, {name: self._one("text field", name, self._fields) for name in self._fields})

    def _one(self, kind: str, name: str, parts: Mapping[str, Sequence[Part]]) -> Part:
        found = parts.get(name, ())
        if not found:
            raise InvalidRequest(name, f"is missing; send it as one {kind} of the multipart form")
        if len(found) > 1:
            raise InvalidRequest(name, f"is there {len(found)} times; one {kind} is accepted")
        return found[0]


async def read_form(request: Request, max_files: int, timeout_s: float) -> Form:
    """The request's multipart body, given `timeout_s` to arrive; each byte of a file is copied twice on its way."""
    content_type, options = parse_options_header(request.headers.get("content-type"))
    # Any other charset would let the client choose among Python's codecs, of which some raise and some take minutes.
    if content_type != b"multipart/form-data" or options.get(b"charset", b"utf-8").lower() != b"utf-8":
        raise UnsupportedBody("Content-Type: multipart/form-data in UTF-8 is accepted")
    if b"boundary" not in options:
        raise _not_a_form("Its boundary is missing.")
    parts = _Parts(max_files)
    try:
        parser = parts.parser(options[b"boundary"])
        async with asyncio.timeout(timeout_s), aclosing(request.stream()) as body:
            async for chunk in body:
                parser.write(chunk)
        parser.finalize()
    except FormParserError as error:
        raise _not_a_form(f"Invalid multipart data: {error}.") from error
    except TimeoutError:
        raise BodyTooSlow(timeout_s) from None
    except ClientDisconnect as error:
        raise InvalidRequest("body", "was not sent to its end; the connection was closed") from error
    return parts.form()


def validate(schema: type[Schema], values: Any, field: str = "") -> Schema:
    """`values` (a dict, or JSON text) as `schema`; the first problem becomes the refusal."""
    try:
        return schema.model_validate_json(values) if isinstance(values, str) else schema.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        path = ".".join(str(part) for part in (field, *problem["loc"]) if part != "")
        if problem["type"] == "extra_forbidden":
            raise InvalidRequest(path, f"is not known; {', '.join(schema.model_fields)} are accepted") from None
        raise InvalidRequest(path, problem["msg"]) from None


class _Parts:
    """A form's parts as they arrive. What comes in slices is joined at the end, as nothing may grow by being copied."""

    def __init__(self, max_files: int) -> None:
        self._max_files = max_files
        self._files: list[tuple[str, list[bytes]]] = []
        self._fields: list[tuple[str, list[bytes]]] = []
        self._header = self._value = self._disposition = b""
        self._slices: list[bytes] = []
        self._most_bytes: float = 0
        self._has_ended = False

    def parser(self, boundary: bytes) -> MultipartParser:
        return MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._add_to_header,
                "on_header_value": self._add_to_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._begin_content,
                "on_part_data": self._add_content,
                "on_end": self._end,
            },
        )

    def form(self) -> Form:
        """Refuses a body without its closing boundary. Its last part would be dropped, which may be a seed."""
        if not self._has_ended:
            raise _not_a_form("It ends before its closing boundary.")
        files: dict[str, list[bytes]] = {}
        for name, slices in self._files:
            files.setdefault(name, []).append(b"".join(slices))
            slices.clear()
        fields: dict[str, list[str]] = {}
        for name, slices in self._fields:
            fields.setdefault(name, []).append(_text(b"".join(slices)))
        return Form(files, fields)

    def _begin(self) -> None:
        self._disposition = b""

    def _add_to_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_to_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _begin_content(self) -> None:
        name, is_file = _named(self._disposition)
        if name is None:
            raise _not_a_form('A part has no "name" in its Content-Disposition.')
        parts, most, kind = (self._files, self._max_files, "files") if is_file else (self._fields, MAX_FIELDS, "fields")
        if len(parts) == most:
            raise _not_a_form(f"Too many {kind}; {most} are accepted.")
        self._slices, self._most_bytes = [], math.inf if is_file else MAX_FIELD_BYTES
        parts.append((name, self._slices))

    def _add_content(self, data: bytes, start: int, end: int) -> None:
        self._most_bytes -= end - start
        if self._most_bytes < 0:
            raise _not_a_form(f"A text field has more than the {MAX_FIELD_BYTES} bytes that are accepted.")
        self._slices.append(data[start:end])

    def _end(self) -> None:
        self._has_ended = True


@lru_cache(maxsize=256)
def _named(disposition: bytes) -> tuple[str | None, bool]:
    """The part's name, if it has one, and whether it is a file."""
    _, options = parse_options_header(disposition)
    name = options.get(b"name")
    return None if name is None else _text(name), b"filename" in options


def _text(encoded: bytes) -> str:
    try:
        return encoded.decode()
    except UnicodeDecodeError:
        return encoded.decode("latin-1")


def _not_a_form(why: str) -> InvalidRequest:
    return InvalidRequest("body", f"is not accepted as a multipart form: {why}")
