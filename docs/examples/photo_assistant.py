"""Describe the pictures of a folder, then answer questions about them: lines of a picture's name and a question.

Usage: python photo_assistant.py FOLDER [URL_OR_NAME_OF_A_SAGEMAKER_ENDPOINT]
"""

import sys
from contextlib import ExitStack
from pathlib import Path

from llava_sessions_client import ClientError, Endpoint


def main(folder: str, address: str = "http://127.0.0.1:8080") -> None:
    chats = {}
    with ExitStack() as stack:
        endpoint = stack.enter_context(Endpoint(address))
        for path in sorted(Path(folder).iterdir()):
            try:
                chat = stack.enter_context(endpoint.open(path, on_lost="replay"))
                print(f"{path.stem}: {chat.ask('Which shapes are there?')}", flush=True)
                chats[path.stem] = chat
            except ClientError as error:
                print(f"{path.stem}: {error}", file=sys.stderr)
        if not chats:
            sys.exit("no picture could be opened")
        for line in sys.stdin:
            name, _, question = line.strip().partition(" ")
            if name not in chats or not question:
                print(f"expected one of {', '.join(chats)} and a question", file=sys.stderr)
                continue
            try:
                for piece in chats[name].stream(question):
                    print(piece, end="", flush=True)
                print(flush=True)
            except ClientError as error:
                print(f"{name}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
