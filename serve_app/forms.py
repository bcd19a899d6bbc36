"""Multipart forms with exact rules: which parts there must be, how often, and which fields may stand beside them."""

import asyncio
import io
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from serve_app.errors import BodyTooSlow, InvalidRequest, UnsupportedBody

Schema = TypeVar("Schema", bound=BaseModel)
Part = TypeVar("Part", str, bytes)

MAX_FIELDS = 32


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
    try:
        async with asyncio.timeout(timeout_s), aclosing(request.stream()) as body:
            parser = _WholeForm(request.headers, body, max_files)
            async with aclosing(parser.stream):
                parts = await parser.parse()
    except MultiPartException as error:
        raise InvalidRequest("body", f"is not accepted as a multipart form: {error.message}") from error
    except TimeoutError:
        raise BodyTooSlow(timeout_s) from None
    except ClientDisconnect as error:
        raise InvalidRequest("body", "was not sent to its end; the connection was closed") from error
    try:
        return await _form(parts)
    finally:
        await parts.close()


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


class _Slices(io.IOBase):
    """A file part as it arrives: its slices, joined when it is read, so that nothing grows by being copied."""

    _rolled = False  # in the words of `UploadFile`: it is in memory, and no thread is needed to write to it

    def __init__(self) -> None:
        self._slices: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._slices.append(data)
        return len(data)

    def seek(self, *_: int) -> int:
        return 0

    def read(self, _: int = -1) -> bytes:
        whole = b"".join(self._slices)
        self._slices.clear()
        return whole


class _WholeForm(MultiPartParser):
    """Refuses a body without its closing boundary. Its last part would be dropped, which may be a seed."""

    def __init__(self, headers: Headers, body: AsyncGenerator[bytes, None], max_files: int) -> None:
        super().__init__(headers, self._whole(body), max_files=max_files, max_fields=MAX_FIELDS)
        self._has_ended = False

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        if self._current_part.file is not None:
            self._current_part.file.file.close()
            self._current_part.file.file = _Slices()  # type: ignore[assignment]

    def on_end(self) -> None:
        self._has_ended = True

    async def _whole(self, body: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        async for chunk in body:
            yield chunk
        if not self._has_ended:
            raise MultiPartException("It ends before its closing boundary.")


async def _form(parts: FormData) -> Form:
    files: dict[str, list[bytes]] = {}
    fields: dict[str, list[str]] = {}
    for name, value in parts.multi_items():
        if isinstance(value, UploadFile):
            files.setdefault(name, []).append(await value.read())
        else:
            fields.setdefault(name, []).append(value)
    return Form(files, fields)
