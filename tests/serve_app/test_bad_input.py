"""Bad input on every paid route: refused with the field named, nothing run, nothing in the ledger."""

import gzip
import json
import math
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio
from PIL import Image

from serve_app.settings import Limits
from tests.support import hostile
from tests.support.app import App, running_app
from tests.support.hostile import BOUNDARY, MULTIPART, disposition, multipart
from tests.support.payloads import actions, image_bytes, npy, png

pytestmark = pytest.mark.asyncio(loop_scope="module")

MAX_BODY_BYTES = 4 * 2**20
MAX_CANDIDATES = 10
ROLLOUTS, PREDICT, BATCH = "/v1/rollouts", "/v1/predict", "/v1/predict/batch"
ROUTES = [ROLLOUTS, PREDICT, BATCH]
FRAME_FIELD = {ROLLOUTS: "start_frame", PREDICT: "frame", BATCH: "frame"}
MODEL = "tiny-pusher"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def app(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[App]:
    limits = Limits(max_body_bytes=MAX_BODY_BYTES, max_candidates=MAX_CANDIDATES)
    async with running_app(tmp_path_factory.mktemp("bad_input"), limits=limits) as running:
        yield running


@dataclass
class Sent:
    """A good request to `route`, to be changed in one place."""

    route: str
    frame: bytes = field(default_factory=png)
    candidates: Sequence[bytes] = field(default_factory=lambda: [npy(actions())])
    knobs: dict[str, Any] = field(default_factory=dict)
    """`params` of a rollout, text fields of a prediction."""
    files: list[tuple[str, Any]] | None = None
    """In place of frame and candidates."""
    fields: dict[str, Any] | None = None
    """In place of the knobs."""
    base: str = ""
    query: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)

    async def __call__(self, app: App, headers: dict[str, str]) -> httpx.Response:
        files, fields = self.files, self.fields
        if files is None:
            files = [(FRAME_FIELD[self.route], self.frame), *[("actions", each) for each in self.candidates]]
        if fields is None:
            fields = self.knobs
            if self.route == ROLLOUTS:
                fields = {"params": json.dumps({"model": MODEL} | self.knobs)}
        return await app.http.post(
            self.base + self.route, headers=headers | self.headers, params=self.query, files=files, data=fields
        )


async def refusal(app: App, sent: Sent | bytes, route: str = "", status: int = 422, **headers: str) -> dict[str, Any]:
    """The error body, after checking all that every refusal must be."""
    key, customer = app.key()
    if isinstance(sent, Sent):
        answer = await sent(app, key)
    else:
        answer = await app.http.post(route, headers=key | MULTIPART | headers, content=sent)
    body: dict[str, Any] = answer.json()
    assert answer.status_code == status, body
    assert set(body) == {"detail", "error"}
    assert body["detail"] == body["error"]["message"]
    assert body["error"]["type"] == "invalid_request_error"
    assert re.fullmatch(r"req_[0-9a-f]{32}", answer.headers["X-DreamEngine-Request-Id"])
    assert app.ledger.rows(customer) == [("credit", 1_000_000)]
    return body


async def refused(app: App, sent: Sent | bytes, message: str, **more: Any) -> None:
    """`message`: how the refusal begins, which is with the field's name."""
    body = await refusal(app, sent, **more)
    assert body["detail"].startswith(message), body["detail"]
    assert body["error"]["code"] == "INVALID_REQUEST"


async def charged(app: App, sent: Sent) -> int:
    """Mils that a request costs, which must be a good one."""
    key, customer = app.key()
    answer = await sent(app, key)
    assert answer.status_code == 200, answer.text
    rows = app.ledger.rows(customer)
    assert [kind for kind, _ in rows] == ["credit", "debit"]
    return -rows[1][1]


@pytest.mark.parametrize("route", ROUTES)
async def test_the_request_that_these_tests_break_is_good(app: App, route: str) -> None:
    assert await charged(app, Sent(route)) == 245


