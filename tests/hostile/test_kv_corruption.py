"""Every changed byte is found: a miss with its reason, no partial state, everything else served.

The only bytes of a record that may change unseen are the padding after its tag. A sealed segment's footer and trailer
hold no content: whatever happens to them, every record is still served, also by an index that is made again.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import struct

import pytest
from kv_corruption_support import PAGE_BYTES, Vault, flip, overwrite
from kv_fault_support import memory_folder
from kv_story_support import MASTER_KEY, look, open_faulty

from runtime.kv.tenants import Tenants

SEED = 31


@pytest.fixture(scope="module")
def vault():
    with memory_folder() as folder:
        yield Vault(folder, SEED)


def of_kind(vault, kind):
    found = [record for record in vault.records if record.kind == kind and (kind == "footer" or vault.what(record))]
    assert found
    return found


REGIONS = [
    "magic", "format", "kind", "cipher", "fingerprint_id", "tenant_id", "chain", "first_token", "end_token",
    "payload_bytes", "epoch", "place", "key_generation", "created_s", "role", "parent", "ciphertext start",
    "ciphertext middle", "ciphertext end", "tag", "padding",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["block", "checkpoint", "tail"])
def test_a_flip_in_any_region_is_found(vault, kind):
    rng, found = random.Random(kind), []
    for region in REGIONS:
        found += vault.check_flip(rng.choice(of_kind(vault, kind)), region, rng)
    assert found == []


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_flips_all_over(vault, part):
    """Every region of every record of the story."""
    rng, found = random.Random(part), []
    for record in [r for r in vault.records if vault.what(r)][part::8]:
        for region in record.regions:
            found += vault.check_flip(record, region, rng)
    assert found == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["block", "checkpoint", "tail"])
def test_every_bit_of_a_header_and_of_a_tag(vault, kind):
    rng, found = random.Random(kind), []
    record = rng.choice(of_kind(vault, kind))
    for name in ("header", "tag"):
        begin, end = (record.offset, record.offset + 128) if name == "header" else record.regions["tag"]
        for at in range(begin, end):
            flip(vault.copy() / record.path.name, at, rng.randrange(8))
            found += [f"{kind} byte {at - record.offset}: {problem}" for problem in vault.check(vault.what(record))]
    assert found == []


@pytest.mark.parametrize("index", ["kept", "lost"])
def test_a_flip_in_a_footer_or_trailer_changes_nothing(vault, index):
    rng, found = random.Random(index), []
    footer = of_kind(vault, "footer")[0]
    places = [rng.randrange(*footer.regions[region]) for region in footer.regions]
    trailer = footer.offset + footer.size_bytes
    for at in [*places, *range(trailer, trailer + 24, 3), trailer + PAGE_BYTES - 1]:
        flip(vault.copy() / footer.path.name, at, rng.randrange(8))
        if index == "lost":
            drop_index(vault.here)
        found += [f"byte {at - footer.offset} of the end: {problem}" for problem in vault.check(frozenset())]
    assert found == []


def drop_index(directory):
    for path in directory.glob("index.sqlite3*"):
        path.unlink()


@pytest.mark.parametrize("kind", ["block", "checkpoint", "tail"])
def test_a_flip_met_by_an_index_made_again(vault, kind):
    """The damaged record is served neither where it is known as damaged nor where it is not known any more."""
    rng, found = random.Random(kind), []
    for region in rng.sample(REGIONS[:-1], 7):
        record = rng.choice(of_kind(vault, kind))
        what = vault.flip_region(record, region, rng)
        drop_index(vault.here)
        lost = vault.what(record)
        found += [f"{what}: {problem}" for problem in vault.check(lost, ("corrupt", "no-unit", "evicted"))]
    assert found == []


def test_the_next_put_repairs_what_was_damaged(vault):
    """The same prefix written again is served in full, with the damaged record still in its file."""
    rng, found = random.Random("repair"), []
    for kind in ("block", "checkpoint", "tail"):
        record = rng.choice(of_kind(vault, kind))
        what = vault.flip_region(record, "tag", rng)
        found += vault.check(vault.what(record))
        found += [f"{what}, put again: {problem}" for problem in vault.put_again(vault.what(record))]
        found += [f"{what}, put again: {problem}" for problem in vault.check(frozenset())]
    assert found == []


# -- larger damage: (path, offset, bytes) that are no longer what they were


def torn(vault, rng, size_bytes, content):
    """A sector or page of a record other than what was written; returns what is lost."""
    record = rng.choice([r for r in vault.records if vault.what(r)])
    at = record.offset + rng.randrange(0, 128 + record.payload_bytes) // size_bytes * size_bytes
    overwrite(vault.copy() / record.path.name, at, content(rng, size_bytes))
    return vault.what(record)


CONTENTS = {
    "zeros": lambda rng, size_bytes: bytes(size_bytes),
    "junk": lambda rng, size_bytes: rng.randbytes(size_bytes),
}


@pytest.mark.parametrize("size_bytes", [512, 4096])
@pytest.mark.parametrize("content", CONTENTS)
def test_torn_sectors_and_pages(vault, size_bytes, content):
    rng, found = random.Random(f"{size_bytes} {content}"), []
    for _ in range(6):
        found += vault.check(torn(vault, rng, size_bytes, CONTENTS[content]))
    assert found == []


def after(vault, path, end):
    """What the records that end beyond ``end`` of a segment are."""
    return frozenset().union(*(vault.what(r) for r in vault.records
                               if r.path.name == path.name and r.offset + r.size_bytes > end))  # fmt: skip


@pytest.mark.parametrize("how", ["cut", "zeroed"])
def test_a_lost_end_of_a_segment(vault, how):
    rng, found = random.Random(how), []
    for _ in range(5):
        path = rng.choice(sorted(vault.origin.glob("*.kvs")))
        size = path.stat().st_size
        end = rng.choice([rng.randrange(size), rng.randrange(size) // PAGE_BYTES * PAGE_BYTES])
        lost = frozenset().union(*(vault.what(r) for r in vault.records if r.path.name == path.name
                                   and r.offset + 128 + r.payload_bytes + 16 > end))  # fmt: skip
        here = vault.copy() / path.name
        if how == "cut":
            os.truncate(here, end)
            lost |= after(vault, path, end // PAGE_BYTES * PAGE_BYTES)
        else:
            overwrite(here, end, bytes(size - end))
        found += [f"{path.name} {how} at {end} of {size}: {p}" for p in vault.check(lost)]
    assert found == []


def test_swapped_records(vault):
    """Each is authentic, and in the other's place."""
    rng, found = random.Random("swapped"), []
    for kind in ("block", "checkpoint"):
        for _ in range(3):
            first, second = rng.sample(of_kind(vault, kind), 2)
            here = vault.copy()
            overwrite(here / first.path.name, first.offset, raw(second))
            overwrite(here / second.path.name, second.offset, raw(first))
            found += vault.check(vault.what(first) | vault.what(second))
    assert found == []


