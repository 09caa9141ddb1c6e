"""The command `llava-chat`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..endpoint import Endpoint
from ..errors import ClientError, SessionLost

USAGE_ERROR = 2
_EPILOG = """\
Without a terminal on standard input, each line is a question and each answer is printed. In a chat, /help lists the
commands. Ctrl-C stops an answer and keeps the session; Ctrl-D ends the chat and closes the session.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0, 1 for an error of the chat, 2 for wrong options, 130 for Ctrl-C."""
    options = parse_args(argv)
    try:
        from .talk import Talk  # here: rich and prompt_toolkit are an extra
    except ImportError as error:
        print(f"llava-chat needs {error.name}: pip install 'llava-sessions-client[chat]'", file=sys.stderr)
        return USAGE_ERROR
    talk = Talk(options.max_new_tokens, options.temperature, options.region)
    try:
        endpoint = Endpoint(
            options.endpoint,
            region=options.region,
            endpoint_url=options.endpoint_url,
            session_token=options.session_token,
            timeout_s=options.timeout,
        )
        opened = endpoint.open(
            options.pictures, video=options.video, video_frames=options.video_frames, on_lost=options.on_lost
        )
        with opened as chat:
            return talk.run(chat)
    except SessionLost as error:
        talk.fail(f"the session is lost: {error}")
    except ClientError as error:
        talk.fail(str(error))
    except KeyboardInterrupt:
        return 130
    return 1


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="llava-chat", description="Chat about pictures with a server of LLaVA Sessions.", epilog=_EPILOG
    )
    parser.add_argument(
        "endpoint", metavar="URL_OR_ENDPOINT", help="http://HOST:PORT, or the name of a SageMaker endpoint"
    )
    parser.add_argument("pictures", metavar="PICTURE", nargs="*", help="path, http(s):// URL or s3:// URI")
    parser.add_argument(
        "--video", metavar="CLIP", help="open the chat on a video file: path, http(s):// URL or s3:// URI"
    )
    parser.add_argument("--video-frames", type=int, metavar="N", help="frames that are sampled from CLIP")
    parser.add_argument("--region", metavar="NAME", help="AWS region (default: that of the AWS configuration)")
    parser.add_argument("--endpoint-url", metavar="URL", help="address of SageMaker Runtime, for the local endpoint")
    parser.add_argument("--session-token", metavar="TEXT", help="bind the session to this secret, 16 to 256 characters")
    parser.add_argument(
        "--on-lost",
        choices=("raise", "replay"),
        default="replay",
        help="replay (default): open a lost session again with its history; raise: end with an error",
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="limit of an answer (default: the server's)")
    parser.add_argument("--temperature", type=float, metavar="X", help="0 is greedy (default)")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="of each question with its retries")
    options = parser.parse_args(argv)
    if options.pictures and options.video is not None:
        parser.error("a chat must be opened on pictures or on a clip, got both")
    return options


if __name__ == "__main__":
    sys.exit(main())
