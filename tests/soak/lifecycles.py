"""Run random session lifecycles on a fake engine, a few milliseconds each (tests/support/lifecycles.py).

    python -m tests.soak lifecycles --sequences 100000

It fails at the first lifecycle in which a request hangs, an acknowledged turn is lost, or a resource is left behind.
The same seed makes the same lifecycles.
"""

from __future__ import annotations

import random
import sys

from tests.support.lifecycles import WEIGHTED, Broken, live

from .report import Record, options

LONGEST = 80
_PROGRESS = 5_000


def main(argv: list[str]) -> int:
    """Run random session lifecycles on a fake engine."""
    record = Record("lifecycles", options("lifecycles", __doc__, argv, sequences=100_000))
    chosen = record.chosen
    broken = ""
    done = 0
    for number in range(chosen.sequences):
        chance = random.Random(f"{chosen.seed}/{number}")
        length = chance.randrange(5, LONGEST)
        life = [(chance.choice(WEIGHTED), chance.randrange(12)) for _ in range(length)]
        try:
            live(chance.random() < 0.75, life, engines=1 + number % 2)
        except Broken as error:
            broken = f"sequence {number}: {error}"
            break
        done += 1
        if done % _PROGRESS == 0:
            record.say(f"{done:,} lives")
    record.check("every life ends well", not broken, broken or f"{done:,} lives")
    record.figures["sequences"] = done
    return record.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
