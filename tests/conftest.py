"""What holds for every test: on few shared cores a thread that waits must not spin, and Ctrl-C is heard.

The first is read by OpenMP when torch is imported, here and in the servers that the tests start. A shell has what it
starts in the background ignore Ctrl-C, and so would all that is started here; tests send it to themselves and others.
"""

import os
import signal

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
