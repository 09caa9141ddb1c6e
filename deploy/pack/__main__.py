"""`python -m deploy.pack`, which `build_mar.sh` runs."""

import sys

from .archive import main

sys.exit(main())
