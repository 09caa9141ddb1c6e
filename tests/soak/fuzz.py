"""Send thousands of malformed requests to a real server while sessions chat.

python -m tests.soak.fuzz --requests 20000
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch

from bench import machine
from deploy.options import Parser
from tests.support.fuzz import SESSIONS, THREADS, fuzz, grown, serving

from .report import RESULTS, write

WARM_UP = 500


def main(argv: list[str] | None = None) -> int:
    """Send 20,000 malformed requests to a real server."""
    parser = Parser(prog="python -m tests.soak fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "soak_fuzz.json")
    options = parser.parse_args(argv)
    facts, neighbours, began = machine.facts(torch.device("cpu")), machine.Neighbours(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, serving(Path(folder), SESSIONS) as (server, url):
        run = fuzz(server, url, options.requests, options.seed, warm_up=WARM_UP)
    run.wrong += [f"{role} holds over 10 % more memory than before" for role in grown(run.memory)]
    counts = dict(sorted(run.counts.items()))
    sent = sum(count for what, count in counts.items() if not what.startswith(("control", "leave")))
    settings = {"requests": options.requests, "seed": options.seed, "threads": THREADS, "sessions": SESSIONS}
    found = {"settings": settings, "neighbours": neighbours.report(), "seconds": round(time.monotonic() - began)}
    found |= {
        "sent": sent,
        "counts": counts,
        "unanswered": len(run.unanswered),
        "wrong": run.wrong[:50],
        "rss_bytes": run.memory,
    }
    write(options.out, {"facts": facts, **found})
    for role, before in run.memory["before"].items():
        after = run.memory["after"][role]
        print(f"{role}: RSS {before >> 20} MiB before, {after >> 20} MiB after ({after / before:.3f})")
    print(f"{sent} requests in {found['seconds']} s")
    print("\n".join(f"{count:7} {what}" for what, count in counts.items()))
    print("\n".join(["wrong:", *run.wrong[:20]]) if run.wrong else "nothing wrong")
    return 1 if run.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
