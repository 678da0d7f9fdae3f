"""README and docs under test: links lead somewhere, examples parse, every command is written down."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import appliance.cli
import exporter.__main__
import runtime.__main__
import ui.__main__

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")


class CapturedError(Exception):
    """Carries a parser out of a main()."""


def parser_of(main) -> argparse.ArgumentParser:
    """The parser that ``main`` builds, taken when it starts to parse."""

    def capture(self, *_):
        raise CapturedError(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", capture)
        with pytest.raises(CapturedError) as caught:
            main([])
    return caught.value.args[0]


PARSERS = {
    "solocard": parser_of(appliance.cli.main),
    "solocard-export": parser_of(exporter.__main__.main),
    "solocard-serve": parser_of(runtime.__main__.main),
    "solocard-console": parser_of(ui.__main__.main),
}


def commands(parser: argparse.ArgumentParser, name: str) -> Iterator[str]:
    """Full names of all commands below a parser, e.g. "solocard trust add"."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield name
    for group in groups:
        for word, inner in group.choices.items():
            yield from commands(inner, f"{name} {word}")


ALL_COMMANDS = [
    *commands(PARSERS["solocard"], "solocard"), *commands(PARSERS["solocard-export"], "solocard-export"),
    "solocard-serve", "solocard-console", "packaging/demo", "packaging/check",
]  # fmt: skip


def test_the_commands_are_found():
    assert {"solocard install", "solocard trust add", "solocard-export keys new"} <= set(ALL_COMMANDS)


@pytest.mark.parametrize("command", ALL_COMMANDS)
def test_every_command_is_written_down(command):
    text = " ".join(" ".join(page.read_text("utf-8").split()) for page in PAGES if page.name != "CHANGELOG.md")
    assert re.search(rf"(?<![\w-]){re.escape(command)}(?![\w-])", text)


def example_commands() -> list[str]:
    lines = [line for page in PAGES for block in SHELL.findall(page.read_text("utf-8")) for line in block.splitlines()]
    ours = [line.partition("  #")[0].strip() for line in lines]
    return sorted({line for line in ours if line.split(" ")[0] in PARSERS and not set(line) & set("|…<>&;")})


def test_there_are_examples():
    assert len(example_commands()) >= 8


@pytest.mark.parametrize("line", example_commands())
def test_every_example_parses(line):
    program, *arguments = shlex.split(line)
    if program == "solocard-serve":
        arguments = ["serve", *arguments]
    assert PARSERS[program].parse_args(arguments) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    broken = []
    for target in LINK.findall(page.read_text("utf-8")):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        linked = (page.parent / path) if path else page
        if not linked.exists() or (anchor and anchor not in anchors(linked.read_text("utf-8"))):
            broken.append(target)
    assert broken == []


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings: lower case, words joined by hyphens."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


def test_the_readme_leads_to_every_document():
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in LINK.findall(README) if ":" not in target}
    missing = {page.resolve() for page in (ROOT / "docs").glob("*.md")} - linked
    assert missing == set()
    assert (ROOT / "docs" / "adr").resolve() in linked


def test_the_folder_tree_is_the_real_one():
    (tree,) = re.findall(r"^```\n(appliance/ .*?)^```", README, re.MULTILINE | re.DOTALL)
    top, wrong = "", []
    for line in tree.splitlines():
        for indent, name in re.findall(r"(^|^  |\s{2,})(\w+)/", line):
            if not indent:
                top = name
            folder = ROOT / name if not indent else ROOT / top / name
            wrong += [] if folder.is_dir() else [str(folder)]
    assert wrong == []
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and (path.name[0] != ".")} - {"build", "dist"}
    assert {f for f in folders if any((ROOT / f).rglob("*.py"))} <= set(re.findall(r"^(\w+)/", tree, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_examples_compile(page):
    blocks = PYTHON.findall(page.read_text("utf-8"))
    assert all(compile(block, f"{page.name}:example", "exec") for block in blocks)


def test_the_readme_quotes_what_the_scripts_print():
    check = (ROOT / "packaging" / "steps" / "check.py").read_text("utf-8")
    demo = (ROOT / "packaging" / "steps" / "demo.py").read_text("utf-8")
    assert "torch suite not run (N tests)" in README
    assert 'say(f"torch suite not run (' in check
    (line,) = [line for line in README.splitlines() if line.startswith("bundle      ")]
    assert line in demo


def test_the_readme_quotes_the_quality_page():
    (claims,) = re.findall(r"- \*\*The real model.*?(?=\n- )", README, re.DOTALL)
    quality = (ROOT / "docs" / "quality.md").read_text("utf-8")
    claimed = set(re.findall(r"\d+ of \d+ \([\d.]+ %\)|\d\.\d{2,3}|\d+ minutes", claims))
    assert len(claimed) >= 7
    assert {number for number in claimed if number not in quality} == set()
