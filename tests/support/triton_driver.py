"""A driver of Triton for a CUDA device that is absent: kernels are compiled to cubins, and launches are recorded.

The compiler and ptxas are Triton's own. Only the CUDA API is replaced: a launch runs nothing.
"""

from __future__ import annotations

import functools
import itertools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

CUOBJDUMP = Path(triton.__file__).with_name("backends") / "nvidia" / "bin" / "cuobjdump"
# Shared memory of a program, in bytes, for each compute capability (CUDA's programming guide).
SHARED_MEMORY = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}


# A load from global memory, to registers or (LDGSTS) to shared memory, with its width in bits if it is not 32.
_LOAD = re.compile(r"^LDG(?:STS)?\.E(?:\.(?!64|128)\w+)*(?:\.(?P<bits>64|128))?")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(?P<text>[A-Z][^;]*);", re.MULTILINE)
_REGISTERS = re.compile(r"REG:(\d+)")


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel. `types`: of the arguments in the compiled form. `aligned`: arguments that it takes to be
    multiples of 16.
    """

    name: str
    grid: tuple[int, int, int]
    args: tuple[Any, ...]
    types: dict[str, str]
    aligned: set[str]


@dataclass(frozen=True)
class Cubin:
    """A compiled kernel. `shared`: its bytes of shared memory."""

    name: str
    code: bytes
    shared: int

    @property
    def instructions(self) -> list[str]:
        """The instructions of the machine code."""
        return [match["text"] for match in _INSTRUCTION.finditer(self._listing)]

    def count(self, opcode: str) -> int:
        """Return the number of instructions whose opcode starts with a name."""
        return sum(text.startswith(opcode) for text in self.instructions)

    @property
    def loads(self) -> Counter[int]:
        """The number of loads from global memory for each width in bits. Narrower ones count as 32."""
        found = filter(None, map(_LOAD.match, self.instructions))
        return Counter(int(match["bits"] or 32) for match in found)

    @property
    def registers(self) -> int:
        """Registers of a thread."""
        match = _REGISTERS.search(self._listing)
        assert match
        return int(match[1])

    @functools.cached_property
    def _listing(self) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.code)
            file.flush()
            command = [CUOBJDUMP, "-res-usage", "-sass", file.name]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# Triton keeps compiled kernels, and the target of its compiler, for each number of a device.
_numbers = itertools.count(1000)


class AbsentDevice(DriverBase):
    """Triton's driver of a device with compute capability `capability`, 80 for 8.0. It records kernels and launches."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self._number = next(_numbers)
        self.cubins: list[Cubin] = []
        self.launches: list[Launch] = []
        properties = {"max_shared_mem": SHARED_MEMORY[capability]}
        self.utils = SimpleNamespace(load_binary=self._load, get_device_properties=lambda _: properties)

    def _load(self, name: str, code: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        self.cubins.append(Cubin(name, code, shared))
        return (1, 1, 0, 0, 1024)  # module, function, registers, spills, threads

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self._number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        """Return the function that launches a kernel: grid, stream, function, three of Triton's own, two hooks."""

        names = src.fn.arg_names
        aligned = {names[path[0]] for path, found in src.attrs.items() if ["tt.divisibility", 16] in found}

        def launch(x: int, y: int, z: int, *rest: Any) -> None:
            self.launches.append(Launch(metadata.name, (x, y, z), rest[6:], src.signature, aligned))

        return launch


@contextmanager
def absent_device(capability: int) -> Iterator[AbsentDevice]:
    """Let Triton compile for a device that is absent."""
    device = AbsentDevice(capability)
    triton.runtime.driver.set_active(device)
    try:
        yield device
    finally:
        triton.runtime.driver._active = None
