"""``solocard kv`` beside a real server, and after it was killed: two tenants, a purge, a trace."""

from __future__ import annotations

import json
from collections.abc import Callable

from e2e_support import Appliance, complete, long_prompt

from appliance.wire import KvReport


def report(machine: Appliance) -> KvReport:
    return KvReport.from_dict(machine.told("kv", "stats"))


def test_two_tenants_a_purge_and_a_kill(new_appliance: Callable[[], Appliance]) -> None:
    machine = new_appliance()
    machine.start()
    ours = machine.client(machine.new_key())
    theirs = machine.client(machine.solocard("key", "new", "b", "--tenant", "team-b").stdout.strip())
    prompt = long_prompt("both")  # 2 whole blocks, and a rest
    cold, warm = complete(ours, prompt), complete(ours, prompt)
    assert (cold.hit, warm.hit) == (0, 512)
    assert complete(theirs, prompt).hit == 0  # another tenant's, so it is not there for them
    assert complete(theirs, prompt).hit == 512

    live = report(machine)
    assert (live.live, live.status.writing) == (True, True)
    assert live.status.hits == 2
    assert {tenant.name: (tenant.blocks >= 2, tenant.checkpoints >= 1) for tenant in live.tenants} == {
        "default": (True, True), "team-b": (True, True),
    }  # fmt: skip
    assert live.logged_requests == 4
    assert live.logged_reasons == {"no-unit": 2}

    said = machine.solocard("kv", "purge", "team-b", "--yes").stdout
    assert "team-b: key destroyed in" in said
    again = complete(theirs, prompt)
    assert (again.hit, again.said) == (0, cold.said)
    assert complete(ours, prompt).hit == 512
    checked = machine.told("kv", "verify")
    assert (checked["damaged"], checked["purged_records"] >= 3, checked["records"] >= 6) == ([], True, True)

    machine.kill()
    stopped = report(machine)
    assert (stopped.live, stopped.problems) == (False, ())
    assert {tenant.name for tenant in stopped.tenants} == {"default", "team-b"}
    assert stopped.logged_requests == 6
    assert stopped.purged_bytes > 0
    out = machine.home / "trace.jsonl"
    told = machine.told("kv", "export-trace", out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert told["requests"] == len(rows) == 4  # those of the tenant that was purged are left out
    assert [row["hash_ids"][:2] for row in rows].count([0, 1]) == 3
    assert "used" in machine.solocard("kv", "stats").stdout
