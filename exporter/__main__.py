"""``solocard-export``: from DeepSeek's official V4-Flash checkpoint to a signed bundle.

    sample    write a small random checkpoint in the official format, to try everything with
    build     turn a checkpoint into an unsigned bundle
    parity    compare a bundle's engine with the torch reference
    logits    the engine's logits for given token ids
    keys      make signing keys
    sign      sign a built bundle

Build and sign need no torch; parity does.
"""  # fmt: skip

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from appliance.errors import SolocardError
from exporter import build, parity, sample, signing


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; an error is one line on stderr and its class's exit code."""
    parser = argparse.ArgumentParser(
        prog="solocard-export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    sample.add_command(commands)
    build.add_command(commands)
    parity.add_commands(commands)
    signing.add_commands(commands)
    args = parser.parse_args(argv)
    try:
        return int(args.func(args))
    except SolocardError as error:
        print(f"solocard: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("solocard: interrupted; nothing half-written is left", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
