"""What a process asks of the network and of the file system, seen by strace.

A trace line is ``PID call(…`` with the address in it, or ``PID <... call resumed>…`` without one.
"""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
from pathlib import Path

import pytest

NETWORK = ("connect", "bind", "sendto", "sendmsg", "sendmmsg")
_LOCAL_FAMILIES = ("AF_UNIX", "AF_NETLINK", "AF_UNSPEC")
_FAMILY = re.compile(r"sa_family=(\w+)")
_ADDRESS = re.compile(r'inet_(?:addr\("|pton\(AF_INET6, ")([^"]+)"')
_PORT = re.compile(r"sin6?_port=htons\((\d+)\)")
_CALL = re.compile(r"^\d+ +(\w+)\(")
_DNS_PORTS = ("53", "853", "5353", "5355")


STRACE = shutil.which("strace")


def need_strace() -> str:
    """The tool; where it is missing a test is skipped, and fails where CI is set: there it must have been looked at."""
    if STRACE is None:
        give_up = pytest.fail if os.environ.get("CI") else pytest.skip
        give_up("strace is not installed (`apt-get install strace`): nobody watched the network calls")
    return STRACE


def strace(out: Path, *calls: str) -> list[str]:
    """Command prefix that writes these system calls of a process and all its children to ``out``."""
    wanted = f"trace={','.join(calls)}"
    return [need_strace(), "-f", "-qq", "-s", "4096", "-e", wanted, "-e", "signal=none", "-o", str(out)]


def calls(trace: str, *names: str) -> list[str]:
    """The lines that begin one of these calls."""
    return [line for line in trace.splitlines() if (match := _CALL.match(line)) and match[1] in names]


def leaving(trace: str) -> list[str]:
    """Every line that names an address outside this machine, or asks a name server (also one on loopback)."""
    return [line for line in calls(trace, *NETWORK) if not _local(line)]


def _local(line: str) -> bool:
    families, addresses = _FAMILY.findall(line), _ADDRESS.findall(line)
    internet = [family for family in families if family not in _LOCAL_FAMILIES]
    if len(internet) > len(addresses) or set(_PORT.findall(line)) & set(_DNS_PORTS):
        return False
    return all(ipaddress.ip_address(address).is_loopback for address in addresses)
