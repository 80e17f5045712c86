"""Errors as OpenAI's API answers them: an HTTP status, and a JSON object that says what is wrong with which field."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from openai.types.shared import ErrorObject
from starlette.exceptions import HTTPException

from popcompile.loading import one_line

_INVALID, _INTERNAL = "invalid_request_error", "server_error"


class ApiError(HTTPException):
    """What a request is refused with. param: the field, code: the cause, by the names that OpenAI's servers give."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, message)
        self.param, self.code = param, code


def error_json(error: Exception) -> dict[str, Any]:
    """The object `{"error": ...}` for any exception."""
    if isinstance(error, HTTPException):
        kind = _INVALID if error.status_code < 500 else _INTERNAL
        param, code = getattr(error, "param", None), getattr(error, "code", None)
        described = ErrorObject(message=str(error.detail), type=kind, param=param, code=code)
    else:
        described = ErrorObject(message=one_line(error), type=_INTERNAL, param=None, code=None)
    return {"error": described.to_dict()}


def add_handlers(app: FastAPI) -> None:
    """Let every error of an app be answered in this form, those of routing and of validation among them."""
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(RequestValidationError, _answer_validation)
    app.add_exception_handler(Exception, _answer_failure)


async def _answer_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse(error_json(error), error.status_code, headers=error.headers)


async def _answer_validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    refused = _described(max(error.errors(), key=lambda found: len(found["loc"])))  # of alternatives, the one that fits
    return JSONResponse(error_json(refused), refused.status_code)


async def _answer_failure(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse(error_json(error), 500)


def _described(found: dict[str, Any]) -> ApiError:
    """What is wrong with a body, of one of pydantic's complaints."""
    if found["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON ({found['ctx']['error']}); send one JSON object")
    if found["type"] == "model_attributes_type" and len(found["loc"]) == 1:
        return ApiError(400, "the body is not a JSON object; send one, with Content-Type: application/json")
    param = ".".join(str(part) for part in found["loc"][1:] if not _is_alternative(part)) or None
    if found["type"] == "extra_forbidden":
        return ApiError(400, f"{param}: unknown field; leave it out", param, "unknown_parameter")
    return ApiError(400, f"{param or 'the body'}: {found['msg']}", param, "invalid_value")


def _is_alternative(part: str | int) -> bool:
    """Whether a part of a place in a body is none of the body's own: which of several types was tried."""
    return isinstance(part, str) and (part == "str" or not part.isidentifier())
