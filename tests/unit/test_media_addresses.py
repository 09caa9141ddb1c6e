"""addresses: which addresses are public. tests/unit/test_media_fetch.py has the private ones."""

from __future__ import annotations

import pytest

from llava_sessions.media.addresses import is_public_address
from tests.support.tls_server import PUBLIC


@pytest.mark.parametrize(
    "address",
    ["1.1.1.1", PUBLIC, "172.32.0.1", "100.128.0.1", "2606:4700::1111", "64:ff9b::101:101", "::ffff:1.1.1.1"],
)
def test_public_addresses(address: str) -> None:
    assert is_public_address(address)


def test_an_address_of_one_interface_is_not_public() -> None:
    assert not is_public_address("2606:4700::1111%eth0")