BAD_FRAMES = {
    "empty": (b"", "is empty"),
    "truncated png": (png()[:-100], "cannot be decoded"),
    "truncated jpeg": (hostile.jpeg()[:-100], "cannot be decoded"),
    "100 megapixel png": (hostile.png_that_claims(10_000, 10_000), "has 10000x10000 pixels; at most 16777216"),
    "100 megapixel jpeg": (hostile.jpeg_that_claims(10_000, 10_000), "has 10000x10000 pixels; at most 16777216"),
    "4 gigapixel png": (hostile.png_that_claims(2**16, 2**16), "has 65536x65536 pixels; at most 16777216"),
    "text": (b"a robot arm", "is neither PNG nor JPEG"),
    "gif": (image_bytes(Image.new("RGB", (64, 64)), "GIF"), "is neither PNG nor JPEG"),
    "svg": (b"<svg/>", "is neither PNG nor JPEG"),
    "an actions file": (npy(actions()), "is neither PNG nor JPEG"),
    "16-bit grey": (image_bytes(Image.new("I;16", (64, 64)), "PNG"), "has pixels of kind I;16; 8 bits per channel"),
    "many scans": (hostile.jpeg_of_scans(100), "is a JPEG of more scans than the 64"),
}
TRAPPED = np.empty((48, 8), object)
BAD_ACTIONS = {
    "empty": (b"", "is empty"),
    "a frame": (png(), "is not a .npy file"),
    "pickles": (npy(TRAPPED), "has dtype |O"),
    "float64": (npy(actions().astype(np.float64)), "has dtype <f8"),
    "big-endian": (npy(actions().astype(">f4")), "has dtype >f4"),
    "structured": (npy(np.zeros(48, [("x", "<f4")])), "has a .npy header that is not plain numbers"),
    "scalar": (npy(np.float32(1)), "has shape (); (T, 8) is accepted"),
    "flat": (npy(np.zeros(384, np.float32)), "has shape (384,); (T, 8) is accepted"),
    "deep": (npy(np.zeros((1, 48, 8), np.float32)), "has shape (1, 48, 8); (T, 8) is accepted"),
    "another robot's": (npy(actions(action_dim=7)), "has shape (48, 7); (T, 8) is accepted"),
    "none": (npy(actions(0)), "has 0 actions; 1 to 1200 are accepted"),
    "too long": (npy(actions(1201)), "has 1201 actions; 1 to 1200 are accepted"),
    "nan": (npy(np.full((48, 8), np.nan, np.float32)), "has values that are not finite"),
    "infinite": (npy(np.full((48, 8), np.inf, np.float16)), "has values that are not finite"),
    "10^9 rows": (hostile.npy_file(hostile.npy_header("(1000000000, 8)"), bytes(99)), "has 1000000000 actions; 1 to"),
    "negative": (hostile.npy_file(hostile.npy_header("(-1, 8)"), bytes(99)), "has a .npy header that is not plain"),
    "truncated": (npy(actions())[:-1], "has 1535 bytes of values where its header promises 1536"),
    "too many values": (npy(actions()) + b"\0", "has 1537 bytes of values where its header promises 1536"),
    "gzip bomb": (gzip.compress(bytes(16 * 2**20)), "inflates to more than the 39424 bytes"),
    "truncated gzip": (gzip.compress(npy(actions()))[:-9], "is a gzip file that ends early"),
}


@pytest.mark.parametrize("route", ROUTES)
class TestFiles:
    @pytest.mark.parametrize("bad", BAD_FRAMES)
    async def test_a_bad_frame_is_refused_by_its_name(self, app: App, route: str, bad: str) -> None:
        data, why = BAD_FRAMES[bad]
        await refused(app, Sent(route, frame=data), f"{FRAME_FIELD[route]}: {why}")

    @pytest.mark.parametrize("bad", BAD_ACTIONS)
    async def test_bad_actions_are_refused_by_their_name(self, app: App, route: str, bad: str) -> None:
        data, why = BAD_ACTIONS[bad]
        await refused(app, Sent(route, candidates=[data]), f"actions: {why}")

    @pytest.mark.parametrize("missing", ["frame", "actions", "both"])
    async def test_a_missing_file_is_refused_by_its_name(self, app: App, route: str, missing: str) -> None:
        files = {"frame": (FRAME_FIELD[route], png()), "actions": ("actions", npy(actions()))}
        sent = [part for name, part in files.items() if missing not in (name, "both")] or [("x", b"")]
        name = "x" if missing == "both" else files[missing][0]
        await refused(app, Sent(route, files=sent), f"{name}: is ")

    async def test_two_frames_are_refused(self, app: App, route: str) -> None:
        name = FRAME_FIELD[route]
        files = [(name, png()), (name, png()), ("actions", npy(actions()))]
        await refused(app, Sent(route, files=files), f"{name}: is there 2 times; one file part is accepted")

    @pytest.mark.parametrize("name", ["extra", "Frame", "actions[0]", "", "frame\x00", "größe"])
    async def test_an_unknown_file_is_refused(self, app: App, route: str, name: str) -> None:
        body = multipart(
            (disposition(FRAME_FIELD[route], "f"), png()),
            (disposition("actions", "a"), npy(actions())),
            (disposition(name, "x"), b"x"),
        )
        await refused(app, body, f"{name}: is not a part of this request; ", route=route)

    async def test_a_frame_sent_as_text_is_refused(self, app: App, route: str) -> None:
        body = multipart((disposition(FRAME_FIELD[route]), b"text"), (disposition("actions", "a"), npy(actions())))
        await refused(app, body, f"{FRAME_FIELD[route]}: is a text field; a file part", route=route)

    async def test_actions_sent_as_text_are_refused(self, app: App, route: str) -> None:
        body = multipart((disposition(FRAME_FIELD[route], "f"), png()), (disposition("actions"), b"[[0, 0]]"))
        await refused(app, body, "actions: is a text field; a file part", route=route)

    async def test_actions_sent_as_a_file_and_as_text_are_refused(self, app: App, route: str) -> None:
        sent = Sent(route, fields={"actions": "[[0, 0]]"})
        await refused(app, sent, "actions: is a text field; a file part")


