"""`python -m deploy.local_endpoint`, which `make endpoint` runs."""

import sys

from .command import main

sys.exit(main())
