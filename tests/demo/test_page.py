"""The page itself: through its API, and in headless Chromium where there is one."""

import gc
import runpy
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dmc_hub.demo.app import Demo, build_app, save_space
from dmc_hub.demo.walks import FOUNDATION

gradio: Any = pytest.importorskip("gradio", reason="Gradio is the extra [demo]", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("ignore")  # those of Gradio and what it imports


@pytest.fixture(scope="module")
def url(folders: Path) -> Iterator[str]:
    app = build_app(Demo([folders / "first/pipeline"], [folders / "gentle/adapter", folders / "bold/adapter"]))
    _, address, _ = app.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, share=False)
    yield address
    app.close()


@pytest.fixture(autouse=True)
def clean_up() -> Iterator[None]:
    """Event loops that Gradio and Playwright left are closed here, where their warnings are ignored."""
    yield
    gc.collect()


def test_an_episode_through_the_api(url: str) -> None:
    from gradio_client import Client

    client = Client(url, verbose=False)
    episode, decision, table = client.predict("first", "bold", 0.25, 4, 2, 0, api_name="/show")
    for picture in (episode, decision):
        assert Path(picture).read_bytes().startswith(b"\x89PNG")
    assert len(table["data"]) == 4
    assert [row[3] for row in table["data"]].count("taken") == 1
    _, scores = client.predict("first", ["bold"], 8, 2, 0, api_name="/compare")
    assert [row[0] for row in scores["data"]] == [FOUNDATION, "bold", "optimum"]


def test_what_is_wrong_is_said(url: str) -> None:
    from gradio_client import Client

    client = Client(url, verbose=False)
    with pytest.raises(Exception, match=r"nothing|not in the list"):
        client.predict("first", "nothing", 0.25, 4, 2, 0, api_name="/show")


def test_chromium_runs_an_episode(url: str, tmp_path: Path) -> None:
    sync_api: Any = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium")
    shown: dict[str, Any] = {}

    def visit() -> None:  # Playwright's own loop does not go with pytest's
        with sync_api.sync_playwright() as playwright:
            options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
            browser = playwright.chromium.launch(executable_path=chromium, args=options)
            page = browser.new_page(viewport={"width": 1280, "height": 1000})
            # Nothing but the page itself is asked for, fonts from elsewhere included.
            page.route(lambda address: not address.startswith((url, "data:")), lambda route: route.abort())
            page.goto(url, wait_until="domcontentloaded")
            page.get_by_role("button", name="Run an episode").click()
            page.wait_for_function("document.querySelectorAll('img[src*=\"/file=\"]').length >= 2", timeout=60_000)
            page.get_by_text("taken").first.wait_for(state="attached", timeout=60_000)
            page.wait_for_timeout(500)
            page.screenshot(path=tmp_path / "page.png")
            shown["widths"] = page.evaluate("[...document.querySelectorAll('img')].map(image => image.naturalWidth)")
            shown["title"] = page.title()
            browser.close()

    thread = threading.Thread(target=visit)
    thread.start()
    thread.join()
    assert shown["title"] == "Nav1D, before and after alignment"
    assert shown["widths"].count(720) >= 2
    assert (tmp_path / "page.png").stat().st_size > 20_000


def test_space_starts(folders: Path, tmp_path: Path) -> None:
    save_space([folders / "first/pipeline"], [folders / "bold/adapter"], tmp_path / "space")
    page = runpy.run_path(str(tmp_path / "space/app.py"), run_name="space")["app"]
    assert isinstance(page, gradio.Blocks)
    assert page.title == "Nav1D, before and after alignment"
