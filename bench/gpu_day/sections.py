"""The sections in the order in which they run, with their usual times on an H100."""

from __future__ import annotations

from . import decode, faults, kernels, machine, memory, moves, prefill, soak, suite
from .day import Section

SECTIONS = (
    Section("machine", machine.run, usual_s=10, least_s=2),
    Section("kernel numbers", kernels.numbers, usual_s=30, least_s=10),
    Section("kernel bandwidth", kernels.speeds, usual_s=25, least_s=10),
    Section("tests", suite.run, usual_s=90, least_s=30),
    Section("decode", decode.run, usual_s=180, least_s=30),
    Section("prefill and pictures", prefill.run, usual_s=60, least_s=20),
    Section("memory", memory.run, usual_s=45, least_s=20),
    Section("moves", moves.run, usual_s=15, least_s=5),
    Section("faults", faults.run, usual_s=40, least_s=15),
    Section("soak", soak.run, usual_s=20, least_s=10),
)
