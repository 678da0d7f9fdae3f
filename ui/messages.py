"""What workers post. A worker never touches a widget; one handler owns each change of state."""

from __future__ import annotations

from textual.message import Message

from appliance.errors import SolocardError
from appliance.wire import KvReport, Progress, Status
from ui.command import Command, Outcome


class StatusArrived(Message):
    """The server answered."""

    def __init__(self, status: Status) -> None:
        super().__init__()
        self.status = status


class StatusLost(Message):
    """The server did not answer, or not so that it could be read; ``down`` tells the two apart."""

    def __init__(self, problem: str, *, down: bool) -> None:
        super().__init__()
        self.problem, self.down = problem, down


class LogArrived(Message):
    """The newest log lines, oldest first."""

    def __init__(self, lines: tuple[str, ...]) -> None:
        super().__init__()
        self.lines = lines


class LogLost(Message):
    """The log could not be read."""

    def __init__(self, problem: str, *, down: bool) -> None:
        super().__init__()
        self.problem, self.down = problem, down


class KvArrived(Message):
    """What the KV cache holds, from the server."""

    def __init__(self, report: KvReport) -> None:
        super().__init__()
        self.report = report


class KvLost(Message):
    """The server did not say what the KV cache holds."""

    def __init__(self, problem: str, *, down: bool) -> None:
        super().__init__()
        self.problem, self.down = problem, down


class CommandProgressed(Message):
    """A running command printed a progress line."""

    def __init__(self, command: Command, progress: Progress) -> None:
        super().__init__()
        self.command, self.progress = command, progress


class CommandEnded(Message):
    """A command ended by itself: ``outcome``; or it never ran or broke off: ``error``."""

    def __init__(self, command: Command, outcome: Outcome | None, error: SolocardError | None = None) -> None:
        super().__init__()
        self.command, self.outcome, self.error = command, outcome, error
