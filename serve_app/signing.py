"""Links that work without a key until they expire: HMAC-SHA256 over what is linked and until when."""

import contextlib
import hmac
import os
import secrets
from pathlib import Path


class LinkSigner:
    def __init__(self, secret: bytes) -> None:
        assert len(secret) >= 32
        self._secret = secret

    def sign(self, name: str, expires_at: int) -> str:
        """Hex signature of `name` until `expires_at` (POSIX seconds)."""
        return hmac.digest(self._secret, f"{name}\n{expires_at}".encode(), "sha256").hex()

    def is_valid(self, name: str, expires_at: int, signature: str) -> bool:
        """Whether we signed exactly this; says nothing about whether it has expired."""
        return hmac.compare_digest(self.sign(name, expires_at).encode(), signature.encode())


def load_secret(path: Path) -> bytes:
    """The secret in `path`, made on first use and readable by its owner only. Safe when several processes start."""
    if not path.exists():
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.touch(mode=0o600)
        partial.write_text(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):  # another process was faster: its secret counts
            os.link(partial, path)
        partial.unlink()
    return bytes.fromhex(path.read_text())
