import asyncio
import socket
from collections.abc import AsyncIterator, Callable

import httpx
import pytest
from prometheus_client import CollectorRegistry, Gauge

from peer.errors import CouldNotListen
from peer.event_feed import BEAT, MAX_LISTENERS, MAX_WAITING, EventFeed, FeedFull, event_bytes
from peer.http_api import CLOSE_WITHIN_S, Health, HttpContent, HttpServer, StaticFile, http_app

HELLO = event_bytes("hello", '{"state":1}')


@pytest.fixture
def feed() -> EventFeed:
    return EventFeed(lambda: HELLO)


def content(feed: EventFeed, *, healthy: bool = True) -> HttpContent:
    registry = CollectorRegistry()
    Gauge("swarmoe_answer", "What it is.", registry=registry).set(42)
    return HttpContent(
        state_json=lambda: '{"run":"r"}',
        health=lambda: Health(healthy, "3 experts"),
        registry=registry,
        feed=feed,
        files={"/": StaticFile(b"<!doctype html>", "text/html")},
    )


def client(served: HttpContent) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(http_app(served)), base_url="http://127.0.0.1")


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until it is so; what the server does to a connection is nobody's event."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


async def listen_without_reading(server: HttpServer) -> asyncio.StreamWriter:
    host, port = server.address.split(":")
    _, writer = await asyncio.open_connection(host, int(port), limit=1024)
    writer.write(b"GET /events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    return writer


@pytest.fixture
async def server(feed: EventFeed) -> AsyncIterator[HttpServer]:
    async with await HttpServer.start(content(feed), "127.0.0.1:0") as server:
        yield server


async def test_state_is_the_json_it_is_given(feed: EventFeed) -> None:
    async with client(content(feed)) as http:
        reply = await http.get("/api/state")

    assert reply.json() == {"run": "r"}
    assert reply.headers["content-type"] == "application/json"


async def test_metrics_are_those_of_the_given_registry_alone(feed: EventFeed) -> None:
    async with client(content(feed)) as http:
        reply = await http.get("/metrics")

    assert "swarmoe_answer 42.0" in reply.text
    assert "python_info" not in reply.text


@pytest.mark.parametrize(("healthy", "status"), [(True, 200), (False, 503)])
async def test_health_is_a_status_code_and_a_reason(feed: EventFeed, healthy: bool, status: int) -> None:
    async with client(content(feed, healthy=healthy)) as http:
        reply = await http.get("/healthz")

    assert reply.status_code == status
    assert reply.json()["detail"] == "3 experts"


@pytest.mark.parametrize("path", ["/", "/nothing", "/api/state"])
async def test_every_response_forbids_foreign_scripts_frames_and_readers(feed: EventFeed, path: str) -> None:
    async with client(content(feed)) as http:
        reply = await http.get(path, headers={"Origin": "https://elsewhere.example"})

    assert reply.headers["content-security-policy"].startswith("default-src 'self'")
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
async def test_nothing_can_be_written(feed: EventFeed, method: str) -> None:
    async with client(content(feed)) as http:
        assert (await http.request(method, "/api/state")).status_code == 405


async def test_a_listener_is_greeted_and_then_told_in_order(feed: EventFeed) -> None:
    messages = feed.listen().messages()

    feed.publish(b"one")
    feed.publish(b"two")

    assert [await anext(messages) for _ in range(3)] == [HELLO, b"one", b"two"]


async def test_a_quiet_feed_beats(feed: EventFeed) -> None:
    messages = feed.listen().messages(beat_every_s=0)

    first = await anext(messages)
    second = await anext(messages)

    assert {first, second} <= {HELLO, BEAT}
    assert BEAT in (first, second)


async def test_a_listener_that_falls_behind_is_dropped_and_the_others_are_not(feed: EventFeed) -> None:
    slow, fast = feed.listen(), feed.listen()
    heard = fast.messages()

    for _ in range(MAX_WAITING):
        feed.publish(b"x")
        await anext(heard)

    assert feed.num_listeners == 1
    assert [message async for message in slow.messages()] == []
    assert await anext(heard) == b"x"


async def test_there_is_a_most_to_listeners(feed: EventFeed) -> None:
    listeners = [feed.listen() for _ in range(MAX_LISTENERS)]

    with pytest.raises(FeedFull):
        feed.listen()

    listeners[0].end()
    feed.listen()


async def test_a_closed_feed_ends_those_who_listen_and_those_who_come(feed: EventFeed) -> None:
    early = feed.listen()

    feed.close()

    assert [message async for message in early.messages()] == []
    assert [message async for message in feed.listen().messages()] == []
    assert feed.num_listeners == 0


def test_an_event_of_several_lines_stays_one_event() -> None:
    assert event_bytes("hello", "a\n\nevent: b") == b"event: hello\ndata: a\ndata: \ndata: event: b\n\n"


async def test_a_browser_hears_of_a_change(server: HttpServer, feed: EventFeed) -> None:
    async with httpx.AsyncClient() as http, http.stream("GET", f"http://{server.address}/events") as reply:
        chunks = reply.aiter_bytes()
        greeting = await anext(chunks)

        feed.publish(event_bytes("update", '{"state":2}'))
        change = await anext(chunks)

    assert reply.headers["content-type"].startswith("text/event-stream")
    assert greeting == HELLO
    assert change == b'event: update\ndata: {"state":2}\n\n'


async def test_a_browser_that_leaves_is_forgotten(server: HttpServer, feed: EventFeed) -> None:
    async with httpx.AsyncClient() as http, http.stream("GET", f"http://{server.address}/events") as reply:
        await anext(reply.aiter_bytes())
        assert feed.num_listeners == 1

    await until(lambda: feed.num_listeners == 0)


async def test_a_browser_that_stops_reading_is_dropped(server: HttpServer, feed: EventFeed) -> None:
    writer = await listen_without_reading(server)
    await until(lambda: feed.num_listeners == 1)

    large = event_bytes("update", "x" * (1 << 20))
    async with asyncio.timeout(20):
        while feed.num_listeners:
            feed.publish(large)
            await asyncio.sleep(0)

    async with httpx.AsyncClient() as http:
        assert (await http.get(f"http://{server.address}/healthz")).status_code == 200
    writer.close()


async def test_closing_takes_no_longer_than_it_says_with_readers_and_with_one_that_stalls(feed: EventFeed) -> None:
    server = await HttpServer.start(content(feed), "127.0.0.1:0")
    stalled = await listen_without_reading(server)
    await until(lambda: feed.num_listeners == 1)
    async with httpx.AsyncClient() as http, http.stream("GET", f"http://{server.address}/events") as reply:
        chunks = reply.aiter_bytes()
        await anext(chunks)
        for _ in range(MAX_WAITING):
            feed.publish(event_bytes("update", "x" * (1 << 20)))

        async with asyncio.timeout(CLOSE_WITHIN_S):
            await server.close()

        async with asyncio.timeout(5):
            async for _ in chunks:
                pass
    await server.close()
    stalled.close()


async def test_a_taken_port_is_said_with_the_flag_that_changes_it(feed: EventFeed) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"

        with pytest.raises(CouldNotListen, match=rf"{listen}.*--http"):
            await HttpServer.start(content(feed), listen)


async def test_a_loopback_listener_answers_to_loopback_names_only(server: HttpServer) -> None:
    port = server.address.split(":")[1]
    async with httpx.AsyncClient() as http:
        rebound = await http.get(f"http://{server.address}/api/state", headers={"Host": f"evil.example:{port}"})
        local = await http.get(f"http://{server.address}/api/state", headers={"Host": f"localhost:{port}"})

    assert rebound.status_code == 400
    assert local.status_code == 200


async def test_ipv6_is_served_too(feed: EventFeed) -> None:
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    async with await HttpServer.start(content(feed), "[::1]:0") as server, httpx.AsyncClient() as http:
        assert (await http.get(f"http://{server.address}/healthz")).status_code == 200
