"""`python -m deploy.serve`, which `make serve` runs."""

import sys

from .command import main

sys.exit(main())
