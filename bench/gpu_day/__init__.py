"""Measure and check the engine on a GPU in nine minutes: `python -m bench.gpu_day --help`."""
