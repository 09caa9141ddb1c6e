"""The command line of `llava-deploy`: from a packed model to a SageMaker endpoint, and its deletion.

Results are printed on stdout and progress on stderr; an error is one line. Every command can be repeated: it does the
remaining work.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

import boto3
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError

from deploy.doctor import command as doctor

from . import actions, capacity
from .account import Account
from .arguments import parse_args
from .output import say
from .problems import DeployError, explain

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Return the exit code: 0, 1 after an error, 130 after Ctrl-C."""
    args = parse_args(argv)
    if args.command == "capacity":
        with contextlib.suppress(BrokenPipeError):  # the reader, such as `head`, has ended
            options = (args.text_tokens, args.reserve_gib, args.weights, args.kv_dtype, args.model)
            print(capacity.report(*options), flush=True)
        return 0
    if args.command == "doctor":
        return doctor.run(args)
    try:
        region = args.region or os.environ.get("AWS_REGION")  # the AWS CLI reads it, but boto3 does not
        session = boto3.Session(profile_name=args.profile, region_name=region)
        account = Account(args.name, session, is_dry_run=getattr(args, "dry_run", False))
        if account.is_offline:
            say("no AWS credentials: nothing is looked up")
        elif args.run is not actions.invoke:  # `invoke` needs no account, and may use a local endpoint
            say(f"account {account.id}, region {account.region}")
        args.run(args, account)
    except (DeployError, OSError) as error:  # OSError: a file that cannot be read
        say(f"error: {error}")
        return 1
    except (BotoCoreError, ClientError, ResponseParserError) as error:
        say(f"error: {explain(error)}")
        return 1
    except KeyboardInterrupt:
        say("\ninterrupted. Run the same command again to resume")
        return INTERRUPTED
    return 0
