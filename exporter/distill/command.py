"""``solocard-export distill``: heal, teacher, router, qad. No torch here: the stages import it when they run."""

from __future__ import annotations

from typing import Any

from exporter.distill import heal, qad, teacher


def add_command(subparsers: Any) -> None:
    """Add ``distill`` and its subcommands; each sets ``func``, which returns the exit code."""
    parser = subparsers.add_parser("distill", help="train what makes up for cut experts and coarser formats")
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for add in (heal.add_command, teacher.add_command, qad.add_router_command, qad.add_command):
        add(stages)
