"""The page of `frontalis serve` in a real browser: what it shows is what the service answers, and nothing leaves it."""

import asyncio
import json
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import uvicorn
from playwright.sync_api import Browser, expect

import frontalis
from frontalis.service.app import ServiceSettings, create_app
from frontalis.service.server import listen
from tests.report_fixtures import Visit

TOKEN = "a-secret-of-the-tests"
HOSTILE = "<img src=x onerror=\"document.title='pwned'\">"
RELEASE = {
    "release": HOSTILE,
    "created": "2026-01-01T00:00:00+00:00",
    "promoted": False,
    "reason": HOSTILE,
    "compared_with": HOSTILE,
    "report": None,
    "modes": [
        {
            "mode": HOSTILE,
            "role": "raw",
            "mark": HOSTILE,
            "rows": 5,
            "dim": 2,
            "index": "Flat",
            "thresholds": {"1e-2": 0.5},
        }
    ],
    "columns": ["id", "pose", "yaw"],
    "limits": {"body": 9},
    "table": None,
}
NEIGHBOUR = {
    "rank": 1,
    "id": HOSTILE,
    "subject": HOSTILE,
    "shard": HOSTILE,
    "score": 0.7,
    "expanded": None,
    "fmr": 0.01,
}
ANSWER = {
    "mode": HOSTILE,
    "fmr": "1e-2",
    "threshold": 0.5,
    "compared": 5,
    "impostor_pairs": 100,
    "fmr_unknown": HOSTILE,
    "expand": 0,
    "results": [
        {
            "query": HOSTILE,
            "subject": HOSTILE + "2",
            "neighbours": [{**NEIGHBOUR, "match": True, "columns": {"pose": HOSTILE, "yaw": None}}],
        }
    ],
}


@pytest.fixture(scope="module")
def serving(measured_store) -> Iterator[dict[str, str]]:
    """Addresses of two services, one that wants a token."""
    servers, threads, found = [], [], {}
    for name, token in (("open", None), ("guarded", TOKEN)):
        listening = listen("127.0.0.1", 0)
        app = create_app(ServiceSettings(measured_store, refresh=3600.0, token=token))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on"))
        thread = threading.Thread(target=lambda one=server, at=listening: asyncio.run(one.serve(sockets=[at])))
        thread.start()
        servers.append(server)
        threads.append(thread)
        found[name] = f"http://127.0.0.1:{listening.getsockname()[1]}"
    yield found
    for server in servers:
        server.should_exit = True
    for thread in threads:
        thread.join()


def test_a_search_shows_the_neighbours_of_all_modes_side_by_side(
    browser: Browser, serving, measured_store, tmp_path
) -> None:
    with frontalis.open_store(measured_store) as store:
        names = store.opened.rows("raw").ids.to_pylist()
        own = store.opened.rows("raw").subjects.to_pylist()[3]
        by_mode = {mode: store.neighbours(mode, [names[3]], 8) for mode in store.modes}
        threshold = store.threshold("per_sample", 1e-2)
    with Visit(browser) as visit:
        page = visit.page
        page.goto(serving["open"])
        expect(page.locator("#word")).to_have_text("Promoted")
        expect(page.locator("#figures h3").first).to_have_text("frontal–profile")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to search"
        page.get_by_label("Threshold at FMR").select_option("1e-2")
        page.get_by_label("Neighbours").fill("8")
        page.get_by_label("Stored id").fill(names[3])
        page.keyboard.press("Enter")
        page.locator(".hit").nth(23).wait_for()
        assert page.locator(".mode h3").all_text_contents() == ["●raw", "■per_sample", "▲batch_stat"]
        for mode, found in by_mode.items():
            column = page.locator(f"[aria-labelledby=mode-{mode}]")
            assert column.locator(".hit button").all_inner_texts() == found.ids[0].tolist()
            assert [float(text.replace("−", "-")) for text in column.locator(".score").all_inner_texts()] == [
                pytest.approx(score, abs=1e-4) for score in found.scores[0]
            ]
            marks = ["same" in one.get_attribute("class").split() for one in column.locator(".hit").all()]
            assert marks == (found.columns["subject"][0] == own).tolist()
        bars = page.locator("[aria-labelledby=mode-per_sample] .bar").first
        width = bars.bounding_box()["width"]
        line = bars.locator(".line").bounding_box()
        assert (line["x"] + 1 - bars.bounding_box()["x"]) / width == pytest.approx(max(threshold, 0), abs=0.01)
        page.get_by_label("Pose").select_option("profile")
        expect(page.locator(".facts", has_not_text="profile")).to_have_count(0)
        np.save(tmp_path / "new.npy", np.eye(2, 32, dtype=np.float32))
        page.locator("#file").set_input_files(tmp_path / "new.npy")
        expect(page.locator("#answer-title")).to_contain_text("new.npy, row 0")
        page.get_by_label("Row of the file").select_option("1")
        expect(page.locator("#answer-title")).to_contain_text("row 1")
        np.save(tmp_path / "bad.npy", np.eye(2, 31, dtype=np.float32))
        page.locator("#file").set_input_files(tmp_path / "bad.npy")
        expect(page.locator("#status")).to_have_text("vectors: has 31 numbers a row, the index 32.")
        page.get_by_label("Stored id").fill(names[3])
        page.get_by_role("button", name="Search", exact=True).click()
        page.locator(".hit button").first.click()  # search for a neighbour
        expect(page.locator("#answer-title")).not_to_contain_text(names[3])
        refused = "Failed to load resource: the server responded with a status of 400 (Bad Request)"
        assert [one for one in visit.complaints if one != refused] == []
        assert all(one.startswith(serving["open"]) for one in visit.requests)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (360, "light")])
def test_hostile_names_stay_text_and_the_page_fits(browser: Browser, serving, width: int, scheme: str) -> None:
    with Visit(browser, None, width, scheme) as visit:
        page = visit.page
        page.route("**/release", lambda route: route.fulfill(json=RELEASE))
        page.route("**/search", lambda route: route.fulfill(json={"release": HOSTILE, "answers": {"x": ANSWER}}))
        page.goto(f"{serving['open']}/?id=x")
        expect(page.locator(".hit button")).to_have_text(HOSTILE)
        expect(page.locator(".hit .who")).to_have_text("✕ other subject")
        assert (page.title(), page.locator("img").count()) == ("Frontalis: search", 0)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert visit.complaints == []


def test_the_page_asks_for_the_token_and_keeps_it_out_of_scripts(browser: Browser, serving) -> None:
    with Visit(browser) as visit:
        page = visit.page
        page.goto(serving["guarded"])
        page.locator("#token").fill("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#entry-problem")).to_have_text("this is not the token.")
        page.locator("#token").fill(TOKEN)
        page.keyboard.press("Enter")
        expect(page.locator("#word")).to_have_text("Promoted")
        assert TOKEN not in json.dumps(page.evaluate("[document.cookie, {...localStorage}, {...sessionStorage}]"))
        page.reload()
        expect(page.locator("#word")).to_have_text("Promoted")
