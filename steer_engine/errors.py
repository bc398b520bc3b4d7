"""All errors that Steer Engine raises.

    SteerError
    ├── SteeringRequestError     the request is invalid (HTTP 400)
    │   ├── UnknownVectorError   no vector or preset has that name (404)
    │   └── PayloadTooLargeError a published limit is exceeded (413)
    ├── CapacityError            a valid request, but no room for it now (503, with Retry-After)
    ├── VectorFileError          a file is not a usable control vector
    │   ├── UnreadableFileError  the operating system cannot read the file now
    │   ├── UnusableVectorError  a well-formed file whose numbers are not finite, or all zero
    │   └── ModelMismatchError   a valid vector for another model
    ├── RegistryError            the registry of vectors and presets cannot do what is requested (503)
    │   ├── RegistryConflictError    the name has other content, or is in use (409)
    │   ├── PreconditionError        the version differs from the one in the request (412)
    │   └── RegistryFullError        no room for another vector or preset (507)
    ├── BatchFileError           a file of requests or answers that cannot be used
    ├── DerivationError          contrast pairs or dumps from which no vector can be derived
    ├── EvaluationError          a task or plan that cannot be evaluated
    ├── ModelError               a packaged model is not available
    └── UnsupportedEngineError   the engine cannot be armed in this configuration

A message says what is wrong, the value given, what is valid, and what to do next.
"""

from __future__ import annotations


class SteerError(Exception):
    """Root of all errors. `message` is one or two sentences for a person."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class SteeringRequestError(SteerError, ValueError):
    """The request is invalid. `param` is the path of the wrong field, as in OpenAI's error format."""

    status = 400

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownVectorError(SteeringRequestError):
    """No vector or preset with that name or digest is registered."""

    status = 404


class PayloadTooLargeError(SteeringRequestError):
    """A published limit is exceeded."""

    status = 413


class CapacityError(SteerError):
    """The request is valid, but there is no room for it now; retry after `retry_after` seconds."""

    status = 503

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class VectorFileError(SteerError, ValueError):
    """A file, or the bytes of one, is not a usable control vector."""


class UnreadableFileError(VectorFileError):
    """The operating system cannot read the file now; its content is unknown."""


class UnusableVectorError(VectorFileError):
    """A well-formed file whose numbers are not finite, or all zero."""


class ModelMismatchError(VectorFileError):
    """A valid control vector whose hidden size or blocks do not fit the model."""


class RegistryError(SteerError):
    """The registry of vectors and presets cannot do what is requested."""

    status = 503
    retry_after = 5.0


class RegistryConflictError(RegistryError):
    """The name already has other content, or what it names is in use."""

    status = 409


class PreconditionError(RegistryError):
    """The registry has another version than the one in the request (`If-Match`)."""

    status = 412


class RegistryFullError(RegistryError):
    """There is no room for another vector or preset."""

    status = 507


class BatchFileError(SteerError, ValueError):
    """A batch file of requests or answers cannot be used."""


class DerivationError(SteerError, ValueError):
    """No vector can be derived from these contrast pairs or activation dumps."""


class EvaluationError(SteerError, ValueError):
    """A task, a plan or results cannot be evaluated."""


class ModelError(SteerError, RuntimeError):
    """A packaged model is not available: its package is missing, or its conversion failed."""


class UnsupportedEngineError(SteerError, RuntimeError):
    """The engine cannot be armed: its version, model or settings are not supported."""
