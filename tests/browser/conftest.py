"""One Chromium and one `python -m web` for all tests of the web chat."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from playwright.sync_api import Browser

from tests.support.browser import PageServer, Visit, WebCommand, chromium
from tests.support.serving import pack


@pytest.fixture(scope="session")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebCommand]:
    """Run the page's server and its model server."""

    with WebCommand(pack(tmp_path_factory.mktemp("web"))) as command:
        yield command


@pytest.fixture(scope="package")
def browser(web: WebCommand) -> Iterator[Browser]:
    """Run Chromium. It starts while the model loads.

    It ends with the last test of this folder: while it runs, asyncio takes this thread for one with a running loop, and
    `asyncio.run` of any other test fails.
    """
    with chromium() as browser:
        yield browser


@pytest.fixture
def visit_to(browser: Browser) -> Iterator[Callable[..., Visit]]:
    """Return a function that opens the page at a URL."""
    with ExitStack() as visits:
        yield lambda url, **options: visits.enter_context(Visit.to(browser, url, **options))


@pytest.fixture
def visit(visit_to: Callable[..., Visit], web: WebCommand) -> Visit:
    """Open the page in a wide window."""
    return visit_to(web.url)


@pytest.fixture
def page_server(web: WebCommand) -> Iterator[Callable[..., PageServer]]:
    """Return a function that starts another page's server in this process, in front of the same model server."""
    with ExitStack() as servers:

        def start(**options: Any) -> PageServer:
            return servers.enter_context(PageServer(web.model_url, **options))

        yield start
