"""docs/http-api.md: its examples run, its error codes and limits are the code's."""

import re
from pathlib import Path

import pytest
from serve_live import KEY, live
from serve_support import FakeEngine, spell

from appliance.kv_words import MEANING
from runtime.chat.content import MAX_MESSAGES, ROLES
from runtime.chat.encoding import DIALECTS
from runtime.sampler import MAX_STOP_CHARS, MAX_STOP_STRINGS
from runtime.server import limits

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/http-api.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    with live(tmp_path_factory.mktemp("h"), FakeEngine(spell("x</think>`solocard rollback`"))) as server:
        yield server


def test_the_sdk_example_runs(toy, capsys) -> None:
    [code] = [text for kind, text in BLOCKS if kind == "python"]
    code = code.replace("http://127.0.0.1:8017/v1", toy.base_url).replace("sk-solo-YOUR-KEY", KEY)
    scope: dict = {}
    exec(code, scope)  # noqa: S102 - our own page
    scope["client"].close()
    printed = capsys.readouterr().out
    assert printed.startswith("x`solocard rollback`\n")
    assert printed.endswith(" answered\n")


def test_the_curl_examples_run(toy) -> None:
    commands = [text for kind, text in BLOCKS if kind == "sh"]
    assert len(commands) == 2
    for command in commands:
        path = re.search(r"http://127\.0\.0\.1:8017(\S+)", command).group(1)
        body = re.search(r"-d '(.*?)'", command, re.DOTALL).group(1)
        status, headers, answer = toy.request("POST", path, body.encode())
        assert status == 200
        if "-sN" in command:
            assert headers["content-type"].startswith("text/event-stream")
            assert answer.endswith(b"data: [DONE]\n\n")
        else:
            assert answer["choices"][0]["message"]["content"] == "`solocard rollback`"


def test_every_error_code_is_on_the_page_and_none_else() -> None:
    source = "".join(path.read_text() for path in [*ROOT.glob("runtime/**/*.py")])
    raised = set(re.findall(r'code="(\w+)"', source))
    listed = set(re.findall(r"^\| \d{3} \| `(\w+)` \|", PAGE, re.MULTILINE))
    assert raised == listed


def test_every_reason_of_a_miss_is_on_the_page_and_none_else() -> None:
    table = PAGE.partition("## What the KV cache finds")[2].partition("## ")[0]
    listed = set(re.findall(r"^\| `([a-z-]+)(?:: FIELDS)?` \|", table, re.MULTILINE))
    source = "".join((ROOT / f"runtime/{name}.py").read_text() for name in ("run", "kv/lookup", "kv/store"))
    assert listed == set(MEANING)
    assert {reason for reason in MEANING if f'"{reason}' in source} == listed


def test_the_numbers_on_the_page_are_the_code_s() -> None:
    [messages] = [line for line in PAGE.splitlines() if line.startswith("| `messages` |")]
    assert f"1 to {MAX_MESSAGES:,};" in messages
    assert all(f"`{role}`" in messages for role in ROLES)
    assert f"up to {MAX_STOP_STRINGS}, each at most {MAX_STOP_CHARS} characters" in PAGE
    assert f"depth {limits.MAX_JSON_DEPTH}, {limits.MAX_JSON_CONTAINERS:,} objects and lists" in PAGE
    assert f"{limits.MAX_HEADER_BYTES >> 10} KiB, within {limits.HEADER_TIMEOUT_S:g} s of connecting" in PAGE
    assert f"| connections | {limits.MAX_CONNECTIONS} |" in PAGE
    assert limits.Limits().keep_alive_s <= 15
    for name, dialect in DIALECTS.items():
        assert f"| `{name}` | {', '.join(f'`{effort}`' for effort in ('none', *dialect.efforts))} |" in PAGE
