"""What can go wrong with a request, as a tree to catch at the right height.

    QuireClientError
    ├── UnavailableError          no server, a lost one, or it is full or stopping: trying again may succeed
    ├── RequestTimeoutError       the time given to the request is over
    └── RequestError              this request ends here
        ├── InvalidRequestError   it can never succeed as it is
        ├── RequestCancelledError it was cancelled
        └── ServerFailureError    the server failed at it

The message is the server's sentence, or the client's about what it refuses to send.
"""

from __future__ import annotations


class QuireClientError(Exception):
    """The root of the tree."""


class UnavailableError(QuireClientError):
    """No server answered, the connection was lost, or the server cannot take the request now.

    Trying again later may succeed.
    """


class RequestTimeoutError(QuireClientError):
    """The time given to the request is over; the server has been told to stop working on it."""


class RequestError(QuireClientError):
    """The server ended the request, or the client refused to send it."""


class InvalidRequestError(RequestError):
    """A field, the timeout or the url has a wrong type, shape or value, or there is no such model."""


class RequestCancelledError(RequestError):
    """The request was cancelled."""


class ServerFailureError(RequestError):
    """The server failed at the request."""