def raw(record):
    return record.path.read_bytes()[record.offset : record.offset + record.size_bytes]


@pytest.fixture(scope="module")
def other():
    """Another store of the same machine that was told the same story: other secrets, other epochs."""
    with memory_folder() as folder:
        yield Vault(folder, SEED, secrets_seed="another")


def test_records_of_an_older_copy(vault, other):
    """Authentic once, at this very place, under other keys or another epoch."""
    rng, found = random.Random("replayed"), []
    places = {(r.path.name, r.offset, r.kind): r for r in other.records}
    for record in rng.sample([r for r in vault.records if vault.what(r)], 8):
        old = places[record.path.name, record.offset, record.kind]
        overwrite(vault.copy() / record.path.name, record.offset, raw(old))
        found += vault.check(vault.what(record))
    assert found == []


def test_segments_of_another_store(vault, other):
    found = []
    for path in sorted(vault.origin.glob("*.kvs"))[:4]:
        here = vault.copy()
        shutil.copy(other.origin / path.name, here / path.name)
        found += vault.check(after(vault, path, 0))
    assert found == []


@pytest.mark.parametrize("index", ["kept", "lost"])
def test_segments_renamed_among_each_other(vault, index):
    """Sealed files and their rows do not fit, so the index is made again: each record is where its segment now is."""
    here = vault.copy()
    first, second = sorted(here.glob("*.kvs"))[:2]
    assert first.stat().st_size != second.stat().st_size
    keep = first.with_suffix(".keep")
    first.rename(keep)
    second.rename(first)
    keep.rename(second)
    if index == "lost":
        drop_index(here)
    assert [p for p in vault.check(frozenset()) if "bad" in p or "seen" in p] == []


