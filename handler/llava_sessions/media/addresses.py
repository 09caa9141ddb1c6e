"""Decide which network addresses belong to the public Internet. Pure."""

from __future__ import annotations

import ipaddress


def is_public_address(address: str) -> bool:
    """Return whether `address`, IPv4 or IPv6 text as a resolver returns it, belongs to the public Internet.

    An IPv4 address inside an IPv6 address (mapped, NAT64) is judged as IPv4. 6to4, Teredo and scoped addresses are
    never public. Source: the IANA special-purpose address registries for IPv4 and IPv6.
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv4Address):
        return not any(parsed in network for network in _NOT_PUBLIC_IPV4)
    if parsed.scope_id is not None:
        return False
    if parsed.ipv4_mapped is not None:
        return is_public_address(str(parsed.ipv4_mapped))
    if parsed in _NAT64:
        return is_public_address(str(ipaddress.IPv4Address(int(parsed) & 0xFFFF_FFFF)))
    return parsed in _GLOBAL_UNICAST_IPV6 and not any(parsed in network for network in _NOT_PUBLIC_IPV6)


# Not `ipaddress.is_global`: its results differ between patch releases of Python 3.11.
_NOT_PUBLIC_IPV4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/3",  # multicast and reserved
        "168.63.129.16/32",  # registered as public, but it is the metadata service of Azure hosts
    )
)
_GLOBAL_UNICAST_IPV6 = ipaddress.IPv6Network("2000::/3")
_NOT_PUBLIC_IPV6 = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments, with Teredo (2001::/32)
        "2001:db8::/32",
        "2002::/16",  # 6to4: packets go to the embedded IPv4 address
        "3fff::/20",
    )
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
