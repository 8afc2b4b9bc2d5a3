"""Which connections go when there are too many."""

from __future__ import annotations

import resource

import pytest
from mistral_node import connections
from mistral_node.connections import CONNECTIONS, OWN_FILES, STRANGERS, STRANGERS_OF_AN_ADDRESS, Held, allowed_files


class Wire:
    """A connection that notes why it was dropped."""

    def __init__(self, held: Held, host: str | None) -> None:
        self.dropped: list[str] = []
        held.add(self, host)

    def drop(self, why: str) -> None:
        self.dropped.append(why)


def test_an_address_has_so_many_and_its_oldest_goes() -> None:
    held = Held()
    other = Wire(held, "203.0.113.8")
    wires = [Wire(held, "203.0.113.9") for _ in range(STRANGERS_OF_AN_ADDRESS + 10)]
    assert [len(wire.dropped) for wire in wires] == [1] * 10 + [0] * STRANGERS_OF_AN_ADDRESS
    assert (other.dropped, len(held)) == ([], STRANGERS_OF_AN_ADDRESS + 1)


@pytest.mark.parametrize(
    ("hosts", "same"),
    [
        (["2001:db8:0:1::1", "2001:db8:0:1:ffff::2"], True), (["2001:db8:0:1::1", "2001:db8:0:2::1"], False),
        (["203.0.113.9", "::ffff:203.0.113.9"], True), (["fe80::1%eth0", "fe80::2"], True),
    ],
)  # fmt: skip
def test_who_an_address_belongs_to(hosts: list[str], same: bool) -> None:
    held = Held()
    wires = [Wire(held, hosts[number % 2]) for number in range(STRANGERS_OF_AN_ADDRESS + 10)]
    assert sum(len(wire.dropped) for wire in wires) == (10 if same else 0)


def test_behind_a_tunnel_all_share_one_address_and_have_all_the_room() -> None:
    held = Held()
    for host in ("127.0.0.1", "::1", "::ffff:127.0.0.1", None):
        for _ in range(STRANGERS // 4):
            assert not Wire(held, host).dropped
    assert len(held) == STRANGERS


def test_in_a_full_house_the_oldest_of_the_address_with_the_most_goes() -> None:
    held = Held()
    first = [Wire(held, f"203.0.113.{number}") for number in range(4)]
    many = [Wire(held, f"198.51.100.{number % 4}") for number in range(STRANGERS - 4)]
    new = Wire(held, "192.0.2.1")
    assert [wire for wire in (*first, *many, new) if wire.dropped] == [many[0]]


def test_who_has_shown_a_key_stays_and_counts_for_no_stranger() -> None:
    held = Held()
    proven = [Wire(held, "203.0.113.9") for _ in range(STRANGERS_OF_AN_ADDRESS)]
    for wire in proven:
        held.prove(wire)
        held.prove(wire)
    strangers = [Wire(held, "203.0.113.9") for _ in range(2 * STRANGERS_OF_AN_ADDRESS)]
    assert not any(wire.dropped for wire in proven)
    assert len(held) == 2 * STRANGERS_OF_AN_ADDRESS
    for wire in (*proven, *strangers):
        held.remove(wire)
        held.remove(wire)
    assert (len(held), held._waiting, held._waiting_count) == (0, {}, 0)


def test_files_never_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for files in (64, 256, 1024, 2048, 65536):
        held = Held(files)
        wires = [Wire(held, f"198.51.{number % 100}.1") for number in range(files + 100)]
        for wire in wires:
            held.prove(wire)
            Wire(held, "203.0.113.1")
        assert len(held) <= files // 2 or len(held) <= files - OWN_FILES
    limits = [(256, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda what: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda what, found: limits.append(found))
    assert (allowed_files(), limits[-1]) == (4096, (4096, 4096))
    limits.append((1024, 1 << 20))
    assert (allowed_files(), limits[-1]) == (CONNECTIONS + OWN_FILES, (CONNECTIONS + OWN_FILES, 1 << 20))
    limits.append((connections.resource.RLIM_INFINITY, connections.resource.RLIM_INFINITY))
    assert allowed_files() == CONNECTIONS + OWN_FILES
