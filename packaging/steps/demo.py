"""From a fresh clone to a streamed answer: environment, checkpoint, bundle, signature, installation, server, question.

usage: packaging/demo [--fresh] [--ask QUESTION]

Everything lies in .venv and .demo; removing both undoes everything. What is done is not done again unless what it was
made from has changed, so a second run takes seconds and an interrupted one goes on. On a terminal the server keeps
running until Ctrl-C; without one (packaging/demo </dev/null) it is stopped and the exit code is 0.

  --fresh          remove .demo first
  --ask QUESTION   ask this instead
  SOLOCARD_PYTHON  the interpreter to use instead of python3.14 … python3.11, python3

Standard library only: nothing is installed yet when this starts.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import appliance_steps
import environment
import question
from environment import ROOT, SetupError
from progress import megabytes, say, tree_bytes
from server import Server

DEMO = ROOT / ".demo"
SHOWN_TOKENS = 160


def main() -> int:
    """0 after a streamed answer, 1 when a step failed, 3 when the machine lacks something, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="packaging/demo", usage=argparse.SUPPRESS, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--ask", metavar="QUESTION", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        environment.check_machine()
    except SetupError as error:
        print(f"packaging/demo: {error}", file=sys.stderr)
        return 3
    try:
        return _run(args.fresh, args.ask)
    except SetupError as error:
        print(f"packaging/demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\npackaging/demo: interrupted; run it again to go on", file=sys.stderr)
        return 130


def _run(fresh: bool, asked: str | None) -> int:
    started_s = time.monotonic()
    if fresh:
        _remove_demo()
    DEMO.mkdir(mode=0o700, exist_ok=True)
    demo = appliance_steps.Demo(DEMO)
    with _alone(DEMO / "lock"):
        say("environment")
        environment.ensure_product()
        say(f"checkpoint  {demo.checkpoint_note}")
        demo.make_checkpoint()
        say("bundle      from the checkpoint: weights, graph, golden tokens; signed; installed with every byte checked")
        bundle_id = demo.make_bundle()
        demo.install(bundle_id)
        say("server")
        server = Server.running(demo.home) or Server.start(demo.home)
    with contextlib.closing(server):
        key = demo.api_key(server.port)
        text = asked or demo.question
        say(f"\nyou   {text}")
        say("model ")
        answer = question.ask(server.port, key, text, SHOWN_TOKENS if demo.trained else SHOWN_TOKENS // 4)
        say(f"\n{answer.summary()}")
        if not demo.trained:
            say("These words are noise: the sample checkpoint has random weights. Everything else is the real path.")
        sizes = f".venv {megabytes(tree_bytes(environment.VENV))}, .demo {megabytes(tree_bytes(DEMO))} on disk"
        say(f"{time.monotonic() - started_s:.1f} s altogether; {sizes}")
        say(_next_steps(demo, server))
        if sys.stdin.isatty() and sys.stdout.isatty():
            say("\nServing until Ctrl-C." if server.ours else "\nThis server was running before and goes on.")
            server.wait()
    return 0


def _remove_demo() -> None:
    if Server.running(DEMO / "home"):
        raise SetupError("a server of .demo is running; stop it (Ctrl-C in its terminal), then use --fresh")
    shutil.rmtree(DEMO, ignore_errors=True)


def _next_steps(demo: appliance_steps.Demo, server: Server) -> str:
    key_file = demo.key_file.relative_to(ROOT)
    home = demo.home.relative_to(ROOT)
    url = f"http://127.0.0.1:{server.port}/v1"
    return f"""
What next, from {ROOT}
  serve again   packaging/demo            (on a terminal it serves until Ctrl-C)
  console       .venv/bin/solocard --home {home} console
  status        .venv/bin/solocard --home {home} status
  curl          curl -sN {url}/chat/completions -H "Authorization: Bearer $(cat {key_file})" -d \\
                  '{{"messages": [{{"role": "user", "content": "Which bundles do I have?"}}], "stream": true,
                    "thinking": {{"type": "disabled"}}, "max_tokens": 80}}'
  OpenAI SDK    OpenAI(base_url="{url}", api_key=open("{key_file}").read())
  remove it     rm -r .venv .demo"""


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One demo prepares this folder at a time; the kernel lets go of the lock with the process."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SetupError(f"another packaging/demo is at work in {DEMO}; wait for it") from None
        yield


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
