"""Multipart forms with exact rules: which parts there must be, how often, and which fields may stand beside them."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from serve_app.errors import InvalidRequest, UnsupportedBody

Schema = TypeVar("Schema", bound=BaseModel)
Part = TypeVar("Part", str, bytes)

MAX_FIELDS = 32


class Form:
    """A parsed form whose parts are asked for by name; a part that nobody asked for is refused at the end."""

    def __init__(self, files: Mapping[str, Sequence[bytes]], fields: Mapping[str, Sequence[str]]) -> None:
        self._files = files
        self._fields = fields

    def file(self, name: str) -> bytes:
        """The one file part of that name."""
        return self._one("file part", name, self._files)

    def files(self, name: str, at_most: int) -> Sequence[bytes]:
        """One or more file parts of that name, in the order sent."""
        parts = self._files.get(name, ())
        if not 1 <= len(parts) <= at_most:
            raise InvalidRequest(name, f"is there {len(parts)} times; 1 to {at_most} file parts are accepted")
        return parts

    def field(self, name: str) -> str:
        """The one text field of that name."""
        return self._one("text field", name, self._fields)

    def fields(self, schema: type[Schema]) -> Schema:
        """All text fields, as `schema`."""
        return validate(schema, {name: self._one("text field", name, self._fields) for name in self._fields})

    def only(self, *names: str) -> None:
        """Refuse any part beside these."""
        for name in (*self._files, *self._fields):
            if name not in names:
                raise InvalidRequest(name, f"is not a part of this request; {', '.join(names)} are accepted")

    def _one(self, kind: str, name: str, parts: Mapping[str, Sequence[Part]]) -> Part:
        found = parts.get(name, ())
        if not found:
            raise InvalidRequest(name, f"is missing; send it as one {kind} of the multipart form")
        if len(found) > 1:
            raise InvalidRequest(name, f"is there {len(found)} times; one {kind} is accepted")
        return found[0]


async def read_form(request: Request, max_files: int) -> Form:
    """The request's multipart body. Parts above 1 MiB are spooled to disk while it is parsed."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise UnsupportedBody("Content-Type: multipart/form-data is accepted")
    files: dict[str, list[bytes]] = {}
    fields: dict[str, list[str]] = {}
    try:
        async with request.form(max_files=max_files, max_fields=MAX_FIELDS) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    files.setdefault(name, []).append(await value.read())
                else:
                    fields.setdefault(name, []).append(value)
    except (HTTPException, MultiPartException) as error:
        problem = error.detail if isinstance(error, HTTPException) else error.message
        raise InvalidRequest("body", f"is not a multipart form that can be read: {problem}") from error
    return Form(files, fields)


def validate(schema: type[Schema], values: Any, field: str = "") -> Schema:
    """`values` (a dict, or JSON text) as `schema`; the first problem becomes the refusal."""
    try:
        return schema.model_validate_json(values) if isinstance(values, str) else schema.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        path = ".".join(str(part) for part in (field, *problem["loc"]) if part != "")
        raise InvalidRequest(path, problem["msg"]) from None
