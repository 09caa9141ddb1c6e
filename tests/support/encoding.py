"""Encode pictures for a request."""

from __future__ import annotations

import base64
import io

from PIL import Image


def to_png(picture: Image.Image) -> bytes:
    """Return a picture as PNG bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def to_base64(picture: Image.Image | bytes) -> str:
    """Return a picture as the `image` field of a request: encoded bytes as they are, a PIL image as PNG."""
    data = picture if isinstance(picture, bytes) else to_png(picture)
    return base64.b64encode(data).decode()
