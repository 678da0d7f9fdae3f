"""``solocard-console``: the console on this terminal."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from appliance.config import home
from appliance.errors import SolocardError, UsageError
from appliance.wire import ADMIN_SOCKET

DESCRIPTION = """\
Watch and manage one Solocard appliance from this terminal.

The console reads from the running server (SOLOCARD_HOME/run/admin.sock) and acts by running
`solocard ... --json`; it shows each command it runs. It works while the server is down.
Keys: F1 overview, F2 models, F3 logs, F4 cache, ? help, q quit."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse ``arguments``, check the terminal, run the console; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        return run_console(options)
    except SolocardError as error:
        print(f"solocard-console: {error}", file=sys.stderr)
        return error.exit_code


def parser() -> argparse.ArgumentParser:
    built = argparse.ArgumentParser(
        prog="solocard-console", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    built.add_argument("--home", type=Path, metavar="DIR", help="the appliance's folder (default: SOLOCARD_HOME)")
    built.add_argument("--ascii", action="store_true", help="draw with ASCII only (serial lines, old terminals)")
    built.add_argument(
        "--replay", type=Path, metavar="FILE.jsonl", help="play recorded status lines instead of reading the server"
    )
    return built


def run_console(options: argparse.Namespace) -> int:
    """Raises UsageError where there is no terminal, no textual or no readable recording."""
    from ui.backend import ConsoleBackend, SocketBackend, read_replay
    from ui.terminal import detect

    where = options.home.absolute() if options.home else home()
    socket_path = where / ADMIN_SOCKET
    backend: ConsoleBackend = read_replay(options.replay) if options.replay else SocketBackend(socket_path)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("the console needs a terminal; the same actions are commands: solocard --help")
    terminal = detect(os.environ, encoding=sys.stdout.encoding or "ascii", ascii_wanted=options.ascii)
    try:
        from ui.app import ConsoleApp
        from ui.context import Context
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is not installed; install solocard with its extra: console") from error
    for name in ("COLUMNS", "LINES"):  # some shells export them; the terminal itself knows better, also when resized
        os.environ.pop(name, None)
    ConsoleApp(Context(where, socket_path, backend, terminal)).run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
