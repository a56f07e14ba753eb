import json
import re
import socket
from collections.abc import AsyncIterator

import pytest
from prometheus_client import CollectorRegistry

from coordinator.monitor import Monitor
from coordinator.page import page_files
from peer.event_feed import EventFeed, event_bytes
from peer.http_api import Health, HttpContent, HttpServer
from peer.swarm_state import SwarmState
from tests.browser import CHROMIUM, Page, chromium_page
from tests.swarm_scenes import peer, peer_id, rates, scene, trainer

HOSTILE = "<img src=x onerror=alert(1)>"
LIVE = "document.querySelector('#link')?.dataset.link === 'live'"
LOST = "document.querySelector('#link')?.dataset.link === 'lost'"

browser = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)"),
]


class Shown:
    """The page of a swarm that the test makes up."""

    def __init__(self) -> None:
        self._monitor = Monitor()
        self._feed = EventFeed(self._hello)

    async def serve(self, listen: str = "127.0.0.1:0") -> HttpServer:
        content = HttpContent(
            state_json=lambda: self._monitor.remembered().state.model_dump_json(),
            health=lambda: Health(ok=True, detail=""),
            registry=CollectorRegistry(),
            feed=self._feed,
            files=page_files(),
        )
        return await HttpServer.start(content, listen)

    def see(self, state: SwarmState) -> None:
        self._feed.publish(event_bytes("update", self._monitor.observe(state).model_dump_json()))

    def _hello(self) -> bytes:
        remembered = self._monitor.remembered().model_dump(mode="json")
        return event_bytes("hello", json.dumps({"join": f"192.0.2.9:4700/{peer_id('owner')}", **remembered}))


@pytest.fixture
async def page() -> AsyncIterator[Page]:
    async with chromium_page() as page:
        yield page


def test_nothing_on_the_page_parses_markup_or_comes_from_elsewhere() -> None:
    for path, file in page_files().items():
        text = file.content.decode()

        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text), (
            path
        )
        assert not re.search(r"""(src|href|@import|url\()\s*=?\s*["'(]?(https?:)?//""", text), path
        assert not re.search(r"<script(?![^>]*\ssrc=)|\sstyle=|\son\w+=", text), path  # the policy forbids them inline


def test_the_page_asks_only_for_files_that_are_served() -> None:
    served = page_files()

    asked = set(re.findall(r'(?:src|href)="(/[^"]*)"', served["/"].content.decode()))
    asked |= {
        f"/{name}" for file in served.values() for name in re.findall(r'from "\./([^"]+)"', file.content.decode())
    }

    assert asked - {"/api/state"} == served.keys() - {"/"}


