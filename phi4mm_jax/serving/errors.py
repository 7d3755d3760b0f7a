"""Everything that can go wrong, as OpenAI's clients expect to hear it."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from phi4mm_jax.processing.prompt import ChatError, MediaError, PromptError, TooLongError
from phi4mm_jax.runtime.limits import RequestError
from phi4mm_jax.runtime.memory import MemoryPlanError
from phi4mm_jax.runtime.sampling import SamplingError
from phi4mm_jax.service import QueueFullError, RequestTimeoutError
from phi4mm_jax.serving.grammar import GrammarError
from phi4mm_jax.serving.tools import ToolError

logger = logging.getLogger(__name__)

INPUT_ERRORS = (ChatError, GrammarError, MediaError, PromptError, RequestError, SamplingError, ToolError)
"""What the caller can put right; their messages say how."""
_FIELD = re.compile(r"([A-Za-z_]\w*(?:\.\w+|\[\d+\])*)(?=:| = | is | names )")
"""The field that this package's messages begin with: `messages[0].role is ...`, `top_p = 2: ...`."""
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 504: "timeout_error"}


class ApiError(HTTPException):
    """An error answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        """Describes the answer.

        Args:
          status: of HTTP.
          message: what is wrong and what is accepted.
          param: the field that is wrong, such as `messages[0].content[1].image_url.url`.
          code: a short name that programs can look for.
          headers: to send along.
        """
        super().__init__(status, message, dict(headers) if headers else None)
        self.param, self.code = param, code

    @property
    def type(self) -> str:
        """OpenAI's kind of error."""
        return _TYPES.get(self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error")

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's form of it."""
        return {"error": {"message": self.detail, "type": self.type, "param": self.param, "code": self.code}}


def refuse(param: str, problem: str, code: str | None = None) -> ApiError:
    """The error of a field whose value is not accepted."""
    return ApiError(400, f"{param}: {problem}", param=param, code=code)


def as_api_error(error: Exception) -> ApiError:
    """The answer that an exception means; what nobody foresaw is logged and not told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, INPUT_ERRORS):
        field = _FIELD.match(str(error))
        code = "context_length_exceeded" if isinstance(error, RequestError | TooLongError) else None
        return ApiError(400, str(error), param=field and field[1], code=code)
    if isinstance(error, RequestValidationError):
        return _invalid(error.errors(), error.body)
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": "1"})
    if isinstance(error, RequestTimeoutError):
        return ApiError(504, str(error), code="timeout")
    if isinstance(error, MemoryPlanError):
        return ApiError(503, str(error), code="out_of_memory")
    if isinstance(error, HTTPException):
        return _plain(error)
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "internal error; the server's log says more")


def _plain(error: HTTPException) -> ApiError:
    """Starlette's own errors, such as those of unknown paths."""
    known = {404: "no such endpoint; GET /docs lists them", 405: "this endpoint takes another method"}
    told = known.get(error.status_code, error.detail)
    if told == "There was an error parsing the body":
        told = "the body cannot be read: expected UTF-8, and objects that are not nested hundreds of levels deep"
    return ApiError(error.status_code, told, headers=error.headers)


def _invalid(problems: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """The first thing that is wrong with a request's form; the branches of a union say together what they accept."""
    first = {**problems[0], "msg": problems[0]["msg"].removeprefix("Value error, ")}
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    path = _path(first, body)
    messages = dict.fromkeys(problem["msg"] for problem in problems if _path(problem, body) == path)
    if not path:
        is_object = isinstance(body, Mapping)
        return ApiError(400, first["msg"] if is_object else "expected a JSON object and Content-Type application/json")
    if first["type"] == "extra_forbidden":
        return refuse(path, "is not a field that this server knows", code="unknown_parameter")
    return refuse(path, "; or ".join(message.removeprefix("Value error, ") for message in messages))


def _path(problem: Mapping[str, Any], body: Any) -> str:
    """Writes where a problem is as `a[0].b`, without the names that pydantic gives to the branches of a union."""
    path = ""
    for key in problem["loc"][1:]:
        if isinstance(key, int) and isinstance(body, (list, tuple)) and key < len(body):
            path, body = f"{path}[{key}]", body[key]
        elif isinstance(key, str) and isinstance(body, Mapping) and (key in body or problem["type"] == "missing"):
            path, body = f"{path}.{key}" if path else key, body.get(key)
        else:
            break
    return path
