"""The console in a real Chromium: log-in, fleet and device page, live updates, a server lost and found again."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

sys.path.insert(0, str(Path(__file__).parent.parent / "unit" / "server_data"))  # the worlds that both floors share

from data_world import birth, bundle, desire, enrol, event, report
from web_world import PASSWORD, Web, running_web

from fleet_server.adapters.database.registry import DatabaseDesiredStates, DatabaseReleases
from fleet_server.ports import Batch
from protocol.messages import Resources, RunningModel
from protocol.states import DeploymentState, RejectReason

pytestmark = pytest.mark.browser
HOSTILE = "<img src=x onerror=alert(1)>"
MINUTE = 60_000


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    with running_web(tmp_path_factory.mktemp("browser")) as running:
        seed(running)
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path="/usr/bin/chromium", headless=True, args=flags)
        yield opened
        opened.close()


@pytest.fixture
def context(browser: Browser, web: Web) -> Iterator[BrowserContext]:
    opened = browser.new_context(base_url=web.url)
    opened.set_default_timeout(15_000)
    yield opened
    opened.close()


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """A page that fails the test when a script fails or the content policy is broken."""
    opened = context.new_page()
    complaints: list[str] = []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on(
        "console", lambda message: complaints.append(message.text) if "Content Security" in message.text else None
    )
    opened.on("dialog", lambda dialog: complaints.append(dialog.message))
    yield opened
    assert complaints == []


def seed(running: Web) -> None:
    now = running.clock()
    minute = now - now % MINUTE
    one, two = bundle(1, sha256="a" * 64), bundle(2, sha256="b" * 64, title=HOSTILE)
    DatabaseReleases(running.engine).add_bundles([one, two])
    enrol(running.engine, "cam-1", "cam-2", labels={"site": "oslo"})
    DatabaseDesiredStates(running.engine).save_desired(desire("cam-1", 2, two))
    model = RunningModel(
        model="digits",
        state=DeploymentState.ROLLED_BACK,
        version=1,
        digest=one.sha256,
        reason=RejectReason.CRASHED_IN_PROBATION,
    )
    born = birth(at=now - 5000, models=(model,), director_version=2, facts={"kernel": HOSTILE})
    reports = [
        report(
            number,
            digest="a" * 16,
            start=minute - number * MINUTE,
            requests=100,
            truth=((0, 0, 95), (1, 0, 5)),
            resources=Resources(cpu=250, memory=10**9),
        )
        for number in range(1, 5)
    ]
    running.telemetry.store(
        Batch(
            states=[("cam-1", born)],
            reports=[("cam-1", r) for r in reports],
            events=[("cam-1", event(1, at=now - 6000, version=2, state=DeploymentState.ROLLED_BACK, detail=HOSTILE))],
            received_at=now,
        )
    )


def log_in(page: Page) -> None:
    page.goto("/")
    page.wait_for_url("**/login")
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Log in").click()
    page.wait_for_selector("#live")


def test_a_wrong_password_is_said_and_the_right_one_opens_the_fleet(page: Page) -> None:
    page.goto("/devices/cam-1")
    page.wait_for_url("**/login")
    page.get_by_label("Password").fill("wrong")
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("alert")).to_contain_text("wrong")
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("heading", name="Fleet")).to_be_visible()
    page.get_by_role("button", name="Log out").click()
    page.wait_for_url("**/login")


def test_the_fleet_shows_presence_versions_and_accuracy_with_its_evidence(page: Page) -> None:
    log_in(page)
    row = page.get_by_role("row", name="cam-1").first
    for words in (
        "online",
        "v1",
        "wanted v2",
        "rolled back",
        "the data plane died while it was on probation",
        "95.0 %",
        "n = 400",
        "25 %",
    ):
        expect(row).to_contain_text(words)
    expect(page.get_by_role("row", name="cam-2").first).to_contain_text("no model assigned")
    expect(page.locator(".events")).to_contain_text(HOSTILE)


def test_the_fleet_page_follows_what_happens_and_keeps_focus(page: Page, web: Web) -> None:
    log_in(page)
    page.locator("#device-cam-1").focus()
    now = web.clock()
    late = event(7, spool="later", at=now, version=9, state=DeploymentState.STAGED, detail="just now")
    web.telemetry.store(Batch(events=[("cam-2", late)], received_at=now))
    expect(page.locator(".events")).to_contain_text("just now")
    assert page.evaluate("document.activeElement.id") == "device-cam-1"


def test_a_device_has_charts_and_the_same_as_a_table_that_stays_open(page: Page) -> None:
    log_in(page)
    page.locator("#device-cam-1").click()
    expect(page.get_by_role("heading", name="cam-1", exact=True)).to_be_visible()
    expect(page.get_by_role("img", name="Accuracy of digits per minute")).to_be_visible()
    page.get_by_text("Show as table").click()
    table = page.get_by_role("region", name="digits as a table")
    expect(table.get_by_role("row")).to_have_count(5)
    with page.expect_response(lambda answer: "fragment=1" in answer.url):
        pass
    page.wait_for_timeout(300)
    expect(table).to_be_visible()
    expect(page.get_by_text(HOSTILE).first).to_be_visible()


def test_a_lost_server_is_said_and_found_again(page: Page, context: BrowserContext) -> None:
    log_in(page)
    context.set_offline(True)
    expect(page.get_by_role("status")).to_contain_text("Server lost")
    context.set_offline(False)
    expect(page.get_by_role("status")).to_be_hidden()


@pytest.mark.parametrize("path", ["/", "/devices/cam-1", "/models"])
def test_nothing_sticks_out_on_a_narrow_screen(page: Page, path: str) -> None:
    page.set_viewport_size({"width": 375, "height": 700})
    log_in(page)
    page.goto(path)
    page.wait_for_selector("#live")
    assert page.evaluate("document.documentElement.scrollWidth") == 375


def test_without_scripts_the_pages_are_all_there(browser: Browser, web: Web) -> None:
    plain = browser.new_context(base_url=web.url, java_script_enabled=False)
    page = plain.new_page()
    log_in(page)
    page.get_by_role("link", name="Models").click()
    expect(page.get_by_role("heading", name="digits")).to_be_visible()
    expect(page.get_by_role("row", name="v1")).to_contain_text("n = 400")
    plain.close()