@pytest.mark.parametrize("route", ROUTES)
class TestBody:
    @pytest.mark.parametrize(
        "content_type",
        ["", "application/json", "application/x-www-form-urlencoded", "text/plain", "multipart/mixed; boundary=x"],
    )
    async def test_another_content_type_is_415(self, app: App, route: str, content_type: str) -> None:
        body = await refusal(app, b"{}", route=route, status=415, **{"Content-Type": content_type})
        assert "multipart/form-data" in body["detail"]

    @pytest.mark.parametrize("charset", ["undefined", "unicode_escape", "punycode", "utf-7"])
    async def test_another_charset_is_415(self, app: App, route: str, charset: str) -> None:
        content_type = f"{MULTIPART['Content-Type']}; charset={charset}"
        body = multipart((disposition(r"\ud800"), rb"\ud800"))
        await refusal(app, body, route=route, status=415, **{"Content-Type": content_type})

    @pytest.mark.parametrize("content_type", ["multipart/form-data", "multipart/form-data; boundary="])
    async def test_a_missing_boundary_is_refused(self, app: App, route: str, content_type: str) -> None:
        await refused(app, multipart(), "body: ", route=route, **{"Content-Type": content_type})

    @pytest.mark.parametrize(
        "body",
        [b"", b"\0" * 1000, b"--", b"{}", b"\r\n" * 1000, f"--{BOUNDARY}".encode(), f"--{BOUNDARY}\r\n".encode()],
    )
    async def test_garbage_is_refused(self, app: App, route: str, body: bytes) -> None:
        await refused(app, body, "body: is not accepted as a multipart form: ", route=route)

    async def test_an_empty_form_is_refused_by_what_it_lacks(self, app: App, route: str) -> None:
        lacks = {ROLLOUTS: "params: is missing", PREDICT: "frame: is missing", BATCH: "frame: is missing"}
        await refused(app, multipart(), lacks[route], route=route)

    async def test_a_form_cut_off_before_its_closing_boundary_is_refused(self, app: App, route: str) -> None:
        parts = [(disposition(FRAME_FIELD[route], "f"), png()), (disposition("actions", "a"), npy(actions()))]
        last = (
            (disposition("params"), b'{"model": "tiny-pusher"}') if route == ROLLOUTS else (disposition("seed"), b"7")
        )
        body = multipart(*parts, last, closed=False)
        why = "body: is not accepted as a multipart form: It ends before its closing boundary"
        await refused(app, body, why, route=route)

    async def test_a_body_above_the_bound_is_413(self, app: App, route: str) -> None:
        sent = Sent(route, frame=bytes(MAX_BODY_BYTES))
        await refused(app, sent, f"body: larger than the {MAX_BODY_BYTES} bytes", status=413)

    async def test_a_chunked_body_above_the_bound_is_413(self, app: App, route: str) -> None:
        async def chunks() -> AsyncIterator[bytes]:
            yield multipart((disposition("frame", "f"), b""), closed=False)
            for _ in range(MAX_BODY_BYTES // 2**16 + 1):
                yield bytes(2**16)

        key, customer = app.key()
        answer = await app.http.post(route, headers=key | MULTIPART, content=chunks())
        assert answer.status_code == 413
        assert answer.json()["detail"].startswith("body: larger than")
        assert app.ledger.rows(customer) == [("credit", 1_000_000)]

    async def test_a_body_that_claims_to_be_compressed_is_no_form(self, app: App, route: str) -> None:
        body = gzip.compress(multipart((disposition("frame", "f"), png())))
        await refused(app, body, "body: ", route=route, **{"Content-Encoding": "gzip"})

    async def test_too_many_parts_are_refused(self, app: App, route: str) -> None:
        files = [("actions", b"")] * 1000
        await refused(app, Sent(route, files=files), "body: is not accepted as a multipart form: Too many files")
        fields = multipart(*[(disposition(f"field{index}"), b"") for index in range(1000)])
        await refused(app, fields, "body: is not accepted as a multipart form: Too many fields", route=route)

    async def test_a_huge_text_field_is_refused(self, app: App, route: str) -> None:
        body = multipart((disposition("params"), b" " * (2**20 + 1)))
        await refused(app, body, "body: is not accepted as a multipart form: A text field has more", route=route)


@pytest.mark.parametrize("route", ROUTES)
class TestQueryAndHeaders:
    @pytest.mark.parametrize("value", ["quo_1", "1", "quo_" + "g" * 32, "quo_" + "0" * 33])
    async def test_a_quote_that_cannot_be_one_is_refused(self, app: App, route: str, value: str) -> None:
        sent = Sent(route, headers={"X-DreamEngine-Quote-Id": value})
        await refused(app, sent, "X-DreamEngine-Quote-Id: is not a quote's id; send the quote_id of a dry run")

    async def test_a_dry_run_refuses_what_the_real_run_would(self, app: App, route: str) -> None:
        await refused(app, Sent(route, candidates=[npy(actions(0))], query={"dryRun": "true"}), "actions")
        steps = "params.num_steps" if route == ROLLOUTS else "num_steps"
        await refused(app, Sent(route, knobs={"num_steps": 101}, query={"dryRun": "true"}), steps)

    @pytest.mark.parametrize("value", ["maybe", "", "2"])
    async def test_a_dry_run_that_cannot_be_read_is_not_taken_for_a_real_one(
        self, app: App, route: str, value: str
    ) -> None:
        await refused(app, Sent(route, query={"dryRun": value}), "dryRun: Input should be a valid boolean")

    async def test_an_explicit_real_run_is_run(self, app: App, route: str) -> None:
        assert await charged(app, Sent(route, query={"dryRun": "false"})) == 245

    @pytest.mark.parametrize("value", ["", "x" * 257, "caf\u00e9".encode("latin-1").decode("latin-1"), "a\tb"])
    async def test_an_idempotency_key_that_cannot_be_one_is_refused(self, app: App, route: str, value: str) -> None:
        sent = Sent(route, headers={"Idempotency-Key": value.encode("latin-1")})
        await refused(app, sent, "Idempotency-Key: is not 1 to 256 printable ASCII characters")


KNOBS_OUT_OF_RANGE = [
    ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
    ({"seed": 2**63}, "seed: Input should be less than or equal to 9223372036854775807"),
    ({"seed": 10**400}, "seed: "),
    ({"seed": 1.5}, "seed: Input should be a valid integer"),
    ({"seed": ""}, "seed: Input should be a valid integer"),
    ({"seed": "seven"}, "seed: Input should be a valid integer"),
    ({"num_steps": 0}, "num_steps: Input should be greater than or equal to 1"),
    ({"num_steps": 101}, "num_steps: Input should be less than or equal to 100"),
    ({"num_steps": 10**30}, "num_steps: "),
    ({"guidance": -0.1}, "guidance: Input should be greater than or equal to 0"),
    ({"guidance": 20.1}, "guidance: Input should be less than or equal to 20"),
    ({"guidance": math.nan}, "guidance: Input should be a finite number"),
    ({"guidance": math.inf}, "guidance: Input should be a finite number"),
    ({"guidance": "1e400"}, "guidance: "),
    ({"guidance": "strong"}, "guidance: Input should be a valid number"),
    ({"steps": 4}, "steps: is not "),
]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("knobs", "message"), KNOBS_OUT_OF_RANGE, ids=lambda case: str(case)[:30])
async def test_a_knob_out_of_range_is_refused_by_its_name(
    app: App, route: str, knobs: dict[str, Any], message: str
) -> None:
    prefix = "params." if route == ROLLOUTS else ""
    await refused(app, Sent(route, knobs=knobs), prefix + message)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("knobs", [{"seed": 0}, {"seed": 2**63 - 1}, {"num_steps": 1}, {"guidance": 0}])
