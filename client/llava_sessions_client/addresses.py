"""Tell this machine from others."""

from __future__ import annotations

import ipaddress

import httpx


def is_loopback(url: str) -> bool:
    """Return whether a URL is on this machine. No proxy can reach it."""
    host = httpx.URL(url).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
