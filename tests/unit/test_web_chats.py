"""The chats of the page's server: their pictures, their limits and their ends. The model server is scripted."""

from __future__ import annotations

import io

from PIL import Image

from llava_sessions_client import Chat
from llava_sessions_client.conversation import Conversation
from tests.support.client_script import settings
from tests.support.pictures import PNG
from web.chats import WebChat
from web.pictures import StoredPicture, render


def encoded(mode: str = "RGB", kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (8, 8)).save(buffer, kind)
    return buffer.getvalue()


def chat_of(transport: object) -> WebChat:
    session = Chat(Conversation(settings(), (), session_id="abc-1"), transport, None, lambda _: None)  # type: ignore[arg-type]
    return WebChat("one", session, [StoredPicture(0, PNG, *render(PNG))])


def test_a_removed_picture_leaves_its_number_to_no_other() -> None:
    chat = chat_of(None)
    chat.attach(PNG)
    chat.detach(1)
    chat.attach(encoded())
    assert [one.number for one in chat.pictures] == [0, 2]