class TestInABrowser:
    pytestmark = browser

    async def test_it_shows_who_serves_what(self, page: Page) -> None:
        shown = Shown()
        shown.see(
            scene(
                peer("ada", "0.0", "0.1"),
                peer("bob", "0.1", "1.0"),
                peer("cyd", "0.2", state="draining"),
                trainers=[trainer("tim", step=3, loss=4.5)],
            )
        )
        async with await shown.serve() as server:
            await page.open(f"http://{server.address}/")
            await page.until(LIVE)

            covers = await page.evaluate("[...document.querySelectorAll('.cell')].map((cell) => cell.dataset.cover)")
            explained = await page.evaluate("document.querySelector('[data-uid=\"0.1\"]').getAttribute('aria-label')")
            rows = await page.evaluate("document.querySelectorAll('#peers tbody tr').length")
            loss = await page.evaluate("document.querySelector('#figure-loss').textContent")
            title = await page.evaluate("document.title")

        assert covers == ["one", "many", "held", "one", "none", "none"]
        assert peer_id("ada")[:8] in explained
        assert peer_id("bob")[:8] in explained
        assert (rows, loss, title) == (3, "4.50", "six · swarmoe")
        assert page.complaints == []

    async def test_it_shows_what_each_link_lets_its_device_do(self, page: Page) -> None:
        shown = Shown()
        shown.see(
            scene(
                peer("ada", rates=rates(0.04)),
                peer("bob", rates=rates(0.55)),
                peer("cyd", rates=rates(12)),
                peer("dan"),
            )
        )
        async with await shown.serve() as server:
            await page.open(f"http://{server.address}/")
            await page.until(LIVE)

            told = await page.evaluate(
                "Object.fromEntries([...document.querySelectorAll('#peers tbody tr')].map((row) =>"
                " [row.cells[0].title, [row.cells[4].firstChild.textContent, row.cells[4].firstChild.className]]))"
            )
            title = await page.evaluate("document.querySelector('.low').parentNode.title")
            median = await page.evaluate("document.querySelector('#peers-aside').textContent")

        assert told == {
            peer_id("ada"): ["4 %", "low"],
            peer_id("bob"): ["55 %", ""],
            peer_id("cyd"): ["100 %", ""],
            peer_id("dan"): ["\N{EN DASH}", ""],
        }
        assert title == "1.24 Mbit/s up, 12.4 Mbit/s down, 23 ms there and back; chi 0.04"
        assert median.startswith("4 known; links let devices be busy 55 % of the time")

    async def test_what_members_say_is_text_and_never_markup(self, page: Page) -> None:
        shown = Shown()
        shown.see(scene())
        async with await shown.serve() as server:
            await page.open(f"http://{server.address}/")
            await page.until(LIVE)

            hostile = peer("mallory", "0.0", device=HOSTILE).model_copy(update={"address": HOSTILE})
            shown.see(scene(hostile))
            await page.until("document.querySelectorAll('#peers tbody tr').length === 1")

            cells = await page.evaluate("[...document.querySelectorAll('#peers td')].map((cell) => cell.textContent)")
            told = await page.evaluate("document.querySelector('#log').textContent")
            images = await page.evaluate("document.images.length")

        assert HOSTILE in cells
        assert HOSTILE in told
        assert images == 0
        assert page.complaints == []

    async def test_a_change_is_on_the_page_without_reloading(self, page: Page) -> None:
        shown = Shown()
        shown.see(scene())
        async with await shown.serve() as server:
            await page.open(f"http://{server.address}/")
            await page.until(LIVE)
            invitation = await page.evaluate("document.querySelector('#join-panel').innerText")

            shown.see(scene(peer("ada", "0.0"), trainers=[trainer("tim", step=1, loss=7.0)]))
            await page.until("document.querySelector('[data-uid=\"0.0\"]').dataset.cover === 'one'")
            shown.see(scene(peer("ada", "0.0"), trainers=[trainer("tim", step=2, loss=6.0)]))
            await page.until("document.querySelector('#loss-chart svg')?.ariaLabel.includes('6.00')")

            drawn = await page.evaluate("document.querySelector('#loss-chart svg').ariaLabel")
            hidden = await page.evaluate("document.querySelector('#join-panel').hidden")

        assert f"swarmoe peer --join 192.0.2.9:4700/{peer_id('owner')}" in invitation
        assert drawn.endswith("7.00 bits per byte at step 1, 6.00 at step 2.")
        assert hidden

    async def test_a_dead_coordinator_is_said_and_a_new_one_found(self, page: Page) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            listen = f"127.0.0.1:{free.getsockname()[1]}"
        first = Shown()
        first.see(scene(peer("ada", "0.0")))
        server = await first.serve(listen)
        await page.open(f"http://{listen}/")
        await page.until(LIVE)

        await server.close()
        await page.until(LOST)
        said = await page.evaluate("document.querySelector('#lost').textContent")
        second = Shown()
        second.see(scene(peer("bob", "0.0"), peer("cyd", "0.1")))
        async with await second.serve(listen):
            await page.until(LIVE)
            rows = await page.evaluate("document.querySelectorAll('#peers tbody tr').length")
            banner_hidden = await page.evaluate("document.querySelector('#lost').hidden")

        assert said.startswith("Connection lost at")
        assert rows == 2
        assert banner_hidden

    async def test_the_grid_is_walked_with_arrow_keys(self, page: Page) -> None:
        shown = Shown()
        shown.see(scene(peer("ada", "0.0", "0.1", "1.1")))
        async with await shown.serve() as server:
            await page.open(f"http://{server.address}/")
            await page.until(LIVE)
            await page.evaluate("document.querySelector('.cell[tabindex=\"0\"]').focus()")

            await page.press("ArrowRight")
            await page.press("ArrowDown")

            uid = await page.evaluate("document.activeElement.dataset.uid")
            detail = await page.evaluate("document.querySelector('#expert-detail').textContent")
            picked = await page.evaluate("document.querySelectorAll('#peers tr.picked').length")

        assert uid == "1.1"
        assert detail.startswith(f"Expert 1.1: served by {peer_id('ada')[:8]} on cpu")
        assert picked == 1

    @pytest.mark.parametrize("dark", [False, True])
    async def test_it_fits_a_phone(self, page: Page, dark: bool) -> None:
        shown = Shown()
        shown.see(
            scene(*(peer(f"p{n}", *scene().uncovered) for n in range(8)), trainers=[trainer("t", step=1, loss=5.0)])
        )
        async with await shown.serve() as server:
            await page.view(width=390, height=800, dark=dark)
            await page.open(f"http://{server.address}/")
            await page.until(LIVE)

            width = await page.evaluate("document.documentElement.scrollWidth")
            paper = await page.evaluate("getComputedStyle(document.body).backgroundColor")

        assert width == 390
        assert paper == ("rgb(16, 19, 22)" if dark else "rgb(245, 246, 247)")
