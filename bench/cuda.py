"""Run the benchmarks on a CUDA device and write `NAME-cuda.json`. Without a CUDA device, print that and stop.

python -m bench.cuda [options of every bench, such as --preset 7b]
"""

from __future__ import annotations

import sys

from .__main__ import asked_about, run_all


def main(argv: list[str]) -> int:
    """Run the benchmarks; return the exit status."""
    if asked_about(argv, __doc__):
        return 0
    import torch  # here, so that --help needs no seconds

    if not torch.cuda.is_available():
        print("no CUDA device: nothing was measured (`make bench` measures on the CPU)")
        return 0
    device = torch.cuda.get_device_name()
    print(f"on {device}")
    return run_all(["--device", "cuda", *argv])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