async def test_a_knob_at_the_end_of_its_range_is_accepted(app: App, route: str, knobs: dict[str, Any]) -> None:
    assert await charged(app, Sent(route, knobs=knobs)) == 245


class TestRolloutParams:
    @pytest.mark.parametrize(
        ("params", "message"),
        [
            ("", "params: Invalid JSON"),
            ("model=tiny-pusher", "params: Invalid JSON"),
            ('{"model": "tiny-pusher"', "params: Invalid JSON"),
            ("{'model': 'tiny-pusher'}", "params: Invalid JSON"),
            ('{"model": "tiny-pusher",}', "params: Invalid JSON"),
            ('{"model": "\\ud800"}', "params: Invalid JSON"),
            ("[" * 100_000, "params: Invalid JSON"),
            ('{"a":' * 10_000, "params: Invalid JSON"),
            ("null", "params: Input should be an object"),
            ("[]", "params: Input should be an object"),
            ('"tiny-pusher"', "params: Input should be an object"),
            ("7", "params: Input should be an object"),
            ("{}", "params.model: Field required"),
            ('{"model": null}', "params.model: Input should be a valid string"),
            ('{"model": 7}', "params.model: Input should be a valid string"),
            ('{"model": ["tiny-pusher"]}', "params.model: Input should be a valid string"),
        ],
        ids=lambda case: str(case)[:30],
    )
    async def test_params_that_are_no_object_of_theirs_are_refused(self, app: App, params: str, message: str) -> None:
        await refused(app, Sent(ROLLOUTS, fields={"params": params}), message)

    @pytest.mark.parametrize(
        ("knobs", "message"),
        [
            ({"seed": True}, "params.seed: Input should be a valid integer"),
            ({"seed": "7"}, "params.seed: Input should be a valid integer"),
            ({"seed": None}, "params.seed: Input should be a valid integer"),
            ({"seed": [7]}, "params.seed: Input should be a valid integer"),
            ({"num_steps": True}, "params.num_steps: Input should be a valid integer"),
            ({"num_steps": 4.0}, "params.num_steps: Input should be a valid integer"),
            ({"guidance": "1.0"}, "params.guidance: Input should be a valid number"),
            ({"guidance": False}, "params.guidance: Input should be a valid number"),
            ({"score": "false"}, "params.score: Input should be a valid boolean"),
            ({"score": 0}, "params.score: Input should be a valid boolean"),
            ({"mode": "later"}, "params.mode: Input should be 'sync' or 'async'"),
            ({"mode": None}, "params.mode: Input should be 'sync' or 'async'"),
            ({"webhook_url": 7}, "params.webhook_url: Input should be a valid string"),
            (
                {"Seed": 7},
                "params.Seed: is not known; model, seed, score, num_steps, guidance, actions_format, mode, webhook_url",
            ),
            ({"": 7}, "params"),
        ],
        ids=lambda case: str(case)[:30],
    )
    async def test_json_has_types_and_they_are_kept(self, app: App, knobs: dict[str, Any], message: str) -> None:
        await refused(app, Sent(ROLLOUTS, knobs=knobs), message)

    async def test_params_sent_as_a_file_are_refused(self, app: App) -> None:
        files = [("start_frame", png()), ("actions", npy(actions())), ("params", b'{"model": "tiny-pusher"}')]
        await refused(app, Sent(ROLLOUTS, files=files, fields={}), "params: is a file part; a text field")

    async def test_missing_params_are_refused(self, app: App) -> None:
        await refused(app, Sent(ROLLOUTS, fields={}), "params: is missing; send it as one text field")

    async def test_two_params_are_refused(self, app: App) -> None:
        params = json.dumps({"model": MODEL})
        sent = Sent(ROLLOUTS, fields={"params": [params, params]})
        await refused(app, sent, "params: is there 2 times; one text field is accepted")

    @pytest.mark.parametrize("name", ["model", "seed", "frame"])
    async def test_knobs_beside_params_are_refused(self, app: App, name: str) -> None:
        sent = Sent(ROLLOUTS, fields={"params": json.dumps({"model": MODEL}), name: "7"})
        await refused(app, sent, f"{name}: is not a part of this request; start_frame, actions, ground_truth, params")

    @pytest.mark.parametrize("base", ["", "/models/tiny-pusher", "/models/unknown", "/models/dreamdojo-2b-gr1"])
    @pytest.mark.parametrize("model", ["unknown", "dreamdojo-2b-gr1", "", "TINY-PUSHER", "../tiny-pusher", "\0"])
    async def test_a_model_that_is_not_run_here_is_422_and_never_404(self, app: App, base: str, model: str) -> None:
        body = await refusal(app, Sent(ROLLOUTS, base=base, knobs={"model": model}))
        assert body["detail"].startswith(f"params.model: {model!r} is not served here; see /v1/models")
        assert body["error"]["code"] == "MODEL_NOT_FOUND"

    @pytest.mark.parametrize("base", ["/models/unknown", "/models/dreamdojo-2b-gr1"])
    async def test_a_model_is_not_run_silently_under_another_ones_url(self, app: App, base: str) -> None:
        body = await refusal(app, Sent(ROLLOUTS, base=base))
        assert body["detail"].startswith("params.model: 'tiny-pusher' is not active under this base URL")
        assert body["error"]["code"] == "MODEL_NOT_FOUND"

    @pytest.mark.parametrize(
        ("knobs", "message"),
        [
            ({"webhook_url": "https://example.com/hook"}, 'params.webhook_url: is for "mode": "async"'),
            ({"webhook_url": ""}, 'params.webhook_url: is for "mode": "async"'),
            ({"mode": "async", "webhook_url": ""}, "params.webhook_url: is not accepted; https://host/path without"),
            ({"mode": "async", "webhook_url": "http://example.com/"}, "params.webhook_url: is not accepted; https://"),
            ({"mode": "async", "webhook_url": "https://10.0.0.1/"}, "params.webhook_url: is not accepted: its address"),
            ({"mode": "async", "webhook_url": "https://example.com:22/"}, "params.webhook_url: names port 22; 443 and"),
        ],
    )
    async def test_what_is_not_offered_is_refused_and_nothing_runs(
        self, app: App, knobs: dict[str, Any], message: str
    ) -> None:
        await refused(app, Sent(ROLLOUTS, knobs=knobs), message)

    async def test_what_is_not_offered_may_be_declined(self, app: App) -> None:
        knobs = {"mode": "sync", "score": False, "webhook_url": None, "num_steps": None, "guidance": None}
        assert await charged(app, Sent(ROLLOUTS, knobs=knobs)) == 245

    async def test_two_candidates_are_refused(self, app: App) -> None:
        sent = Sent(ROLLOUTS, candidates=[npy(actions()), npy(actions())])
        await refused(app, sent, "actions: is there 2 times; one file part is accepted")


