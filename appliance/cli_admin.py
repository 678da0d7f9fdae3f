"""Commands about trust, API keys and configuration, and the two that start other parts of Solocard."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from appliance.cli_output import Output
from appliance.config import Config
from appliance.errors import UsageError
from appliance.keys import list_keys, new_key, revoke_key
from appliance.roots import add_root, read_root
from appliance.trial import child_command, child_environment


def trust_add(args: argparse.Namespace, out: Output) -> int:
    """``solocard trust add ROOT.json``: shows the fingerprint, asks, then trusts."""
    root = read_root(args.root)
    question = [
        f"root version {root.version}, valid until {root.signed.expires:%Y-%m-%d}",
        f"fingerprint {root.fingerprint}",
        "Compare it with the one you were given on another way (paper, telephone).",
    ]
    if args.reset:
        question.append("--reset forgets the root trusted so far and every version floor; models signed under it "
                        "can no longer be served.")  # fmt: skip
    if not args.yes:
        _ask(question)
    changed = add_root(args.home, root, args.root, reset=args.reset)
    verb = "trusted from now on" if changed else "trusted already"
    data = {"version": root.version, "fingerprint": root.fingerprint, "changed": changed}
    out.result("trust", [f"{verb}: root version {root.version}, fingerprint {root.fingerprint}"], data)
    return 0


def key_new(args: argparse.Namespace, out: Output) -> int:
    """``solocard key new NAME [--tenant T]``: the only time the key is shown."""
    token = new_key(args.home, args.name, args.tenant)
    if not out.as_json:
        print("Keep this key; only its SHA-256 is stored and it cannot be shown again.", file=sys.stderr)
    out.result("key", [token], {"name": args.name, "tenant": args.tenant, "key": token})
    return 0


def key_list(args: argparse.Namespace, out: Output) -> int:
    """``solocard key list``"""
    keys = list_keys(args.home)
    lines = [f"{key.name:32} {key.created}  tenant {key.tenant}" for key in keys]
    data = {"keys": [{"name": key.name, "created": key.created, "tenant": key.tenant} for key in keys]}
    out.result("key", lines or ["no API keys; make one with `solocard key new NAME`"], data)
    return 0


def key_revoke(args: argparse.Namespace, out: Output) -> int:
    """``solocard key revoke NAME``"""
    revoke_key(args.home, args.name)
    out.result("key", [f"revoked {args.name}"], {"name": args.name})
    return 0


def config_show(args: argparse.Namespace, out: Output) -> int:
    """``solocard config show``: every setting, its value, unit and where it comes from."""
    rows = Config.load(args.home).rows()
    lines = [f"# {args.home / 'config.yaml'}: settings go below their section's name"]
    section = ""
    for row in rows:
        name, key = row["key"].split(".")
        if name != section:
            section = name
            lines.append(f"{name}:")
        value = str(row["value"]).lower() if isinstance(row["value"], bool) else row["value"]
        origin = "default" if row["source"] == "default" else "config.yaml"
        unit = f"{row['unit']}; " if row["unit"] else ""
        lines.append(f"  {f'{key}: {value}':34} # {origin}; {unit}{row['about']}")
    out.result("config", lines, {"settings": rows})
    return 0


def serve(args: argparse.Namespace, out: Output) -> int:
    """``solocard serve …`` becomes `solocard-serve …`."""
    return _become(args.home, "solocard-serve", ["runtime", "serve"], args.arguments)


def console(args: argparse.Namespace, out: Output) -> int:
    """``solocard console …`` becomes `solocard-console …`."""
    return _become(args.home, "solocard-console", ["ui"], args.arguments)


def _become(home: Path, script: str, module: list[str], arguments: list[str]) -> int:
    """Replace this process: by the script beside this interpreter, else by the module."""
    beside = Path(sys.executable).parent / script
    command = [str(beside), *arguments] if beside.exists() else child_command(*module, *arguments)
    os.execve(command[0], command, child_environment(home))  # noqa: S606 - no shell; never returns


def _ask(question: list[str]) -> None:
    """UsageError unless a person at the terminal types yes."""
    print("\n".join(question), file=sys.stderr)
    if not sys.stdin.isatty():
        raise UsageError("nobody is there to confirm the fingerprint; compare it, then run this again with --yes")
    print("Type yes to trust it: ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() != "yes":
        raise UsageError("not confirmed; nothing was changed")
