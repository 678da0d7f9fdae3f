"""What every screen is given: where the appliance is, how to read it, how to draw and in which language."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ui.backend import ConsoleBackend
from ui.strings.base import Strings
from ui.strings.en import EN
from ui.terminal import Glyphs, Terminal


@dataclass(frozen=True, slots=True)
class Context:
    """``poll_s`` is the time between two looks at the server, in seconds."""

    home: Path
    socket_path: Path
    backend: ConsoleBackend
    terminal: Terminal
    strings: Strings = EN
    poll_s: float = 1.0

    @property
    def glyphs(self) -> Glyphs:
        return self.terminal.glyphs

    @property
    def replaying(self) -> bool:
        return self.backend.name == "replay"
