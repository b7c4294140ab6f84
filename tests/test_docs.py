"The site that `make docs` builds: a page for each notebook, in order; links that lead somewhere; nothing from elsewhere."

import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("mkdocs", "material", "mkdocstrings_handlers", "mathjax")
LACKING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(LACKING), reason=f"the site cannot be built without {', '.join(LACKING)}: make .venv/ready"
)
# What a page loads when it is looked at; an <a> only leads somewhere.
LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


class Page(HTMLParser):
    "Of a page its links, what it loads, its ids, its navigation, and its text."

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.ids, self.navigation = [], [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids.add(given.get("id"))
        if tag in LOADING and given.get(LOADING[tag]):
            self.loads.append(given[LOADING[tag]])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
            if "md-nav__link" in (given.get("class") or "").split():
                self.navigation.append(given["href"])


def build(top, site):
    "The result of `mkdocs build` that would fetch by way of a proxy which is not there."
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    env = {**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", site]
    return subprocess.run(command, cwd=top, env=env, capture_output=True, encoding="utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "Path below the site -> page."
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    found = sorted(p for p in site.rglob("*.html") if p.name != "404.html")
    return {p.relative_to(site).as_posix(): Page(p.read_text(encoding="utf-8")) for p in found}


def test_every_notebook_has_a_page_in_reading_order(pages):
    seen = [h for h in pages["index.html"].navigation if "://" not in h and "#" not in h]
    seen = list(dict.fromkeys("index.html" if h == "." else h for h in seen))
    of_notebooks = [h for h in seen if not h.startswith("api/")]
    nbs = ROOT / "nbs"
    notebooks = [p.relative_to(nbs).with_suffix(".html") for p in nbs.rglob("[!.]*.ipynb")]
    assert sorted(of_notebooks) == sorted(p.as_posix() for p in notebooks)
    groups = [list(g) for _, g in itertools.groupby(of_notebooks, lambda h: h.split("/")[0])]
    assert of_notebooks[:3] == ["index.html", "00_paper.html", "01_core.html"]
    assert all(h.startswith("experiments/") for h in of_notebooks[-len(groups[-1]) :])
    rooms = [Path(h).name for h in of_notebooks if Path(h).name[0].isdigit()]
    assert rooms == sorted(rooms), "by number; rooms of the appendix after their front door"
    assert seen[-1].startswith("api/") and "api/fvta.html" in seen


def test_every_internal_link_leads_somewhere(site, pages):
    wrong = []
    for name, page in pages.items():
        for href in page.links + page.loads:
            parts = urlsplit(urljoin(f"http://site/{name}", href))
            if parts.netloc != "site" or parts.scheme != "http":
                continue
            target = unquote(parts.path).lstrip("/") or "index.html"
            target = f"{target}index.html" if target.endswith("/") else target
            there = pages[target].ids if target in pages else {""}
            if not (site / target).is_file() or unquote(parts.fragment) not in there | {""}:
                wrong.append((name, href))
    assert not wrong


def test_nothing_is_loaded_from_another_host(site, pages):
    assert not [
        (name, load)
        for name, page in pages.items()
        for load in page.loads
        if urlsplit(load).netloc or load.startswith("//")
    ]
    styles = [p.read_text(encoding="utf-8") for p in site.rglob("*.css")]
    assert styles and not re.search(r"@import|url\(\s*[\"']?(https?:)?//", "".join(styles))


def test_directives_are_done_and_not_shown(site, pages):
    text = {name: (site / name).read_text(encoding="utf-8") for name in pages}
    assert not [name for name, t in text.items() if 'class="c1">#|' in t]
    fvta = text["22_fvta.html"]
    assert fvta.count('<details class="example">') == 3 and "api/fvta.html" in fvta
    assert "summary_table(published)" not in text["index.html"], "a hidden cell"
    assert "<table>" in text["index.html"], "what it shows"
    assert 'class="arithmatex"' in fvta and "tex-svg-full.js" in pages["22_fvta.html"].loads
    assert (site / "tex-svg-full.js").stat().st_size > 1e6
    assert "QFormer" in text["api/fvta.html"] and "learned queries" in text["api/fvta.html"]


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1400])
def test_formulas_stand_in_a_browser(site, width):
    "Opened as files, at the width of a phone and of a desk: MathJax draws, and nothing is fetched."
    sync = pytest.importorskip("playwright.sync_api")
    asked, errors = [], []
    with sync.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((site / "22_fvta.html").as_uri())
        page.wait_for_selector("div.arithmatex mjx-container svg", state="attached")
        widths = page.evaluate(
            "[...document.querySelectorAll('div.arithmatex svg')].map(e => e.clientWidth)"
        )
        wrong = page.evaluate("document.querySelectorAll('[data-mjx-error]').length")
        scrolls = page.evaluate("document.documentElement.scrollWidth")
        browser.close()
    assert widths and min(widths) > 50, "a displayed formula is not drawn"
    assert not wrong and not errors and scrolls <= width
    assert not [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]
