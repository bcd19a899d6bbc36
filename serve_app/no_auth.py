"""The development mode without keys: every request is the development customer's, and only this machine may ask.

It listens on loopback alone. That does not keep out a page in this machine's browser, or a tunnel, so a request whose
Host or Origin is not a loopback name is refused as well.
"""

import ipaddress
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

from serve_app.errors import Forbidden


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address, can only be this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def refuse_strangers(request: HTTPConnection) -> None:
    """Raises Forbidden unless the request was sent to this machine by name, and not by another site's page."""
    for header, url in (("Host", f"//{request.headers.get('host', '')}"), ("Origin", request.headers.get("origin"))):
        if url is not None and not is_loopback(_host(url)):
            raise Forbidden(f"{header}: this server asks for no keys, so it answers to localhost and 127.0.0.1 alone")


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
