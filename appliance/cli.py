"""The ``solocard`` command: what an installer and an administrator do on the machine that serves."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from appliance import cli_admin, cli_kv, cli_models
from appliance.cli_output import Output
from appliance.config import home
from appliance.errors import SolocardError
from appliance.store import disk_errors
from appliance.wire import TENANT_DEFAULT

DESCRIPTION = """\
Solocard serves DeepSeek-V4-Flash from one machine that has no way to the internet. A model arrives as a signed
bundle, for example on a USB stick; it is installed only when every byte leads to a key this machine was told to
trust, and it becomes current only after it has given the answers its maker recorded.

first day:
  solocard trust add root.json         trust the people who sign your bundles (compare the fingerprint)
  solocard install /media/stick/model  verify, copy, try, switch
  solocard key new my-app              an API key for an application
  solocard serve                       OpenAI-compatible HTTP on 127.0.0.1:8017
later:
  solocard status | list               what is served, what is installed
  solocard install …  | rollback       the next model, and back again
  solocard verify --full               read every byte of the current model again
  solocard kv stats                    the KV cache: how full, how useful, and why prompts miss
  solocard console                     the same in a terminal screen
"""
EPILOG = """\
Everything lies below SOLOCARD_HOME (now {home}); `solocard config show` lists every setting.
Every command takes --json: one JSON object per line, the last with "done": true.
exit codes: 0 done, 2 usage, 4 bundle damaged, 5 not trusted, 6 own state damaged, 7 busy, 8 no space, 9 trial failed.
"""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; each command sets ``run(args, out) -> exit code``."""
    parser = argparse.ArgumentParser(
        prog="solocard", description=DESCRIPTION, epilog=EPILOG.format(home=home()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--home", type=Path, default=None, metavar="DIR", help="use DIR instead of SOLOCARD_HOME")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _model_commands(commands)
    _trust_commands(commands)
    _key_commands(commands)
    _kv_commands(commands)
    config = _group(commands, "config", "show the configuration")
    _command(config, "show", cli_admin.config_show, "every setting with its value, unit and source")
    for name, run, about in (
        ("serve", cli_admin.serve, "start the server with the current model (arguments go to solocard-serve)"),
        ("console", cli_admin.console, "open the terminal console (arguments go to solocard-console)"),
    ):
        command = commands.add_parser(name, help=about, description=about, add_help=False, prefix_chars="\0")
        command.add_argument("arguments", nargs=argparse.REMAINDER)
        command.set_defaults(run=run, json=False)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; its exit code. Errors are one line on stderr."""
    args = build_parser().parse_args(argv)
    args.home = (args.home or home()).absolute()
    out = Output(args.json)
    try:
        with disk_errors(args.home):
            code: int = args.run(args, out)
            sys.stdout.flush()
    except SolocardError as error:
        out.error(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nsolocard: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code


def _model_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = _command(commands, "install", cli_models.install, "verify, copy, try and switch to a signed bundle")
    command.add_argument("directory", type=Path, metavar="DIRECTORY", help="the bundle, e.g. on a mounted stick")
    _command(commands, "rollback", cli_models.rollback, "go back to the previous model")
    command = _command(commands, "activate", cli_models.activate, "make an installed bundle current")
    command.add_argument("bundle_id", metavar="BUNDLE_ID", help="as `solocard list` prints it")
    _command(commands, "list", cli_models.list_bundles, "installed bundles")
    command = _command(commands, "verify", cli_models.verify, "check an installed bundle against its signatures")
    command.add_argument("bundle_id", nargs="?", default="", metavar="BUNDLE_ID", help="default: the current one")
    command.add_argument("--full", action="store_true", help="read every byte")
    command = _command(commands, "remove", cli_models.remove, "delete an installed bundle and free its space")
    command.add_argument("bundle_id", metavar="BUNDLE_ID", help="neither current nor previous")
    _command(commands, "status", cli_models.status, "the server, the models and the trusted root at a glance")


def _trust_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    trust = _group(commands, "trust", "say whose bundles this machine installs")
    command = _command(trust, "add", cli_admin.trust_add, "trust the signers that a root.json names")
    command.add_argument("root", type=Path, metavar="ROOT.json", help="from the people who sign your bundles")
    command.add_argument("--yes", action="store_true", help="do not ask: the fingerprint has been compared")
    command.add_argument("--reset", action="store_true", help="forget the root and the version floors of before")


def _key_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    key = _group(commands, "key", "API keys of applications")
    command = _command(key, "new", cli_admin.key_new, "make a key and show it once")
    command.add_argument("name", metavar="NAME", help="who uses it, e.g. my-app")
    command.add_argument("--tenant", default=TENANT_DEFAULT, metavar="T",
                         help="whose KV cache its requests use; keys of different tenants share nothing "
                              "(default %(default)s)")  # fmt: skip
    _command(key, "list", cli_admin.key_list, "names of the keys")
    command = _command(key, "revoke", cli_admin.key_revoke, "forget a key")
    command.add_argument("name", metavar="NAME", help="as `solocard key list` prints it")


def _kv_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    kv = _group(commands, "kv", "the KV cache on disk")
    _command(kv, "stats", cli_kv.stats, "how full it is, what it holds, how often it helps, and why not more often")
    _command(kv, "verify", cli_kv.verify, "read and authenticate every record; exit code 6 where one is damaged")
    command = _command(kv, "purge", cli_kv.purge, "destroy a tenant's key: what it stored can never be read again")
    command.add_argument("tenant", metavar="TENANT", help="as `solocard kv stats` prints it")
    command.add_argument("--yes", action="store_true", help="do not ask")
    command = _command(kv, "export-trace", cli_kv.export_trace, "write the request log as a trace, without any text")
    command.add_argument("out", type=Path, metavar="OUT.jsonl", help="a file that does not exist yet")
    command.add_argument("--since", type=cli_kv.since, metavar="AGE", help="only the newest, e.g. 90m, 12h, 7d, 2w")
    command = _command(kv, "share", cli_kv.share, "let all tenants share what is stored of one system prompt")
    command.add_argument("file", type=Path, metavar="FILE", help="the system prompt's text, as requests send it")
    command.add_argument("--remove", action="store_true", help="take the approval back")


def _group(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, about: str
) -> argparse._SubParsersAction[argparse.ArgumentParser]:
    group = commands.add_parser(name, help=about, description=about)
    return group.add_subparsers(dest=f"{name}_command", metavar="COMMAND", required=True)


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace, Output], int],
    about: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=about, description=about)
    command.add_argument("--json", action="store_true", help="print JSON lines")
    command.set_defaults(run=run)
    return command


if __name__ == "__main__":
    sys.exit(main())
