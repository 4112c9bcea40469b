"""The report in a real browser: headless Chromium opens the file and uses it."""

import json
import shutil
import time

import pytest

from recbole_gacllm.report.page import write_report
from tests.test_report import SCRIPT, run_with_texts

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="no chromium and chromedriver (apt: chromium-driver)"
    ),
    # selenium waits with sockets that it leaves to the garbage collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
ID = "<img src=x onerror=harm()>&'%zz%\u2028`${1}`"
GENRE = "<i/onclick=harm()>&amp;</script>"
FLAGS = (
    *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
    *("disable-background-networking", "disable-component-update", "disable-sync"),
    "force-prefers-reduced-motion",  # a click must not race with a smooth scroll
)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page of a run with made-up texts; a text holds a script, an id and a genre markup."""
    root = tmp_path_factory.mktemp("report")
    run = run_with_texts(root, {"u23\t": f"{ID}\t", "Horror": GENRE})
    return write_report(run, root / "report.html")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A browser with a profile of its own."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(chromium, report):
    """The report, open; afterwards nothing may stand in the console."""
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    chromium.get("about:blank")
    for kind in ("browser", "performance"):
        chromium.get_log(kind)
    chromium.get(report.as_uri())
    until(lambda: chromium.execute_script("return document.documentElement.dataset.ready"))
    yield chromium
    assert chromium.get_log("browser") == []


def until(condition):
    for _ in range(100):
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("the page did not come to it within 5 seconds")


def find(page, selector):
    return page.find_elements("css selector", selector)


def texts(page, selector):
    return [element.text for element in find(page, selector)]


def search(page, words):
    field = page.find_element("id", "query")
    field.clear()
    field.send_keys(words)
    hits = texts(page, "#hits li")
    field.send_keys("\n")
    return hits


def test_a_search_finds_users_by_id_and_items_by_id_and_title(page):
    assert search(page, "u7")[0].startswith("User u7")
    assert texts(page, "#node h3") == ["User u7"]
    assert search(page, "great film 12")[0].startswith("The Great Film 12")
    assert texts(page, "#node h3") == ["The Great Film 12"]
    search(page, "i5")
    assert texts(page, "#node h3") == ["The Great Film 5"]
    assert search(page, "nothing is called so") == ["Nothing is called so."]


def test_layers_stand_side_by_side_with_new_words_marked_or_one_at_a_time(page):
    search(page, "u7")
    assert len(find(page, ".layer")) == 2
    assert texts(page, ".layer ins") == ["Loved by many."]
    find(page, ".choice button")[1].click()
    assert [card.get_attribute("data-layer") for card in find(page, ".layer")] == ["0"]
    find(page, ".choice button")[2].click()
    assert [card.get_attribute("data-layer") for card in find(page, ".layer")] == ["1"]


def test_removed_words_are_shown_on_request(page):
    search(page, "u0")
    assert find(page, ".layer del") == []
    page.find_element("css selector", ".bar input").click()
    assert find(page, ".layer del")


def test_neighbours_lead_on_and_the_back_button_returns(page):
    search(page, "u3")
    link = page.find_element("css selector", "#node .lists a[href^='#item']")
    title = link.text
    link.click()
    assert texts(page, "#node h3") == [title]
    page.back()
    until(lambda: texts(page, "#node h3") == ["User u3"])


def test_recommendations_that_were_held_out_are_marked_in_both_lists(page):
    n_marked = 0
    for user in range(24):
        search(page, f"u{user}")
        lists = find(page, "#node .lists section")[:2]
        titles = [{link.text for link in one.find_elements("tag name", "a")} for one in lists]
        marked = [
            {
                row.find_element("tag name", "a").text
                for row in one.find_elements("tag name", "li")
                if "✓" in row.text
            }
            for one in lists
        ]
        assert marked == [titles[0] & titles[1]] * 2
        n_marked += len(marked[0])
        if n_marked > 2:
            break
    assert n_marked > 0


def test_a_script_in_a_description_is_shown_as_text(page):
    search(page, "u0")
    assert SCRIPT in texts(page, ".layer p")[1]
    assert page.execute_script("return window.harmed") is None


def test_an_id_that_looks_like_markup_is_text_and_has_an_address(page):
    search(page, "onerror")
    title = f"User {ID}".replace("\u2028", " ")
    assert texts(page, "#node h3")[0].replace("\u2028", " ") == title
    page.refresh()
    until(lambda: page.execute_script("return document.documentElement.dataset.ready"))
    assert texts(page, "#node h3")[0].replace("\u2028", " ") == title
    page.find_element("css selector", "#node .lists a[href^='#item']").click()
    for foreign in ("img", "[onclick]", "[onerror]"):
        assert find(page, foreign) == []
    assert len(find(page, "script")) == 2


@pytest.mark.parametrize(
    "address",
    ["user=%zz", "item=%", "user=%E0%A4%A", "user=", "user=nobody", "user=__proto__", "%"],
)
def test_an_address_of_no_node_opens_the_page_as_ever(page, report, address):
    page.get("about:blank")
    page.get(f"{report.as_uri()}#{address}")
    until(lambda: page.execute_script("return document.documentElement.dataset.ready"))
    assert len(texts(page, "#node h3")) == 1
    page.get(f"{report.as_uri()}#{address}x")  # within the page


def test_the_theme_follows_the_system_and_the_switch(page):
    colours = {}
    for theme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": theme}]
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        until(lambda theme=theme: shown_theme(page) == theme)
        colours[theme] = page.execute_script("return getComputedStyle(document.body).color")
    page.find_element("id", "theme").click()
    assert shown_theme(page) == "light"
    assert page.execute_script("return getComputedStyle(document.body).color") == colours["light"]
    assert colours["light"] != colours["dark"]


def shown_theme(page):
    return page.execute_script("return document.documentElement.dataset.theme")


def test_nothing_overflows_a_phone(page):
    metrics = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page.refresh()
    until(lambda: page.execute_script("return document.documentElement.dataset.ready"))
    search(page, "u0")
    assert page.execute_script("return document.documentElement.scrollWidth") == 360
    outside = """return [...document.querySelectorAll("main *")].filter((e) => {
        const box = e.getBoundingClientRect();
        return box.right > 361 && !e.closest(".scroll") && !e.closest("svg");
    }).map((e) => e.outerHTML.slice(0, 90))"""
    assert page.execute_script(outside) == []


def test_the_map_names_the_item_under_the_pointer(page):
    panel = page.find_element("css selector", "svg.map")
    page.execute_script(
        """const panel = arguments[0], path = panel.querySelector(".dots");
        const [, x, y] = /M(\\d+) (\\d+)h0/.exec(path.getAttribute("d"));
        const at = new DOMPoint(+x, +y).matrixTransform(panel.getScreenCTM());
        panel.dispatchEvent(new PointerEvent("pointermove", { clientX: at.x, clientY: at.y }));""",
        panel,
    )
    assert texts(page, ".found-name")[0].startswith("The Great Film")


def test_the_page_asks_for_nothing_but_itself(page, report):
    asked = [
        message["params"]["request"]["url"]
        for entry in page.get_log("performance")
        if (message := json.loads(entry["message"])["message"])["method"]
        == "Network.requestWillBeSent"
    ]
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
