"""What a client is told when a request cannot be served."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(eq=False)
class ApiError(Exception):
  """An answer in OpenAI's form of errors.

  Attributes:
    status: Of HTTP.
    message: What is wrong and what helps.
    kind: "invalid_request_error" and the like.
    param: The field that is to blame, if it is one.
    code: A word for programs.
    retry_after: Seconds after which another try may succeed.
  """

  status: int
  message: str
  kind: str = "invalid_request_error"
  param: str | None = None
  code: str | None = None
  retry_after: int | None = None

  def __post_init__(self) -> None:
    super().__init__(self.message)

  @property
  def body(self) -> dict[str, Any]:
    """The object that a client reads."""
    return {
      "error": {
        "message": self.message,
        "type": self.kind,
        "param": self.param,
        "code": self.code,
      }
    }

  @property
  def headers(self) -> Mapping[str, str]:
    """Of the answer."""
    if self.retry_after is None:
      return {}
    return {"Retry-After": str(self.retry_after)}


def invalid(
  message: str, param: str | None = None, code: str | None = None
) -> ApiError:
  """A request that is wrong in itself."""
  return ApiError(400, message, param=param, code=code)


def overloaded(queued: int) -> ApiError:
  """As many wait as may."""
  return ApiError(
    429,
    f"{queued} continuations wait already, as many as may (--max_queue); try "
    "again later",
    "rate_limit_error",
    code="overloaded",
    retry_after=1,
  )


def draining() -> ApiError:
  """The server goes down."""
  return ApiError(
    503,
    "the server is shutting down and takes no new requests",
    "service_unavailable",
    code="shutting_down",
    retry_after=10,
  )


def cut_off() -> ApiError:
  """The server went down while the answer was being written."""
  return ApiError(
    503,
    "the server was shut down before the answer was complete",
    "service_unavailable",
    code="shutting_down",
    retry_after=10,
  )


def failed() -> ApiError:
  """The engine is gone; its log says why."""
  return ApiError(
    503,
    "the engine has failed; the server's log says why. It has to be started "
    "again",
    "service_unavailable",
    code="engine_failed",
    retry_after=30,
  )
