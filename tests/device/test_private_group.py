"""Groups over the network that leads to the others, and over no other."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from pathlib import Path

import pytest
import torch

from gspo_megatron.device.private_group import PrivateGroup, is_loopback, own_address
from gspo_megatron.testing.time_limits import time_factor

TIMEOUT_S = 30 * time_factor()
CPU = torch.device("cpu")
ELSEWHERE = "198.51.100.1"
"""An address of no machine (RFC 5737)."""


def test_addresses_of_this_machine() -> None:
    assert own_address("127.0.0.1") == own_address("localhost") == "127.0.0.1"
    assert is_loopback("127.0.1.1") and is_loopback("localhost") and is_loopback("::1")
    assert not is_loopback(ELSEWHERE) and not is_loopback("no-such.invalid")
    with pytest.raises(OSError):
        own_address("no-such.invalid")


def listening() -> dict[str, str]:
    """IPv4 addresses at which this process listens, by socket: other tests may have left some."""
    mine, found = set(), dict[str, str]()
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            mine.add(os.readlink(descriptor))
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, *rest = line.split()
        if state == "0A" and f"socket:[{rest[5]}]" in mine:
            found[rest[5]] = socket.inet_ntoa(struct.pack("<I", int(local.split(":")[0], 16)))
    return found


def test_a_group_listens_where_the_others_reach_it() -> None:
    try:
        host = own_address(ELSEWHERE)
    except OSError:
        pytest.skip("this machine has no network")
    before = listening()
    store = PrivateGroup.listen(host, TIMEOUT_S)
    groups: list[PrivateGroup] = []
    joining = threading.Thread(
        target=lambda: groups.append(PrivateGroup.join(host, store.port, 1, 2, CPU, timeout_s=TIMEOUT_S))
    )
    joining.start()
    groups.append(PrivateGroup.open(store, 2, CPU, timeout_s=TIMEOUT_S))
    joining.join()
    sender = next(group for group in groups if group._store is store)
    [receiver] = [group for group in groups if group is not sender]
    assert {address for each, address in listening().items() if each not in before} == {host}
    received = torch.zeros(4)
    receiving = threading.Thread(target=receiver.receive, args=(received,))
    receiving.start()
    sender.send(torch.arange(4.0))
    receiving.join()
    assert received.tolist() == [0, 1, 2, 3]
    for group in groups:
        group.close()
