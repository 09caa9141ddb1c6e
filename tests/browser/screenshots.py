"""Take the pictures of the web chat in docs/img. `make screenshots` runs this; look at the result."""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from playwright.sync_api import expect

from deploy.options import Parser
from tests.support.browser import DESKTOP, DRAWING, PHONE, PICTURE, REPO, Visit, WebCommand, chromium
from tests.support.serving import pack

FOLDER = REPO / "docs" / "img"
MOST_BYTES = 150_000
TALL = {"width": 1360, "height": 980}
QUESTIONS = ("Which shapes are there?", "How many shapes are there?", "Is there a star?")


def main(argv: Sequence[str] | None = None) -> int:
    """Take all pictures. Return the exit code."""
    parser = Parser(prog="make screenshots", description=__doc__)
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="DIR", help="default: docs/img")
    parser.add_argument("--url", help="address of a page that runs (default: start one)")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.url:
        take(args.url, args.output)
        return 0
    with tempfile.TemporaryDirectory() as folder, WebCommand(pack(Path(folder))) as web:
        take(web.url, args.output)
    return 0


def take(url: str, folder: Path) -> None:
    """Take all pictures of the page at a URL."""
    with chromium() as browser:
        with Visit.to(browser, url, viewport=TALL, color_scheme="light") as visit:
            talk(visit, measured=2)
            visit.chat.locator(".panel").evaluate("(panel) => (panel.scrollTop = 0)")
            save(visit, folder / "web-desktop.png")
        with Visit.to(browser, url, viewport=DESKTOP, color_scheme="dark") as visit:
            talk(visit, measured=0)
            visit.page.locator("#new-chat").click()
            visit.open(DRAWING)
            visit.ask(QUESTIONS[0])
            visit.ask(QUESTIONS[2])
            save(visit, folder / "web-dark.png")
        with Visit.to(browser, url, viewport=PHONE, has_touch=True, is_mobile=True) as visit:
            visit.open(DRAWING)
            visit.ask(QUESTIONS[0])
            visit.ask(QUESTIONS[2])
            save(visit, folder / "web-phone.png")


def talk(visit: Visit, measured: int) -> None:
    """Ask all questions about the example picture, and measure the last ones without a session."""
    visit.open(PICTURE)
    for question in QUESTIONS:
        visit.ask(question)
    for index in range(len(QUESTIONS))[len(QUESTIONS) - measured :]:
        visit.page.locator(f"[data-compare='{index}']").click()
        row = visit.page.locator(".bars li").filter(has=visit.page.locator(f"[data-compare='{index}']"))
        expect(row.locator("[data-verdict]")).to_be_visible()


def save(visit: Visit, path: Path) -> None:
    """Save the window as a PNG with a palette."""
    expect(visit.page.locator("[data-place=resident]").first).to_be_attached()
    picture = Image.open(io.BytesIO(visit.page.screenshot())).convert("RGB")
    # This method keeps colours that are rare, such as that of the dot in the header.
    palette = picture.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    palette.save(path, optimize=True)
    size = path.stat().st_size
    print(f"{path}: {size:,} bytes")
    if size > MOST_BYTES:
        raise SystemExit(f"{path} must be at most {MOST_BYTES:,} bytes, got {size:,}")


if __name__ == "__main__":
    sys.exit(main())