# -- index, tenants, master key


def index_flips(vault, count, rng):
    """Flip bits of the index, one a copy; (problems, how many flips cost a boundary)."""
    found, noticed, size = [], 0, (vault.origin / "index.sqlite3").stat().st_size
    for _ in range(count):
        at, bit = rng.randrange(size), rng.randrange(8)
        flip(vault.copy() / "index.sqlite3", at, bit)
        problems, reached = vault.served_right()
        found += [f"index byte {at} bit {bit}: {problem}" for problem in problems]
        noticed += reached < len(vault.lookups())
    return found, noticed


def test_flips_in_the_index(vault):
    """Rows are claims: a changed one leads to a miss or to nothing at all, never to other content or an error."""
    found, _ = index_flips(vault, 25, random.Random("index"))
    assert found == []


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_many_flips_in_the_index(vault, part):
    found, noticed = index_flips(vault, 250, random.Random(f"index {part}"))
    assert found == []
    assert noticed > 5


@pytest.mark.parametrize("content", CONTENTS)
def test_a_torn_page_of_the_index(vault, content):
    rng, found = random.Random(content), []
    size = (vault.origin / "index.sqlite3").stat().st_size
    for at in range(0, size, 4096):
        half = rng.choice([512, 4096])
        overwrite(vault.copy() / "index.sqlite3", at, CONTENTS[content](rng, half))
        found += [f"index page {at // 4096}, {half} bytes of {content}: {p}" for p in vault.served_right()[0]]
    assert found == []


def key_file(vault, tenant):
    return Tenants(vault.here, MASTER_KEY).path(tenant)


def of_tenant(vault, tenant):
    return frozenset(name for name in vault.stored if name.startswith(tenant + "/"))


def test_flips_in_a_tenants_key_file(vault):
    """Each byte of it counts; the other tenants are served, and this one begins anew."""
    rng, found = random.Random("tenant"), []
    vault.copy()
    size = key_file(vault, "bob").stat().st_size
    for at in sorted({*range(24), *rng.sample(range(24, size), 8), size - 1}):
        vault.copy()
        flip(key_file(vault, "bob"), at, rng.randrange(8))
        found += [f"key file byte {at}: {problem}" for problem in vault.check(of_tenant(vault, "bob"))]
    assert found == []


@pytest.mark.parametrize("how", ["cut", "empty", "another tenant's", "gone"])
def test_a_tenants_key_file_that_is_not_its_own(vault, how):
    vault.copy()
    path = key_file(vault, "bob")
    if how == "gone":
        path.unlink()
    elif how == "another tenant's":
        shutil.copy(key_file(vault, "default"), path)
    else:
        os.truncate(path, 0 if how == "empty" else path.stat().st_size - 1)
    reasons = ("no-unit",) if how == "gone" else ("corrupt",)
    assert vault.check(of_tenant(vault, "bob"), reasons) == []


def test_another_master_key_opens_nothing(vault):
    """Nothing is served; with the right key everything is there again."""
    vault.copy()
    store = open_faulty(vault.here, vault.story, master_key=bytes(range(1, 33)))
    for tenant, chat, boundary in vault.lookups():
        hit = look(store, tenant, chat, boundary + 1)
        assert (hit.hit.tokens, hit.seen) == (0, {})
    store.close()
    assert vault.check(frozenset()) == []


def test_the_regions_are_the_whole_record(vault):
    """No byte between two regions that nobody flips, but for the ciphertext between its probes."""
    record = of_kind(vault, "block")[0]
    covered = sorted((b - record.offset, e - record.offset) for b, e in record.regions.values())
    gaps = [(end, begin) for (_, end), (begin, _) in itertools.pairwise(covered) if begin > end]
    assert all(begin >= 128 and end <= 128 + record.payload_bytes for begin, end in gaps)
    assert covered[-1][1] == record.size_bytes
    assert struct.unpack_from("<Q", raw(record), 88) == (record.payload_bytes,)