class TestPredictFields:
    @pytest.mark.parametrize("route", [PREDICT, BATCH])
    @pytest.mark.parametrize("name", ["seed", "num_steps", "guidance"])
    async def test_a_knob_sent_as_a_file_is_refused_and_not_ignored(self, app: App, route: str, name: str) -> None:
        files = [("frame", png()), ("actions", npy(actions())), (name, b"7")]
        await refused(app, Sent(route, files=files), f"{name}: is a file part; a text field")

    @pytest.mark.parametrize("route", [PREDICT, BATCH])
    @pytest.mark.parametrize("name", ["seed", "num_steps", "guidance"])
    async def test_a_knob_sent_twice_is_refused(self, app: App, route: str, name: str) -> None:
        sent = Sent(route, fields={name: ["7", "7"]})
        await refused(app, sent, f"{name}: is there 2 times; one text field is accepted")

    @pytest.mark.parametrize("route", [PREDICT, BATCH])
    @pytest.mark.parametrize("name", ["model", "params", "start_frame", "returns", "Seed"])
    async def test_a_field_of_another_route_is_refused_and_not_ignored(self, app: App, route: str, name: str) -> None:
        sent = Sent(route, fields={name: "7"})
        files = "frame, actions, ground_truth" if route == PREDICT else "frame, actions, goal_frame, ground_truth"
        fields = "seed, num_steps, guidance, actions_format, frame_id, deadline_ms, score"
        await refused(app, sent, f"{name}: is not a part of this request; {files}, {fields}")

    @pytest.mark.parametrize("name", ["horizon", "max_cost_mils", "return", "goal_frame_id", "prune", "best_clip"])
    async def test_what_only_a_batch_offers_is_refused_on_a_single_prediction(self, app: App, name: str) -> None:
        await refused(app, Sent(PREDICT, fields={name: "1"}), f"{name}: is not a part of this request")

    @pytest.mark.parametrize("base", ["/models/unknown", "/models/dreamdojo-2b-gr1", "/models/%00"])
    @pytest.mark.parametrize("route", [PREDICT, BATCH])
    async def test_a_base_url_without_a_served_model_is_404(self, app: App, base: str, route: str) -> None:
        body = await refusal(app, Sent(route, base=base), status=404)
        assert body["error"]["code"] == "MODEL_NOT_FOUND"

    async def test_two_candidates_of_one_prediction_are_refused(self, app: App) -> None:
        sent = Sent(PREDICT, candidates=[npy(actions()), npy(actions())])
        await refused(app, sent, "actions: is there 2 times; one file part is accepted")


