"""A form is read whole, or refused with the part named."""

import asyncio
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

import pytest
from fastapi import Request
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from serve_app.errors import ApiError, BodyTooSlow, InvalidRequest, UnsupportedBody
from serve_app.forms import MAX_FIELDS, Form, read_form, validate
from tests.support.hostile import BOUNDARY, MULTIPART, disposition, multipart

FRAME = (disposition("frame", "frame.png"), bytes(range(256)) * 20)
SEED = (disposition("seed"), b"7")
CONTENT_TYPE = MULTIPART["Content-Type"]
TIMEOUT_S = 60.0


class Knobs(BaseModel):
    model_config = ConfigDict(extra="forbid")

    seed: int = Field(0, ge=0)
    guidance: float | None = None


def request_of(chunks: Iterable[bytes], content_type: str | None = CONTENT_TYPE, disconnects: bool = False) -> Request:
    """A request whose body arrives in these chunks."""

    def messages() -> Iterator[MutableMapping[str, Any]]:
        for chunk in chunks:
            yield {"type": "http.request", "body": chunk, "more_body": True}
        yield {"type": "http.disconnect"} if disconnects else {"type": "http.request", "body": b"", "more_body": False}

    arriving = messages()

    async def receive() -> MutableMapping[str, Any]:
        return next(arriving)

    headers = [] if content_type is None else [(b"content-type", content_type.encode("latin-1"))]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive)


async def refusal_of(request: Request, max_files: int = 8) -> ApiError:
    with pytest.raises(ApiError) as refusal:
        await read_form(request, max_files, TIMEOUT_S)
    return refusal.value


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 37, 1000, 10_000])
async def test_a_form_is_the_same_however_it_arrives(chunk_bytes: int) -> None:
    body = multipart(FRAME, SEED, (disposition("note"), "größer\r\n--x".encode()))
    form = await read_form(
        request_of(body[i : i + chunk_bytes] for i in range(0, len(body), chunk_bytes)), 8, TIMEOUT_S
    )
    assert form.file("frame") == FRAME[1]
    assert form.field("seed") == "7"
    assert form.field("note") == "größer\r\n--x"


async def test_parts_of_one_name_keep_their_order() -> None:
    parts = [(disposition("actions", "a.npy"), bytes([index])) for index in range(8)]
    form = await read_form(request_of([multipart(*parts)]), 8, TIMEOUT_S)
    assert form.files("actions", at_most=8) == [bytes([index]) for index in range(8)]


async def test_a_part_above_a_mebibyte_is_read_whole() -> None:
    large = bytes(2**20 + 1)
    form = await read_form(request_of([multipart((disposition("frame", "f"), large))]), 8, TIMEOUT_S)
    assert form.file("frame") == large


@pytest.mark.parametrize(
    "content_type",
    [
        f"Multipart/Form-Data; Boundary={BOUNDARY}",
        f'multipart/form-data; boundary="{BOUNDARY}"',
        f"multipart/form-data;boundary={BOUNDARY};charset=UTF-8",
    ],
)
async def test_content_types_that_mean_the_same_are_the_same(content_type: str) -> None:
    form = await read_form(request_of([multipart(SEED)], content_type), 8, TIMEOUT_S)
    assert form.field("seed") == "7"


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        ";",
        "application/json",
        "application/x-www-form-urlencoded",
        "multipart/mixed; boundary=x",
        "multipart/form-databogus; boundary=x",
        "multipart",
        "\xff\xb2",
    ],
)
async def test_another_content_type_is_refused_unread(content_type: str | None) -> None:
    def unread() -> Iterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    refusal = await refusal_of(request_of(unread(), content_type))
    assert isinstance(refusal, UnsupportedBody)
    assert "multipart/form-data" in refusal.message


@pytest.mark.parametrize("charset", ["undefined", "idna", "punycode", "unicode_escape", "utf-16", "hex", "no-such"])
async def test_no_other_charset_is_taken_from_the_client(charset: str) -> None:
    body = multipart((disposition("seed"), rb"\ud800"))
    refusal = await refusal_of(request_of([body], f"{CONTENT_TYPE}; charset={charset}"))
    assert isinstance(refusal, UnsupportedBody)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "ends before its closing boundary"),
        (b"\r\n\r\n", "ends before its closing boundary"),
        (multipart(FRAME, SEED, closed=False), "ends before its closing boundary"),
        (multipart(FRAME, SEED)[:-4], "ends before its closing boundary"),
        (multipart(FRAME)[:100], "ends before its closing boundary"),
        (b"garbage" * 100, "Invalid multipart data"),
        (multipart(FRAME).replace(BOUNDARY.encode(), b"another"), "Invalid multipart data"),
        (multipart(("Content-Disposition: form-data", b"1")), 'no "name" in its Content-Disposition'),
        (multipart(("X-Unrelated: 1", b"1")), 'no "name" in its Content-Disposition'),
        (multipart(("no colon here", b"1")), "Invalid multipart data"),
        (multipart((disposition("seed") + "\r\nX: 1" * 50, b"1")), "Invalid multipart data"),
        (multipart((disposition("s" * 10_000), b"1")), "Invalid multipart data"),
        (multipart((disposition("seed"), bytes(2**20 + 1))), "more than the 1048576 bytes"),
        (multipart(*[SEED] * (MAX_FIELDS + 1)), "Too many fields; 32 are"),
        (multipart(*[FRAME] * 9), "Too many files; 8 are"),
    ],
    ids=lambda case: str(case)[:30] if isinstance(case, str) else "",
)
async def test_a_body_that_is_no_whole_form_is_refused(body: bytes, why: str) -> None:
    refusal = await refusal_of(request_of([body]))
    assert isinstance(refusal, InvalidRequest)
    assert refusal.field == "body"
    assert why in refusal.message


