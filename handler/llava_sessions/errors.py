"""Error codes, their HTTP statuses, and the words for a rejected value. Pure."""

from __future__ import annotations

from http import HTTPStatus

STATUS_OF_CODE: dict[str, int] = {
    "invalid_request": 400,
    "model_not_found": 404,
    "not_found": 404,
    "session_not_found": 404,
    "session_busy": 409,
    "session_expired": 410,
    "too_large": 413,
    "unsupported_media": 415,
    "context_length_exceeded": 422,
    "capacity": 429,
    "internal": 500,
    "engine_restarting": 503,
    "journal_unavailable": 503,
    "request_dropped": 503,
    "session_moved": 503,
    "shutting_down": 503,
}

# Items of an array whose types `describe` lists.
_ITEMS_DESCRIBED = 100
# Of a number in JSON; a longer one is described by its size.
_NUMBER_MAX_CHARS = 24
_JSON_TYPES: dict[type, str] = {
    str: "string",
    bool: "boolean",
    int: "number",
    float: "number",
    list: "array",
    tuple: "array",
    dict: "object",
    type(None): "null",
}


class Refused(Exception):
    """A request that is answered with an error and changes nothing.

    `code` is a key of `STATUS_OF_CODE`. `message` is for the client: it states the expected and the actual value.
    `retry_after_s`: seconds after which a retry may succeed; None if a retry can't help. `param`: the client's name of
    the field that is to blame, if there is one.
    """

    def __init__(self, code: str, message: str, retry_after_s: int | None = None, param: str | None = None) -> None:
        """Raise `ValueError` if the code is unknown."""
        if code not in STATUS_OF_CODE:
            raise ValueError(f"unknown error code {code!r}")
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s
        self.param = param

    @property
    def status(self) -> int:
        """Return the HTTP status of the code."""
        return STATUS_OF_CODE[self.code]

    def body(self) -> dict[str, dict[str, str]]:
        """Return the reply's JSON: `{"error": {"code", "message"}}`."""
        return {"error": {"code": self.code, "message": self.message}}


def describe(value: object) -> str:
    """Return a short ASCII description of a JSON value, safe to show and to log.

    Numbers, booleans and null are shown. Strings, arrays and objects are described by their type and length.
    """
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return _describe_number(value)
        case str():
            return f"a string of length {len(value):,}" if value else "an empty string"
        case list() | tuple():
            return _describe_array(value)
        case dict():
            return f"an object of length {len(value):,}" if value else "an empty object"
    return f"a value of type {json_type(value)}"


def json_type(value: object) -> str:
    """Return the JSON name of a value's type."""
    return _JSON_TYPES.get(type(value), type(value).__name__)


def reason_phrase(status: int) -> str:
    """Return the ASCII reason phrase of an HTTP status.

    TorchServe counts a phrase in characters, so a phrase that is not ASCII ends the worker.
    """
    return HTTPStatus(status).phrase


def _describe_number(value: float) -> str:
    # Python doesn't write an integer of more than 4,300 digits.
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length():,} bits"
    text = str(value)
    return text if len(text) <= _NUMBER_MAX_CHARS else "a number"


def _describe_array(value: list[object] | tuple[object, ...]) -> str:
    if not value:
        return "an empty array"
    kinds = sorted({json_type(item) for item in value[:_ITEMS_DESCRIBED]})
    return f"an array of length {len(value):,} ({', '.join(kinds)})"


def error_line(error: BaseException) -> str:
    """Return an error's type and its whole message in one line, for a log that is read by lines."""
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
