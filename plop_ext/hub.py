"""Access to the Hugging Face hub that fails at once if the hub cannot be reached."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def hub_reachable() -> bool:
    """Return whether the hub's host name resolves; behind a proxy, which resolves names itself, return True."""
    if any(os.environ.get(name) for name in _PROXIES):
        return True
    host = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


@contextmanager
def cached_when_offline() -> Iterator[bool]:
    """Answer hub requests within the block from the local cache if the hub cannot be reached.

    Otherwise every request would be retried for 23 s, with a line of output for each attempt.

    Yields:
        Whether the hub can be reached.
    """
    if hub_reachable():
        yield True
        return
    import huggingface_hub

    # datasets keeps a copy of its own, if whoever asks for data has imported it.
    places: tuple[Any, ...] = (huggingface_hub.constants, sys.modules.get("datasets.config"))
    places = tuple(place for place in places if place is not None)
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield False
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value
