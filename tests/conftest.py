"""Order of the tiers, and what several test files need."""

import socket
from collections.abc import Iterator

import pytest

_TIERS = ("swarm", "slow", "process")
"""Cheapest first; unit and contract tests carry no marker and come before all of them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(
        key=lambda item: max(
            (1 + _TIERS.index(mark.name) for mark in item.iter_markers() if mark.name in _TIERS), default=0
        )
    )


@pytest.fixture
def closed_port() -> Iterator[str]:
    """HOST:PORT at which nobody listens: bound, so that nobody else can, and not listening."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


@pytest.fixture
def silent_listener() -> Iterator[str]:
    """HOST:PORT at which somebody listens and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
