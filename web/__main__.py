"""`python -m web`, which `make web` runs."""

import sys

from .command import main

sys.exit(main())
