"""Who is asking: bearer keys, default-deny, and the Host header as a guard against DNS rebinding."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from appliance.errors import RequestError
from appliance.wire import TENANT_DEFAULT


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: the name of the key, and the tenant whose KV cache the request uses."""

    name: str
    tenant: str = TENANT_DEFAULT


NOBODY = Caller("-")  # on the paths that need no key
KeyCheck = Callable[[str], Caller | None]  # token → whose key it is, None when there is no such key
OPEN_PATHS = frozenset({"/health"})
MAX_KEY_CHARS = 256
_HELP = "send a key as `Authorization: Bearer …`; `solocard key new NAME` makes one"


def is_loopback(host: str) -> bool:
    """Whether ``host`` (a name or an address) can only mean this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_host(headers: Mapping[bytes, bytes]) -> None:
    """Raises RequestError 403 unless the Host header names this machine (a web page's rebound name does not)."""
    host = headers.get(b"host", b"").decode("latin-1")
    name = host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]
    if not is_loopback(name):
        raise RequestError(
            "the Host header does not name this machine; use 127.0.0.1 or localhost",
            status=403, code="host_not_allowed", kind="permission_error",
        )  # fmt: skip


def identify(path: str, headers: Mapping[bytes, bytes], verify: KeyCheck) -> Caller:
    """Who is asking, ``NOBODY`` on open paths. Raises RequestError 401; the message never repeats the key."""
    if path in OPEN_PATHS:
        return NOBODY
    token = _token(headers)
    if not token:
        raise _unauthorized(f"no API key; {_HELP}")
    caller = verify(token) if len(token) <= MAX_KEY_CHARS else None
    if caller is None:
        raise _unauthorized(f"this API key is not known here; {_HELP}")
    return caller


def header_map(raw: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Lower-case names as ASGI gives them; the first of two equal names counts."""
    headers: dict[bytes, bytes] = {}
    for name, value in raw:
        headers.setdefault(name, value)
    return headers


def _token(headers: Mapping[bytes, bytes]) -> str:
    scheme, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get(b"x-api-key", b"").decode("latin-1").strip()


def _unauthorized(message: str) -> RequestError:
    return RequestError(message, status=401, code="invalid_api_key", kind="authentication_error")
