"""Which address to tell others, given where we listen. Asks this machine's routing table, never the network."""

import ipaddress
import socket

from peer.addresses import join_address, split_address
from peer.errors import CouldNotListen

_SOMEWHERE = ("192.0.2.1", 9)
"""RFC 5737: an address nobody has. Connecting a datagram socket sends nothing, it only looks up the way out."""


def reachable_address(listening: str) -> str:
    """HOST:PORT others can dial: where we listen, or for all interfaces the one that the default route leaves by.

    Without a route it is 127.0.0.1: then only this machine can join. ValueError when `listening` is no address.
    """
    host, port = split_address(listening)
    if host not in ("0.0.0.0", "::"):
        return listening
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_SOMEWHERE)
        except OSError:
            return join_address("127.0.0.1", port)
        return join_address(probe.getsockname()[0], port)


def listen_ip(listen_host: str) -> str:
    """The IP address of a host we listen on, for those who take no names. Blocks while the name is looked up.

    Raises CouldNotListen.
    """
    try:
        return str(ipaddress.ip_address(listen_host))
    except ValueError:
        pass
    try:
        return socket.gethostbyname(listen_host)
    except OSError as error:
        raise CouldNotListen(f"cannot listen on {listen_host}: {error.strerror}; give an IP address") from error


def is_loopback(address: str) -> bool:
    """Is this HOST:PORT on this machine for sure? Asks no resolver: any name but localhost may be elsewhere."""
    host, _ = split_address(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