class TestBatch:
    @pytest.mark.parametrize("count", [0, MAX_CANDIDATES + 1])
    async def test_candidates_outside_their_number_are_refused(self, app: App, count: int) -> None:
        sent = Sent(BATCH, candidates=[npy(actions(1))] * count)
        why = f"actions: is there {count} times; 1 to {MAX_CANDIDATES} file parts are accepted"
        await refused(app, sent, why)

    async def test_far_too_many_candidates_are_refused_while_they_are_read(self, app: App) -> None:
        sent = Sent(BATCH, candidates=[npy(actions(1))] * 100)
        await refused(app, sent, "body: is not accepted as a multipart form: Too many files")

    @pytest.mark.parametrize("count", [1, MAX_CANDIDATES])
    async def test_candidates_at_the_ends_of_their_number_are_run(self, app: App, count: int) -> None:
        candidates = [npy(actions(1, seed=index)) for index in range(count)]
        assert await charged(app, Sent(BATCH, candidates=candidates)) == 10 * count

    async def test_a_ragged_batch_is_run_and_each_frame_charged(self, app: App) -> None:
        lengths = [1, 12, 13, 48]
        candidates = [npy(actions(length)) for length in lengths]
        assert await charged(app, Sent(BATCH, candidates=candidates)) == 5 * sum(1 + length for length in lengths)

    @pytest.mark.parametrize("bad", BAD_ACTIONS)
    async def test_one_bad_candidate_of_eight_is_named_by_its_place(self, app: App, bad: str) -> None:
        data, why = BAD_ACTIONS[bad]
        candidates = [npy(actions(1, seed=index)) for index in range(8)]
        candidates[5] = data
        await refused(app, Sent(BATCH, candidates=candidates), f"actions[5]: {why}")


