"""Python client of LLaVA Sessions.

with httpx.Client(base_url="http://127.0.0.1:8080", timeout=60, trust_env=False) as http:
    session = ChatSession.open(http, Path("picture.png").read_bytes())
    print(session.ask("Which shapes are in the picture?")["response_text"])
    session.close()
"""

from .errors import ApiError, raise_for_error
from .lines import split_lines
from .metrics import read_metrics, wait_for_metrics
from .pictures import to_base64, to_png
from .session import CLOSED_HEADER, SESSION_HEADER, Answer, ChatSession

__all__ = [
    "CLOSED_HEADER",
    "SESSION_HEADER",
    "Answer",
    "ApiError",
    "ChatSession",
    "raise_for_error",
    "read_metrics",
    "split_lines",
    "to_base64",
    "to_png",
    "wait_for_metrics",
]
