"""`python -m deploy.doctor`, which `make doctor` runs, also with a Python of the system before `make env`."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - the Python of the system may be older
    version = ".".join(map(str, sys.version_info[:3]))
    sys.exit(f"error    python  Python must be 3.11 or later, got {version}  install Python 3.11, then run: make env")

from .command import main

sys.exit(main())
