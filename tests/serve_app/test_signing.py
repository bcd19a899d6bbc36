"""A link opens what was signed, until when it was signed for, and nothing else."""

import stat
from pathlib import Path

import pytest

from serve_app.signing import LinkSigner, load_secret
from tests.support.app import App
from tests.support.payloads import actions, npy, png

NAME = "rollout_" + "ab" * 16
SIGNER = LinkSigner(b"s" * 32)


def test_what_was_signed_is_valid() -> None:
    assert SIGNER.is_valid(NAME, 1000, SIGNER.sign(NAME, 1000))


def test_the_same_secret_signs_the_same_in_every_process() -> None:
    assert LinkSigner(b"s" * 32).is_valid(NAME, 1000, SIGNER.sign(NAME, 1000))
    assert not LinkSigner(b"t" * 32).is_valid(NAME, 1000, SIGNER.sign(NAME, 1000))


@pytest.mark.parametrize(
    ("name", "expires_at"),
    [(NAME, 1001), (NAME, -1000), (NAME, 0), (NAME[:-1], 1000), (NAME + "\n1000", 1000), ("", 1000)],
)
def test_a_signature_opens_nothing_else(name: str, expires_at: int) -> None:
    assert not SIGNER.is_valid(name, expires_at, SIGNER.sign(NAME, 1000))


def test_a_part_of_the_name_cannot_pass_for_the_expiry() -> None:
    assert SIGNER.sign("a\n1", 2) != SIGNER.sign("a", 1)
    assert not SIGNER.is_valid("a\n1", 2, SIGNER.sign("a", 12))


@pytest.mark.parametrize("signature", ["", "0", "0" * 64, "é", "\0", "g" * 64, "0" * 100_000])
def test_a_made_up_signature_is_invalid(signature: str) -> None:
    assert not SIGNER.is_valid(NAME, 1000, signature)


def test_a_short_secret_is_not_taken() -> None:
    with pytest.raises(AssertionError):
        LinkSigner(b"s" * 31)


def test_the_secret_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "link-secret"
    secret = load_secret(path)
    assert len(secret) == 32
    assert load_secret(path) == secret
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_every_installation_has_its_own_secret(tmp_path: Path) -> None:
    assert load_secret(tmp_path / "one") != load_secret(tmp_path / "two")


def test_a_secret_made_meanwhile_by_another_process_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "link-secret"
    other = load_secret(tmp_path / "other").hex()
    exists = Path.exists

    def made_right_after(self: Path, **options: bool) -> bool:
        if self == path and not exists(path):
            path.write_text(other)
            return False
        return exists(self, **options)

    monkeypatch.setattr(Path, "exists", made_right_after)
    assert load_secret(path).hex() == other
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link-secret", "other"]


class TestVideoLink:
    """`GET /v1/rollouts/{id}/video`: the signature is the permission, no key is sent."""

    async def link(self, app: App) -> str:
        headers, _ = app.key()
        files = {"start_frame": png(), "actions": npy(actions())}
        params = {"params": '{"model": "tiny-pusher"}'}
        answer = await app.http.post("/v1/rollouts", headers=headers, files=files, data=params)
        assert answer.status_code == 200
        url: str = answer.json()["video_url"]
        return url

    async def test_a_link_opens_without_a_key_and_under_every_base(self, app: App) -> None:
        url = await self.link(app)
        video = await app.http.get(url)
        assert video.status_code == 200
        assert video.headers["content-type"] == "video/mp4"
        assert (await app.http.get(url.replace("/v1/", "/models/tiny-pusher/v1/"))).content == video.content

    async def test_a_changed_link_is_403(self, app: App) -> None:
        url = await self.link(app)
        for changed in (
            url[:-1] + ("0" if url[-1] != "0" else "1"),
            url.replace("expires=", "expires=1"),
            url.replace("expires=", "expires=-"),
            url.replace("expires=", "expires=" + "9" * 30),
            url.replace("rollout_", "rollout_0"),
            url.replace("/rollout_", "/..%2Frollout_"),
            url + "é",
        ):
            answer = await app.http.get(changed)
            assert answer.status_code in (403, 404), changed
            assert answer.json()["detail"]
        assert (await app.http.get(url)).status_code == 200

    async def test_an_expired_link_is_410_and_an_unknown_video_404(self, app: App) -> None:
        for expires_at, status in ((1, 410), (2**40, 404)):
            signature = app.services.signer.sign(NAME, expires_at)
            answer = await app.http.get(f"/v1/rollouts/{NAME}/video?expires={expires_at}&signature={signature}")
            assert answer.status_code == status
            assert answer.json()["error"]["code"] == "INVALID_REQUEST"

    @pytest.mark.parametrize(
        ("query", "field"),
        [
            ("", "expires"),
            ("?expires=1", "signature"),
            ("?expires=soon&signature=0", "expires"),
            ("?expires=1.5&signature=0", "expires"),
            (f"?expires={'9' * 5000}&signature=0", "expires"),
        ],
        ids=["nothing", "no signature", "word", "fraction", "5000 digits"],
    )
    async def test_an_incomplete_link_is_422_naming_what_lacks(self, app: App, query: str, field: str) -> None:
        answer = await app.http.get(f"/v1/rollouts/{NAME}/video{query}")
        assert answer.status_code == 422
        assert field in answer.json()["detail"]
