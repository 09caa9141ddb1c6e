"""`python -m deploy.pack`, which `build_mar.sh` runs."""

import sys

from .command import main

sys.exit(main())
