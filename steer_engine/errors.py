"""Everything that Steer Engine raises on purpose.

    SteerError
    ├── SteeringRequestError     what a request asks is wrong (HTTP 400)
    │   ├── UnknownVectorError   no vector or preset of that name (404)
    │   └── PayloadTooLargeError more than a published limit (413)
    ├── CapacityError            right request, no room now (503, with Retry-After)
    ├── VectorFileError          a file is not a usable control vector
    │   ├── UnusableVectorError  a well-formed file whose numbers are no directions
    │   └── ModelMismatchError   a good vector, for another model
    ├── RegistryError            the registry of vectors and presets cannot do what is asked
    │   ├── RegistryConflictError    the name stands for something else, or is in use (409)
    │   ├── PreconditionError        not the version that the caller has seen (412)
    │   └── RegistryFullError        no room for another vector or preset (507)
    ├── BatchFileError           a file of requests or answers that cannot be used
    ├── DerivationError          contrast pairs or dumps that cannot give a vector
    ├── EvaluationError          a task or plan that cannot be evaluated
    ├── ModelError               a packaged model cannot be had
    └── UnsupportedEngineError   an armed engine must not start like this

A message says the thing, the value given, what is valid, and what to do next.
"""

from __future__ import annotations


class SteerError(Exception):
    """Root of the tree; `message` is one or two sentences for a person."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class SteeringRequestError(SteerError, ValueError):
    """What a request asks is wrong. `param` is the path of the field, as in OpenAI's error envelope."""

    status = 400

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownVectorError(SteeringRequestError):
    """No vector (or preset) of that name or digest is registered."""

    status = 404


class PayloadTooLargeError(SteeringRequestError):
    """More than a published limit allows."""

    status = 413


class CapacityError(SteerError):
    """The request is right but there is no room for it now; try again after `retry_after` seconds."""

    status = 503

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class VectorFileError(SteerError, ValueError):
    """A file, or the bytes of one, is not a usable control vector."""


class UnusableVectorError(VectorFileError):
    """A well-formed file whose numbers are not finite, or all zero."""


class ModelMismatchError(VectorFileError):
    """A sound control vector whose hidden size or blocks do not fit the model."""


class RegistryError(SteerError):
    """The registry of vectors and presets cannot do what is asked."""

    status = 503
    retry_after = 5.0


class RegistryConflictError(RegistryError):
    """The name stands for something else, or what it names is in use."""

    status = 409


class PreconditionError(RegistryError):
    """The registry does not have the version that the caller has seen."""

    status = 412


class RegistryFullError(RegistryError):
    """There is no room for another vector or preset."""

    status = 507


class BatchFileError(SteerError, ValueError):
    """A batch's file of requests or of answers cannot be used."""


class DerivationError(SteerError, ValueError):
    """Contrast pairs or activation dumps from which no vector can be derived."""


class EvaluationError(SteerError, ValueError):
    """A task, a plan or results that cannot be evaluated."""


class UnsupportedEngineError(SteerError, RuntimeError):
    """This engine cannot be armed: its version, model or settings are not supported."""


class ModelError(SteerError, RuntimeError):
    """A packaged model cannot be had: its package is missing, or it did not convert."""
