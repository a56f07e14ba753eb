import pytest

from coordinator.status import in_words
from peer.errors import CouldNotListen
from peer.reachable import listen_ip, reachable_address
from tests.swarm_scenes import peer, peer_id, rates, scene, trainer


def test_status_names_who_serves_and_what_nobody_serves() -> None:
    ada, bob = peer("ada", "0.0", "0.1", rates=rates(0.04)), peer("bob")
    state = scene(ada, bob, trainers=[trainer("tim", step=3, loss=4.5), trainer("tom")])

    text = "\n".join(in_words(state))

    assert "2 of 6 experts served" in text
    assert peer_id("ada")[:8] in text
    assert text.count("  4 %  ") == text.count("  unknown  ") == 1
    assert "step 3, 4.500 bits per byte" in text
    assert "no loss yet" in text
    assert text.endswith("uncovered: 0.2 1.0 1.1 1.2")


@pytest.mark.hostile
def test_what_members_say_cannot_steer_the_terminal() -> None:
    hostile = peer("mallory", device="\x1b[2Jgone\r\n").model_copy(update={"address": "\x1b]0;owned\x07:1"})

    text = "".join(in_words(scene(hostile)))

    assert text.isprintable()
    assert "gone" in text


@pytest.mark.parametrize("listening", ["127.0.0.1:4700", "192.0.2.7:4700", "gpu.example:4700", "[2001:db8::7]:4700"])
def test_an_address_of_one_interface_is_told_as_it_is(listening: str) -> None:
    assert reachable_address(listening) == listening


@pytest.mark.parametrize("listening", ["0.0.0.0:4700", "[::]:4700"])
def test_all_interfaces_are_told_as_one_that_can_be_dialled(listening: str) -> None:
    host, port = reachable_address(listening).rsplit(":", 1)

    assert port == "4700"
    assert listen_ip(host) == host
    assert host not in ("0.0.0.0", "::")


def test_a_name_to_listen_on_becomes_its_ip_address() -> None:
    assert listen_ip("localhost") == "127.0.0.1"
    assert listen_ip("::1") == "::1"


def test_a_name_that_nobody_has_cannot_be_listened_on() -> None:
    with pytest.raises(CouldNotListen, match="give an IP address"):
        listen_ip("nobody.invalid")
