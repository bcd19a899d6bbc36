"""The public client asks for a page, a headless Chromium pays on it, and the balance rises once.

    python -m benchmarks.pay_in_browser [--chromium chromium]

Chromium is driven over its own DevTools protocol. Prints one JSON line.
"""

import argparse
import asyncio
import json
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import dream
import httpx
import uvicorn
import websockets

from tests.support.payments import Shop, open_shop

PATIENCE_S = 60.0


class Browser:
    """One page of a Chromium that belongs to us."""

    def __init__(self, socket: websockets.ClientConnection) -> None:
        self._socket = socket
        self._serial = 0

    async def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._serial += 1
        await self._socket.send(json.dumps({"id": self._serial, "method": method, "params": parameters}))
        while True:
            answer: dict[str, Any] = json.loads(await self._socket.recv())
            if answer.get("id") == self._serial:
                return answer["result"] if "result" in answer else sys.exit(str(answer))

    async def text(self, expression: str) -> str:
        answer = await self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        return str(answer["result"].get("value", ""))

    async def until(self, expression: str, pattern: str) -> str:
        deadline = time.monotonic() + PATIENCE_S
        while not re.search(pattern, value := await self.text(expression)):
            if time.monotonic() > deadline:
                sys.exit(f"{expression} stayed {value!r}")
            await asyncio.sleep(0.05)
        return value


async def pay(chromium: str, url: str, directory: str) -> str:
    """The text of the page that paying leads to."""
    browser = await asyncio.create_subprocess_exec(
        chromium,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--remote-debugging-port=0",
        f"--user-data-dir={directory}",
        "about:blank",
        stderr=asyncio.subprocess.PIPE,
    )
    assert browser.stderr is not None
    try:
        async with asyncio.timeout(PATIENCE_S):
            found = None
            while found is None:
                found = re.search(r"ws://127\.0\.0\.1:(\d+)/", (await browser.stderr.readline()).decode())
        async with httpx.AsyncClient() as http:
            pages = (await http.get(f"http://127.0.0.1:{found[1]}/json/list")).json()
        page = next(each for each in pages if each["type"] == "page")
        async with websockets.connect(page["webSocketDebuggerUrl"]) as socket:
            window = Browser(socket)
            await window.ask("Page.navigate", url=url)
            await window.until("String(!!document.getElementById('pay'))", "true")
            await window.text("document.getElementById('pay').click()")
            await window.until("location.href", "/done$")
            return await window.until("document.body.innerText", "Thank you")
    finally:
        browser.terminate()
        await browser.wait()


async def main(chromium: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        async with open_shop(Path(directory)) as shop:
            server = uvicorn.Server(uvicorn.Config(shop.app.api, port=0, lifespan="off", log_level="critical"))
            serving = asyncio.create_task(server.serve())
            while not server.started:  # noqa: ASYNC110 - uvicorn tells nobody
                await asyncio.sleep(0.01)
            base_url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
            print(json.dumps(await top_up(shop, base_url, chromium, f"{directory}/chromium")))
            server.should_exit = True
            await serving


async def top_up(shop: Shop, base_url: str, chromium: str, directory: str) -> dict[str, Any]:
    headers, customer = shop.app.key(credits_mils=0)
    key = headers["Authorization"].removeprefix("Bearer ")
    with dream.Client(api_key=key, base_url=base_url) as client:
        session = await asyncio.to_thread(client.billing.topup, amount_usd=25.00)
        said = await pay(chromium, session.url, directory)
        await shop.settled()
        balance = (await asyncio.to_thread(client.billing.balance)).balance_mils
    assert shop.app.ledger.rows(customer) == [("credit", 250_000)], shop.app.ledger.rows(customer)
    return {"said": said, "balance_mils": balance, "credits": 1}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("chromium-browser"))
    options = parser.parse_args()
    if not options.chromium:
        sys.exit("there is no chromium here; install the package `chromium`, or say where one is with --chromium")
    asyncio.run(main(options.chromium))
