"""Addresses and task numbers."""

from __future__ import annotations

import pytest

from actorlearner.cluster import Cluster


@pytest.mark.parametrize("address", ["localhost:8008", "10.0.0.1:1", "learner.example.org:65535", "[::1]:8008"])
def test_a_host_and_a_port_are_an_address(address):
    """Every launcher's way to name a machine must pass."""
    assert Cluster(address, address).replay_addresses == (address,)
    assert Cluster(f"a:1,{address}", address).replay_addresses == ("a:1", address)


@pytest.mark.parametrize(
    "address", ["", "localhost", ":8008", "localhost:", "localhost:0", "localhost:65536", "host:http"]
)
@pytest.mark.parametrize("flag", ["replay_address", "variables_address"])
def test_what_is_no_address_is_refused_with_its_flag(flag, address):
    """gRPC resolves nonsense for minutes and then says only that the peer is unavailable."""
    addresses = {"replay_address": "a:1", "variables_address": "a:1", flag: address}
    with pytest.raises(ValueError, match=f"--{flag} = '{address}': expected HOST:PORT, such as localhost:8008"):
        Cluster(**addresses)


@pytest.mark.parametrize(
    ("addresses", "wrong"),
    [
        ("a:1,b", "'b': expected HOST:PORT"),
        ("a:1,", "'': expected HOST:PORT"),
        ("a:1, b:2", "' b:2': expected HOST:PORT"),
        ("a:1,b:2,a:1", "'a:1' is listed twice"),
        ("a:1;b:2", "expected HOST:PORT"),
    ],
)
def test_of_several_addresses_the_wrong_one_is_named(addresses, wrong):
    """In a list of eight hosts a typing error is hard to see."""
    with pytest.raises(ValueError) as raised:
        Cluster(addresses, "a:1")
    assert str(raised.value).startswith(f"--replay_address = '{addresses}'")
    assert wrong in str(raised.value)


def test_a_task_below_zero_is_refused():
    """Its seeds would be those of no task."""
    with pytest.raises(ValueError, match="--task = -1"):
        Cluster("a:1", "a:1", task=-1)
