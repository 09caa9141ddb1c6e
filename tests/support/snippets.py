"""Code blocks of the documentation: find them, and run those of one page in order, as a reader would.

A page has one shell and one Python, as a reader has two terminals: exports, functions and names of a block are there in
the blocks below it. Python starts with the environment that the shell has by then.

The text of a block is run as it is, except for the ports of the servers: other programs of the machine may use those of
the page.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("bash", "python", "json", "yaml", "text", "console", "mermaid")
BLOCK_S = 600
_BLOCK = re.compile(r"(?:^<!-- runs: (\S+) -->\n+)?^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_DRIVER = """
import sys
names = {"__name__": "__main__"}
for line in sys.stdin:
    path, title = line.rstrip("\\n").split("\\t")
    exec(compile(open(path).read(), title, "exec"), names)
    print("\\n" + "ended", path, flush=True)
"""


@dataclass(frozen=True)
class Block:
    """A fenced block. `marked`: the test that runs its command, as the comment `<!-- runs: FILE -->` above it names."""

    page: str
    line: int
    language: str
    text: str
    marked: str | None = None

    @property
    def title(self) -> str:
        """The place of the block, for messages."""
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The commands of a shell block, one for each line, without comments. In a console they follow a `$`."""
        text = self.text
        if self.language == "console":
            text = "\n".join(re.findall(r"^\$ ((?:.*\\\n)*.*)$", text, re.MULTILINE))
        joined = text.replace("\\\n", " ")
        lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in joined.splitlines())
        return [" ".join(line.split()) for line in lines if line]


def pages() -> list[str]:
    """Return the pages whose blocks are checked."""
    docs = (path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
    others = ("README.md", "CONTRIBUTING.md", "client/README.md")
    return [*(name for name in others if (ROOT / name).exists()), *sorted(docs)]


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start(2)) + 1
        found.append(Block(page, line, match[2].strip(), match[3], match[1]))
    return found


class Terminal:
    """The shell and the Python of one page, in `folder`. `ports`: for each port of the pages, that of the server."""

    def __init__(self, folder: Path, work: Path, ports: Mapping[int, int], env: Mapping[str, str]) -> None:
        self._folder, self._work, self._ports = folder, work, dict(ports)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        self._shell = self._start(["bash", "-euo", "pipefail"], {**kept, **env})
        self._python: subprocess.Popen[str] | None = None
        self._number = 0

    def run(self, block: Block) -> str:
        """Run a block and return what it printed. Raise `AssertionError` if it fails or takes longer than `BLOCK_S`."""
        path = self._write(self._with_ports(block.text))
        if block.language == "python":
            if self._python is None:
                self._python = self._start([sys.executable, "-u", "-c", _DRIVER], self._exported())
            return self._send(self._python, f"{path}\t{block.title}\n", path, block.title)
        # A command that reads its input finds it empty, and not the rest of the page.
        script = f". '{path}' </dev/null\nprintf '\\nended %s\\n' '{path}'\n"
        return self._send(self._shell, script, path, block.title)

    def define(self, script: str) -> None:
        """Run lines in the shell that no page has."""
        path = self._write(script)
        self._send(self._shell, f". '{path}'\nprintf '\\nended %s\\n' '{path}'\n", path, "definition")

    def close(self) -> None:
        """End both processes, and what the blocks left running."""
        for process in filter(None, (self._python, self._shell)):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def _start(self, command: list[str], env: Mapping[str, str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=self._folder,
            env=dict(env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            bufsize=1,
            start_new_session=True,
        )

    def _write(self, text: str) -> Path:
        self._number += 1
        path = self._work / f"block-{self._number}"
        path.write_text(text, encoding="utf-8")
        return path

    def _with_ports(self, text: str) -> str:
        def port(match: re.Match[str]) -> str:
            return str(self._ports.get(int(match[0]), match[0]))

        return re.sub(r"(?<=127\.0\.0\.1:)\d+|(?<=--port )\d+", port, text)

    def _exported(self) -> dict[str, str]:
        path = self._write("")
        self.define(f"env -0 >'{path}'")
        pairs = path.read_text(encoding="utf-8").split("\0")
        return dict(pair.partition("=")[::2] for pair in pairs if pair)

    def _send(self, process: subprocess.Popen[str], line: str, path: Path, title: str) -> str:
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Timer(BLOCK_S, os.killpg, [process.pid, signal.SIGKILL])
        late.start()
        printed = ""
        try:
            with contextlib.suppress(BrokenPipeError):  # an earlier block has ended the process
                process.stdin.write(line)
                process.stdin.flush()
            for text in process.stdout:
                if text == f"ended {path}\n":
                    return printed.removesuffix("\n")
                printed += text
        finally:
            late.cancel()
        raise AssertionError(f"{title} failed with exit code {process.wait()}:\n{printed}")
