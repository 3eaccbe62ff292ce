"""Every error that Quire raises on purpose, each with the one Triton status code that a client sees.

Catch `QuireError` for all of them; `RequestError` for those that end one request and leave the server
serving; `StartupError` for those that keep a server or a build from starting. A message is one sentence
that names the field, the value and the limit, and says what to do where something can be done.
"""

from __future__ import annotations

from typing import ClassVar, Literal

StatusCode = Literal["INVALID_ARG", "UNAVAILABLE", "CANCELLED", "INTERNAL", "UNSUPPORTED", "NOT_FOUND"]
"""Names of members of Triton's error-code enumeration."""


class QuireError(Exception):
    """The root of the tree."""

    code: ClassVar[StatusCode] = "INTERNAL"


class RequestError(QuireError):
    """Ends one request; everything else goes on."""


class InvalidRequestError(RequestError):
    """The request can never succeed as it is: a field has a wrong type, shape or value."""

    code = "INVALID_ARG"


class AccessDeniedError(RequestError):
    """A client called a model that only Quire's own components may call."""

    code = "UNSUPPORTED"


class OverloadedError(RequestError):
    """The queue is full; the message says after how many seconds to try again."""

    code = "UNAVAILABLE"


class RequestCancelledError(RequestError):
    """The client closed its stream or asked for the request to be cancelled."""

    code = "CANCELLED"


class PeerLostError(RequestError):
    """A process that the request needed (scheduler or engine) went away; trying again may succeed."""

    code = "UNAVAILABLE"


class EngineDeadError(PeerLostError):
    """The engine is gone and nothing brings it back to this server, which ends."""


class EngineStepError(RequestError):
    """The engine failed on the steps that carried this request, repeatedly."""


class StartupError(QuireError):
    """Something about the installation, a file or a setting keeps the server from starting."""


class SettingsError(StartupError):
    """A serving setting is malformed or beyond what the engine was built for."""

    code = "INVALID_ARG"


class ManifestError(StartupError):
    """engine.json is missing, damaged, or describes an engine that does not fit this machine."""


class BuildError(QuireError):
    """A checkpoint cannot be built into a model repository."""


class CheckpointError(BuildError):
    """A file of the checkpoint is missing, truncated or contradicts another."""


class UnsupportedModelError(BuildError):
    """The checkpoint is sound but uses an architecture or option that Quire does not implement."""

    code = "UNSUPPORTED"


class NumericsGateError(BuildError):
    """The built engine differs from the torch module by more than the tolerance; nothing was published."""
