"""`python -m deploy.serve`, which `make serve` runs."""

import sys

from .service import main

sys.exit(main())
