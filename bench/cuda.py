"""The same benches on a CUDA device; their files are called `NAME-cuda.json`. Where there is no such device it says so.

python -m bench.cuda [options of every bench, such as --preset 7b]
"""

from __future__ import annotations

import sys

import torch

from .__main__ import run_all


def main(argv: list[str]) -> int:
    """Exit status."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was measured (`make bench` measures on the CPU)")
        return 0
    device = torch.cuda.get_device_name()
    print(f"on {device}")
    return run_all(["--device", "cuda", *argv])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
