"""`python -m deploy.container serve`, the entrypoint in the Dockerfile."""

import sys

from .entrypoint import main

sys.exit(main())
