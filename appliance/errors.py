"""Every error Solocard raises on purpose.

    SolocardError            one line for a person: what happened, to which file or field, what to do
    ├── UsageError           the command line or a configuration field is wrong           exit 2
    ├── CheckpointError      the checkpoint cannot be read as DeepSeek-V4-Flash           exit 3
    ├── BundleError          a bundle is damaged, incomplete, or not what its list says   exit 4
    │   └── TrustError       its signatures, keys or versions are not acceptable          exit 5
    ├── StoreError           the appliance's own state or the model pool is damaged       exit 6
    ├── BusyError            another process holds the lock                               exit 7
    ├── SpaceError           not enough disk or memory; says how much is needed           exit 8
    ├── TrialError           the new bundle did not give its golden tokens                exit 9
    ├── EngineError          the runtime cannot run this model or this call               exit 10
    └── RequestError         an HTTP request cannot be served; carries status and code    (HTTP only)

Commands print ``solocard: <message>`` on stderr and end with the class's exit code; a stack trace is a defect.
"""

from __future__ import annotations


class SolocardError(Exception):
    """Base of the tree; ``str(error)`` is the line shown to a person."""

    exit_code = 1


class UsageError(SolocardError):
    """The command line or a configuration field is wrong."""

    exit_code = 2


class CheckpointError(SolocardError):
    """The checkpoint cannot be read as DeepSeek-V4-Flash; names file and tensor."""

    exit_code = 3


class BundleError(SolocardError):
    """A bundle is damaged, incomplete, or not what its manifest says; names the file."""

    exit_code = 4


class TrustError(BundleError):
    """Signatures, keys, thresholds or versions of a bundle are not acceptable; names the file."""

    exit_code = 5


class StoreError(SolocardError):
    """The appliance's own state or the model pool is damaged."""

    exit_code = 6


class BusyError(SolocardError):
    """Another process holds the lock."""

    exit_code = 7


class SpaceError(SolocardError):
    """Not enough disk or memory; the message says how much is needed and how much there is."""

    exit_code = 8


class TrialError(SolocardError):
    """The new bundle did not give its golden tokens; the old one stays in service."""

    exit_code = 9


class EngineError(SolocardError):
    """The runtime cannot run this model or this call."""

    exit_code = 10


class RequestError(SolocardError):
    """An HTTP request cannot be served.

    ``status`` is the HTTP status, ``code`` and ``kind`` the OpenAI error body's ``code`` and ``type``,
    ``param`` the offending field, ``retry_after_s`` the Retry-After header (429 and 503 only).
    """

    def __init__(
        self, message: str, *, status: int = 400, code: str | None = None, kind: str = "invalid_request_error",
        param: str | None = None, retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.kind, self.param, self.retry_after_s = status, code, kind, param, retry_after_s
