"""Everything a change must pass: ruff, mypy --strict, the import rules, and the tests.

usage: packaging/check [--torch] [--yes] [-- PYTEST ARGUMENTS]

Works in the same .venv as packaging/demo, which it makes where there is none; the tools are pinned in pyproject.toml.
Every step runs even if one before it failed; the summary names what failed.

  --torch   also the tests of reference, training and parity, which need torch and transformers
  --yes     fetch these where they are missing, without asking back

exit codes: 0 all passed, 1 something failed, 3 something is missing on this machine.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import environment
from environment import PYTHON, ROOT, SetupError
from progress import say

IMPORT_LINTER = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
PYTEST = ["-m", "pytest", "-q", "--durations=15"]


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(
        prog="packaging/check", usage=argparse.SUPPRESS, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--torch", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--yes", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("pytest", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        environment.check_machine()
        say("environment")
        environment.ensure_product()
        environment.ensure_group("check")
        if args.torch:
            _ensure_torch(args.yes)
    except SetupError as error:
        print(f"packaging/check: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("\npackaging/check: interrupted; run it again to go on", file=sys.stderr)
        return 130
    return _run_all(_steps(args.torch, args.pytest), args.torch)


def _steps(torch: bool, more: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(name, arguments of Python) of every step, the quick ones first."""
    yield "ruff", ["-m", "ruff", "check", "."]
    yield "mypy --strict", ["-m", "mypy"]
    yield "import rules", ["-c", IMPORT_LINTER]
    yield "pytest", [*PYTEST, "-m", "not torch and not slow", *more]
    if torch:
        yield "pytest, torch", [*PYTEST, "-m", "torch and not slow", *more]


def _run_all(steps: Iterator[tuple[str, list[str]]], torch: bool) -> int:
    results: list[tuple[str, int, float]] = []
    for name, arguments in steps:
        say(f"\n== {name}")
        started_s = time.monotonic()
        try:
            done = subprocess.run([PYTHON, *arguments], cwd=ROOT, env=environment.clean_environment(), check=False)
        except KeyboardInterrupt:
            print(f"\npackaging/check: interrupted in {name}", file=sys.stderr)
            return 130
        results.append((name, done.returncode, time.monotonic() - started_s))
    say("\n== summary")
    for name, code, elapsed_s in results:
        say(f"  {'passed' if code == 0 else f'FAILED ({code})':12} {name:16} {elapsed_s:7.1f} s")
    failed = [name for name, code, _ in results if code]
    say(f"{len(results) - len(failed)} of {len(results)} passed" + (f"; failed: {', '.join(failed)}" if failed else ""))
    if not torch:
        say(f"torch suite not run ({count_torch_tests(ROOT / 'tests')} tests)")
    return 1 if failed else 0


def _ensure_torch(yes: bool) -> None:
    wanted = environment.project()["dependency-groups"]["torch-check"]
    missing = [pin for pin in wanted if not environment.has_pin(pin)]
    if missing and not yes:
        raise SetupError(
            f"--torch needs {', '.join(missing)} in .venv and what these depend on; --yes fetches them.\n"
            "  torch is about 200 MB in its CPU build and several GB with CUDA; pip's own settings decide which it "
            "finds."
        )
    environment.ensure_group("torch-check")


def count_torch_tests(tests: Path) -> int:
    """Test functions marked torch, by themselves or by their module: read from the sources, since modules that need
    torch cannot be collected without it."""
    return sum(_torch_tests_in(ast.parse(path.read_text("utf-8"))) for path in sorted(tests.rglob("test_*.py")))


def _torch_tests_in(module: ast.Module) -> int:
    whole = any(
        isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node.targets[0]) and _is_torch(node.value)
        for node in module.body
    )
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    tests = [n for n in ast.walk(module) if isinstance(n, functions) and n.name.startswith("test_")]
    return sum(whole or any(_is_torch(mark) for mark in test.decorator_list) for test in tests)


def _is_torch(node: ast.expr) -> bool:
    return "pytest.mark.torch" in ast.unparse(node)


if __name__ == "__main__":
    sys.exit(main())
