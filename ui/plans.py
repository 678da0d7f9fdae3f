"""What a person is asked to confirm, in words: pure functions from a bundle or a tenant to a Plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from appliance.wire import KvTenant
from ui.bundles import BundleRow
from ui.format import byte_size, count
from ui.strings.base import Strings

Shown = Callable[..., str]  # arguments of solocard → the line a person can type


@dataclass(frozen=True, slots=True)
class Plan:
    """``rows`` (label, text) say what changes, what runs and the way back; ``expected`` is the text to type."""

    title: str
    verb: str
    question: str
    expected: str
    rows: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    arguments: tuple[str, ...]


def activation(row: BundleRow, current: BundleRow | None, strings: Strings, shown: Shown) -> Plan:
    """Put ``row`` in service in place of ``current``."""
    return _plan(strings.activate_title, strings.activate, row, current, ("activate", row.bundle_id), strings, shown)


def rollback(row: BundleRow, current: BundleRow | None, strings: Strings, shown: Shown) -> Plan:
    """Go back to ``row``, the previous bundle."""
    return _plan(strings.rollback_title, strings.rollback, row, current, ("rollback",), strings, shown)


def purge(tenant: KvTenant, strings: Strings, shown: Shown) -> Plan:
    """Destroy the key of ``tenant``."""
    arguments = ("kv", "purge", tenant.name, "--yes")
    return Plan(
        title=strings.purge_title,
        verb=strings.purge,
        question=strings.type_tenant,
        expected=tenant.name,
        rows=(
            (strings.purge_what, held(tenant, strings)),
            (strings.command_label, shown(*arguments)),
            (strings.undo_label, strings.purge_undo),
        ),
        warnings=(strings.purge_warning,),
        arguments=arguments,
    )


def held(tenant: KvTenant, strings: Strings) -> str:
    """``team-a: 1,204 blocks, 96 checkpoints, 1.1 GiB``."""
    return strings.tenant_line.format(
        tenant=tenant.name,
        blocks=count(tenant.blocks),
        checkpoints=count(tenant.checkpoints),
        size=byte_size(tenant.size_bytes),
    )


def _plan(
    title: str,
    verb: str,
    row: BundleRow,
    current: BundleRow | None,
    arguments: tuple[str, ...],
    strings: Strings,
    shown: Shown,
) -> Plan:
    warnings = [strings.downtime]
    if current is not None and row.release_counter < current.release_counter:
        warnings.append(strings.older_release.format(new=row.release_counter, old=current.release_counter))
    return Plan(
        title=title,
        verb=verb,
        question=strings.type_to_confirm,
        expected=row.bundle_id,
        rows=(
            (strings.change_from, described(current, strings)),
            (strings.change_to, described(row, strings)),
            (strings.command_label, shown(*arguments)),
            (strings.undo_label, strings.undo_none if current is None else shown("rollback")),
        ),
        warnings=tuple(warnings),
        arguments=arguments,
    )


def described(row: BundleRow | None, strings: Strings) -> str:
    """``id, version 1.0.0, 11.2 MiB``."""
    if row is None:
        return strings.change_nothing
    return strings.bundle_line.format(bundle=row.bundle_id, version=row.version, size=byte_size(row.size_bytes))
