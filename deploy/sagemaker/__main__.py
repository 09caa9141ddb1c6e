"""`python -m deploy.sagemaker`, the same as `llava-deploy`."""

import sys

from .command import main

sys.exit(main())
