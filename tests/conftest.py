"""What holds for every test: on few shared cores a thread that waits must not spin.

Read by OpenMP when torch is imported, here and in the servers that the tests start.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
