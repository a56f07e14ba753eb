"""How fast do bytes travel there and back over a bare gRPC stream here? Two processes, 1 MiB a message, TLS or none.

What the transport could do at best: no torch, no protobuf, nothing looked at. `BareEcho` is the handle of a benchmark.
"""

import asyncio
import base64
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from peer.certificates import SERVER_NAME, Certificate, pem_of
from peer.event_loop import EventLoopThread
from peer.grpc_status import SHARED_OPTIONS, grpc
from peer.transport import CHUNK_BYTES

_SERVICE, _METHOD = "bare", "Echo"
_START_WITHIN_S = 30.0


class BareEcho:
    """A client in a process of its own, and its server in another."""

    def __init__(self, ask: Callable[[str], str]) -> None:
        self._ask = ask

    def megabytes_per_s(self, num_chunks: int, *, tls: bool) -> float:
        """So many chunks there and back on one stream, both directions at once: bytes of both over seconds."""
        seconds = float(self._ask(f"{'tls' if tls else 'plaintext'} {num_chunks}"))
        return 2 * num_chunks * CHUNK_BYTES / seconds / 1e6


@contextmanager
def bare_echo() -> Generator[BareEcho]:
    """Both processes, for as long as the context is open."""
    with _child("client") as client:

        def ask(line: str) -> str:
            assert client.stdin is not None
            assert client.stdout is not None
            client.stdin.write(line + "\n")
            client.stdin.flush()
            return client.stdout.readline()

        yield BareEcho(ask)


@contextmanager
def _child(part: str) -> Generator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "benchmarks.bare_echo", part]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()  # it ends when nobody can ask any more
            process.wait(timeout=_START_WITHIN_S)


async def _listen() -> tuple[Any, str]:
    """A server, and its two ports and certificate in one line."""

    async def echo(messages: Any, context: Any) -> None:
        async for message in messages:
            await context.write(message)

    certificate = Certificate.generate()
    server = grpc.aio.server(options=SHARED_OPTIONS)
    handlers = {_METHOD: grpc.stream_stream_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
    credentials = grpc.ssl_server_credentials([(certificate.private_key_pem, certificate.pem)])
    ports = server.add_secure_port("127.0.0.1:0", credentials), server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"{ports[0]} {ports[1]} {base64.b64encode(certificate.der).decode()}"


async def _dial(line: str) -> dict[str, Any]:
    tls_port, plaintext_port, certificate = line.split()
    options = [*SHARED_OPTIONS, ("grpc.ssl_target_name_override", SERVER_NAME)]
    credentials = grpc.ssl_channel_credentials(pem_of(base64.b64decode(certificate)))
    return {
        "tls": grpc.aio.secure_channel(f"127.0.0.1:{tls_port}", credentials, options=options),
        "plaintext": grpc.aio.insecure_channel(f"127.0.0.1:{plaintext_port}", options=SHARED_OPTIONS),
    }


async def _there_and_back(channel: Any, num_chunks: int) -> float:
    """Seconds."""
    chunk = bytes(CHUNK_BYTES)
    began_s = time.perf_counter()
    stream = channel.stream_stream(f"/{_SERVICE}/{_METHOD}")()

    async def send() -> None:
        for _ in range(num_chunks):
            await stream.write(chunk)
        await stream.done_writing()

    async def receive() -> None:
        async for _ in stream:
            pass

    await asyncio.gather(send(), receive())
    return time.perf_counter() - began_s


def _main(part: str) -> None:
    with EventLoopThread() as loop:
        if part == "server":
            server, line = loop.run(_listen(), timeout_s=_START_WITHIN_S)
            print(line, flush=True)
            sys.stdin.read()
            loop.run(server.stop(0), timeout_s=_START_WITHIN_S)
            return
        with _child("server") as server:
            assert server.stdout is not None
            channels = loop.run(_dial(server.stdout.readline()), timeout_s=_START_WITHIN_S)
            for question in sys.stdin:
                kind, num_chunks = question.split()
                print(loop.run(_there_and_back(channels[kind], int(num_chunks)), timeout_s=None), flush=True)
            for channel in channels.values():
                loop.run(channel.close(), timeout_s=_START_WITHIN_S)


if __name__ == "__main__":
    _main(sys.argv[1])
