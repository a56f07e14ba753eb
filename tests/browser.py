"""A headless Chromium driven over its debugging pipe: enough to load a page, ask it questions and take its picture."""

import asyncio
import base64
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)


class Page:
    """One tab."""

    def __init__(self, reader: asyncio.StreamReader, to_browser_fd: int) -> None:
        self._reader = reader
        self._to_browser_fd = to_browser_fd
        self._next_id = 0
        self._session: str | None = None
        self.complaints: list[str] = []
        """Console errors, uncaught exceptions and blocked loads."""

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the DevTools protocol, and its result."""
        self._next_id += 1
        request = {"id": self._next_id, "method": method, "params": params}
        if self._session is not None:
            request["sessionId"] = self._session
        os.write(self._to_browser_fd, json.dumps(request).encode() + b"\0")
        while True:
            message = json.loads((await self._reader.readuntil(b"\0"))[:-1])
            if message.get("id") == self._next_id:
                assert "error" not in message, (method, message)
                return message["result"]
            self._note(message)

    async def attach(self) -> None:
        target = await self.send("Target.createTarget", url="about:blank")
        attached = await self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            await self.send(f"{domain}.enable")

    async def view(self, *, width: int, height: int, dark: bool = False) -> None:
        await self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.send("Emulation.setEmulatedMedia", features=[scheme])

    async def open(self, url: str) -> None:
        await self.send("Page.navigate", url=url)

    async def until(self, condition: str) -> None:
        """Wait for a JavaScript expression to be true, looking at every frame the page draws."""
        look = f"const look = () => {{ if ({condition}) yes(true); else requestAnimationFrame(look); }}; look();"
        await self.evaluate(f"new Promise((yes) => {{ {look} }})")

    async def evaluate(self, expression: str) -> Any:
        result = await self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def press(self, key: str) -> None:
        """One key on whatever has the focus."""
        for type_ in ("keyDown", "keyUp"):
            await self.send("Input.dispatchKeyEvent", type=type_, key=key, code=key)

    async def screenshot(self) -> bytes:
        """A PNG of what is in view."""
        picture = await self.send("Page.captureScreenshot", captureBeyondViewport=False)
        return base64.b64decode(picture["data"])

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif message.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")


@asynccontextmanager
async def chromium_page() -> AsyncIterator[Page]:
    """A tab of a fresh browser, which ends with the block and leaves no profile behind."""
    assert CHROMIUM is not None
    to_browser_read, to_browser_write = os.pipe()
    from_browser_read, from_browser_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # The browser reads commands from descriptor 3 and writes answers to 4.
        script = f'exec "$0" "$@" 3<&{to_browser_read} 4>&{from_browser_write}'
        process = await asyncio.create_subprocess_exec(
            "bash", "-c", script, CHROMIUM, *FLAGS, f"--user-data-dir={profile}",
            pass_fds=(to_browser_read, from_browser_write),
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL, stdin=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser_read)
        os.close(from_browser_write)
        reader = asyncio.StreamReader(limit=1 << 26)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(from_browser_read, "rb")
        )
        try:
            page = Page(reader, to_browser_write)
            await page.attach()
            yield page
        finally:
            transport.close()
            os.close(to_browser_write)  # the browser ends when its pipe does
            try:
                async with asyncio.timeout(5):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
