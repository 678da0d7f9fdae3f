"""``solocard-export``: from DeepSeek's official V4-Flash checkpoint to a signed bundle."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence

from appliance.errors import SolocardError, SpaceError, UsageError
from exporter import build, parity, pipeline, rank, sample, signing, student
from exporter.distill import command as distill
from exporter.evaluate import command as evaluate
from exporter.observe import command as observe
from exporter.plan import command as plan
from exporter.quantize import command as quantize

ABOUT = """From DeepSeek's official V4-Flash checkpoint to a signed bundle for machines without internet.

a first round, with random weights:
  solocard-export sample ckpt --preset tiny       a small checkpoint in the official format
  solocard-export build ckpt bundle --encoding dsv4-0731
  solocard-export keys new desk                   signing keys, kept on this side of the air gap
  solocard-export sign bundle --keys desk         the bundle can now be installed where desk/root.json is trusted
checks:
  solocard-export parity bundle                   the serving engine against the torch reference (needs torch)
  solocard-export logits bundle --ids ids.npy --out logits.npy
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; an error is one line on stderr and its class's exit code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads that spin cost five times the work
    parser = argparse.ArgumentParser(
        prog="solocard-export", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    sample.add_command(commands)
    plan.add_commands(commands)
    build.add_command(commands)
    evaluate.add_commands(commands)
    observe.add_command(commands)
    rank.add_command(commands)
    distill.add_command(commands)
    quantize.add_command(commands)
    pipeline.add_command(commands)
    parity.add_commands(commands)
    student.add_command(commands)
    signing.add_commands(commands)
    args = parser.parse_args(argv)
    try:
        code = int(args.func(args))
        sys.stdout.flush()
        return code
    except SolocardError as error:
        return _refused(error)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        return _refused(_path_error(error, args.command))
    except KeyboardInterrupt:
        print("solocard: interrupted; run the same command again to go on", file=sys.stderr)
        return 130


def _refused(error: SolocardError) -> int:
    print(f"solocard: {error}", file=sys.stderr)
    return error.exit_code


def _path_error(error: OSError, command: str) -> SolocardError:
    """A full disk, a folder where a file belongs, a file where a folder belongs, a folder nobody may write."""
    where, what = error.filename2 or error.filename or command, error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SpaceError(f"{where}: {what}; free some space and run the same command again")
    return UsageError(f"{where}: {what}; name another path, or mend its kind or permissions, and run it again")


if __name__ == "__main__":
    sys.exit(main())
