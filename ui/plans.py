"""What a person is asked to confirm, in words: pure functions from the bundle list to a Plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ui.bundles import BundleRow
from ui.format import byte_size
from ui.strings.base import Strings

Shown = Callable[..., str]  # arguments of solocard → the line a person can type


@dataclass(frozen=True, slots=True)
class Plan:
    """``before`` and ``after`` describe the bundle in service, now and then; ``expected`` is the text to type."""

    title: str
    verb: str
    expected: str
    before: str
    after: str
    warnings: tuple[str, ...]
    arguments: tuple[str, ...]
    command: str
    undo: str


def activation(row: BundleRow, current: BundleRow | None, strings: Strings, shown: Shown) -> Plan:
    """Put ``row`` in service in place of ``current``."""
    return _plan(strings.activate_title, strings.activate, row, current, ("activate", row.bundle_id), strings, shown)


def rollback(row: BundleRow, current: BundleRow | None, strings: Strings, shown: Shown) -> Plan:
    """Go back to ``row``, the previous bundle."""
    return _plan(strings.rollback_title, strings.rollback, row, current, ("rollback",), strings, shown)


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
        expected=row.bundle_id,
        before=described(current, strings),
        after=described(row, strings),
        warnings=tuple(warnings),
        arguments=arguments,
        command=shown(*arguments),
        undo=strings.undo_none if current is None else shown("rollback"),
    )


def described(row: BundleRow | None, strings: Strings) -> str:
    """``id, version 1.0.0, 11.2 MiB``."""
    if row is None:
        return strings.change_nothing
    return strings.bundle_line.format(bundle=row.bundle_id, version=row.version, size=byte_size(row.size_bytes))