@pytest.mark.parametrize(
    "content_type",
    ["multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=" + "b" * 1000],
)
async def test_a_boundary_that_is_missing_or_wrong_is_refused(content_type: str) -> None:
    refusal = await refusal_of(request_of([multipart(FRAME)], content_type))
    assert isinstance(refusal, InvalidRequest)
    assert refusal.field == "body"


async def test_a_client_that_leaves_while_sending_is_refused_quietly() -> None:
    refusal = await refusal_of(request_of([multipart(FRAME, SEED)[:50]], disconnects=True))
    assert isinstance(refusal, InvalidRequest)
    assert "the connection was closed" in refusal.message


async def test_a_body_that_never_arrives_is_given_up() -> None:
    async def receive() -> MutableMapping[str, Any]:
        return await asyncio.Future()

    waiting = request_of([])
    waiting._receive = receive
    with pytest.raises(BodyTooSlow, match="had not arrived within the 0 s"):
        await read_form(waiting, 8, timeout_s=0)


@settings(max_examples=80, deadline=None)
@given(
    pieces=st.lists(
        st.one_of(
            st.binary(max_size=20),
            st.sampled_from(
                [
                    f"--{BOUNDARY}".encode(),
                    f"--{BOUNDARY}--".encode(),
                    b"\r\n",
                    disposition("seed").encode(),
                    b"Content-Disposition: form-data; name*=undefined''x; filename*0=y",
                ]
            ),
        )
    )
)
async def test_any_body_is_read_or_refused_and_nothing_else(pieces: list[bytes]) -> None:
    try:
        await read_form(request_of(pieces), 8, TIMEOUT_S)
    except InvalidRequest as refusal:
        assert refusal.field == "body"  # noqa: PT017 - either outcome is right


def form(files: dict[str, list[bytes]] | None = None, fields: dict[str, list[str]] | None = None) -> Form:
    return Form(files or {}, fields or {})


@pytest.mark.parametrize(
    ("sent", "field", "why"),
    [
        (form(files={"seed": [b"7"]}), "seed", "is a file part; a text field"),
        (form(fields={"frame": ["x"]}), "frame", "is a text field; a file part"),
        (form(files={"more": [b""]}), "more", "frame, actions, seed are accepted"),
        (form(fields={"more": [""]}), "more", "frame, actions, seed are accepted"),
        (form(files={"frame": [b""], "": [b""]}), "", "is not a part of this request"),
        (form(files={"frame": [b""], "seed": [b"1"]}, fields={"seed": ["1"]}), "seed", "is a file part"),
    ],
)
def test_a_part_that_nobody_asked_for_or_of_the_wrong_kind_is_refused(sent: Form, field: str, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why) as refusal:
        sent.only(files=("frame", "actions"), fields=("seed",))
    assert refusal.value.field == field


def test_parts_may_be_absent_until_they_are_asked_for() -> None:
    form(files={"frame": [b"1"]}).only(files=("frame", "actions"), fields=("seed",))
    for ask in (form().file, form().field):
        with pytest.raises(InvalidRequest, match="frame: is missing; send it as one"):
            ask("frame")


def test_one_part_means_one() -> None:
    twice = form(files={"frame": [b"1", b"2"]}, fields={"seed": ["1", "1"]})
    with pytest.raises(InvalidRequest, match="frame: is there 2 times; one file part is accepted"):
        twice.file("frame")
    with pytest.raises(InvalidRequest, match="seed: is there 2 times; one text field is accepted"):
        twice.field("seed")
    with pytest.raises(InvalidRequest, match="seed: is there 2 times; one text field is accepted"):
        twice.fields(Knobs)


@pytest.mark.parametrize("count", [0, 4])
def test_parts_outside_their_number_are_refused(count: int) -> None:
    sent = form(files={"actions": [b""] * count})
    with pytest.raises(InvalidRequest, match=f"actions: is there {count} times; 1 to 3 file parts are accepted"):
        sent.files("actions", at_most=3)


@pytest.mark.parametrize("count", [1, 3])
def test_parts_at_the_ends_of_their_number_are_accepted(count: int) -> None:
    assert len(form(files={"actions": [b""] * count}).files("actions", at_most=3)) == count


def test_fields_become_the_schema_and_its_defaults() -> None:
    assert form(fields={"seed": ["12"]}).fields(Knobs) == Knobs(seed=12)
    assert form().fields(Knobs) == Knobs()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("", "params: Invalid JSON"),
        ("[]", "params: Input should be an object"),
        ('{"seed": -1}', "params.seed: Input should be greater than or equal to 0"),
        ('{"seeds": 1}', "params.seeds: is not known; seed, guidance are accepted"),
        ('{"guidance": {}}', "params.guidance: Input should be a valid number"),
    ],
)
def test_json_that_does_not_fit_names_the_path(values: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        validate(Knobs, values, "params")