class TestQueries:
    """Parameters of the routes that only read."""

    @pytest.mark.parametrize(
        "limit", ["0", "-1", "abc", "", "1.5", "1e3", "nan", "9" * 5000], ids=lambda case: case[:8]
    )
    async def test_a_limit_that_is_no_count_is_422_naming_it(self, app: App, limit: str) -> None:
        key, _ = app.key()
        answer = await app.http.get("/v1/billing/transactions", headers=key, params={"limit": limit})
        assert answer.status_code == 422
        assert answer.json()["detail"].startswith("limit: ")
        assert answer.json()["error"]["code"] == "INVALID_REQUEST"

    @pytest.mark.parametrize("limit", [1, 200, 201, 10**6, 2**63, 10**30])
    async def test_a_limit_above_200_means_200(self, app: App, limit: int) -> None:
        key, customer = app.key()
        answer = await app.http.get("/v1/billing/transactions", headers=key, params={"limit": limit})
        assert answer.status_code == 200
        assert answer.json()["customer_id"] == customer
        assert [row["amount_mils"] for row in answer.json()["transactions"]] == [1_000_000]

    @pytest.mark.parametrize("slug", ["unknown", "a" * 5000, "%00", "%2e%2e", "tiny-pusher%0A", "%F0%9F%A4%96"])
    async def test_a_model_that_is_not_in_the_catalog_is_404(self, app: App, slug: str) -> None:
        for path in (f"/v1/models/{slug}", f"/models/{slug}/v1/models"):
            answer = await app.http.get(path)
            assert answer.status_code == 404, path
            assert answer.json()["error"]["code"] in ("MODEL_NOT_FOUND", "INVALID_REQUEST")
