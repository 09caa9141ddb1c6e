"""Chromium of the system, driven by Playwright, and the page's server."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import uvicorn
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect, sync_playwright

from deploy.serve.configuration import PUBLIC_METRICS_VARIABLE
from tests.support.commands import kill_tree
from tests.support.serving import START_S
from web.application import make_app
from web.command import hosts_of, listen

REPO = Path(__file__).resolve().parents[2]
PICTURE = REPO / "picture.png"
DRAWING = REPO / "web" / "page" / "examples" / "drawing.png"
PATIENCE_MS = 120_000
DESKTOP = {"width": 1360, "height": 860}
PHONE = {"width": 390, "height": 844}
_LOADING_FAILED = "Failed to load resource"

expect.set_options(timeout=PATIENCE_MS)


def chromium_path() -> str:
    """Return the path of Chromium. Raise `AssertionError` if it is missing."""
    names = [os.environ.get("CHROMIUM", "chromium"), "chromium-browser", "google-chrome"]
    found = next(filter(None, map(shutil.which, names)), None)
    assert found, "no Chromium; run scripts/need_chromium.sh --install"
    return found


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Run Chromium without a window."""
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has no sandbox for root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=sandbox)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Visit:
    """A page in a context of its own, whose requests to other hosts are blocked.

    `asked`: the blocked requests. `errors`: errors of the console and of scripts. `may_fail`: whether replies with an
    error status are part of the test; the browser itself logs each of them.
    """

    page: Page
    origin: str
    asked: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    may_fail: bool = False

    @classmethod
    @contextlib.contextmanager
    def to(cls, browser: Browser, url: str, **options: Any) -> Iterator[Visit]:
        """Open the page. At the end, assert that nothing else was asked and that no error was logged."""
        context: BrowserContext = browser.new_context(**{"viewport": DESKTOP, "reduced_motion": "reduce", **options})
        context.set_default_timeout(PATIENCE_MS)
        visit = cls(context.new_page(), url)
        context.route("**/*", visit._pass_own)
        visit.page.on("console", lambda message: message.type == "error" and visit.errors.append(message.text))
        visit.page.on("pageerror", lambda error: visit.errors.append(str(error)))
        # With a listener from the start, Playwright intercepts every file chooser, also one that opens at once.
        visit.page.on("filechooser", lambda chooser: None)
        try:
            visit.load()
            yield visit
            visit.check()
        finally:
            context.close()

    def load(self) -> None:
        """Load the page and wait until its script runs."""
        self.page.goto(self.origin)
        self.page.locator("html[data-loaded]").wait_for()

    def check(self) -> None:
        """Assert that no other host was asked, and that no error was logged."""
        assert self.asked == []
        assert [text for text in self.errors if not (self.may_fail and _LOADING_FAILED in text)] == []

    def _pass_own(self, route: Route) -> None:
        url = route.request.url
        if url.startswith((f"{self.origin}/", "blob:", "data:")):
            route.continue_()
        else:
            self.asked.append(url)
            route.abort()

    # --- what a person does ---

    def open(self, picture: Path = PICTURE) -> None:
        """Choose a picture on the start page, and wait for the chat."""
        with self.page.expect_file_chooser() as chooser:
            self.page.locator(".start [data-choose]").click()
        chooser.value.set_files(picture)
        expect(self.page.locator(".start")).to_have_count(0)
        self.page.locator(".chat").last.wait_for()

    def ask(self, question: str) -> str:
        """Ask in the chat that was opened last, and return the answer."""
        chat = self.chat
        turns = chat.locator("[data-turn]").count()
        chat.locator("[data-text]").fill(question)
        chat.locator("[data-text]").press("Enter")
        self.settled()
        expect(chat.locator("[data-turn]")).to_have_count(turns + 1)
        return self.answers()[-1]

    def settled(self) -> None:
        """Wait until no chat is answering."""
        expect(self.page.locator(".chat[data-busy]")).to_have_count(0)

    def answers(self) -> list[str]:
        """Return the answers of the chat that was opened last."""
        return self.chat.locator("[data-turn] .answer > .text").all_inner_texts()

    @property
    def chat(self) -> Any:
        """The chat that was opened last."""
        return self.page.locator(".chat").last


class PageServer:
    """The page's server in a thread of this process."""

    def __init__(self, endpoint: str, **options: Any) -> None:
        """`options`: as for `make_app`."""
        self._listener = listen("127.0.0.1", 0)
        port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.app = make_app(endpoint, hosts_of("127.0.0.1", port, []), **options)
        self._server = uvicorn.Server(uvicorn.Config(self.app, log_level="warning", timeout_graceful_shutdown=2))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]})

    def __enter__(self) -> PageServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._listener.close()


class WebCommand:
    """`python -m web` with its own model server, as `make web` runs it."""

    def __init__(self, model_store: Path, *options: str) -> None:
        command = [sys.executable, "-m", "web", "--port", "0", "--model-store", str(model_store), *options]
        environment = {**os.environ, PUBLIC_METRICS_VARIABLE: "on", "PYTHONPATH": f"{REPO}:{REPO / 'client'}"}
        self.process = subprocess.Popen(
            command, cwd=REPO, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.lines: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if line.startswith("web chat: "):
                self._ready.set()
        self._ready.set()

    @property
    def url(self) -> str:
        """The page's address."""
        return self._found(r"web chat: (http://\S+)")

    @property
    def model_url(self) -> str:
        """The model server's address."""
        return self._found(r"\(server (http://[^;]+);")

    def _found(self, pattern: str) -> str:
        assert self._ready.wait(START_S), self.lines
        found = next(filter(None, (re.search(pattern, line) for line in self.lines)), None)
        assert found, self.lines
        return found[1]

    def kill_model_server(self) -> None:
        """Kill TorchServe."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.name() == "java":
                    child.kill()

    def __enter__(self) -> WebCommand:
        return self

    def __exit__(self, *_: object) -> None:
        kill_tree(self.process)
        self.process.wait()
        self._reader.join()
        self.process.stdout.close()
