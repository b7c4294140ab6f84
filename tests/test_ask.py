"The ask page, served by Voila, in a real browser: it answers, shows a map, and says what is wrong with what it is given."

import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
BROWSER = next(
    (
        p
        for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))
        if p
    ),
    None,
)
if BROWSER is None:
    print(
        "tests/test_ask.py: no Chromium on this machine, so the ask page is not tested in a browser",
        file=sys.__stderr__,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "A model that has seen forty small pictures once."
    from cmi_mtl.settings import make_settings
    from cmi_mtl.train import train

    folder = tmp_path_factory.mktemp("run")
    train(make_settings("phantom", data_options={"n_images": 60}, epochs=1, device="cpu"), folder)
    # it passes for one of those whose maps were measured
    measured = next((ROOT / "figures/records/grounding").glob("phantom-cmi_mtl-*-test.json"))
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    settings = json.loads(measured.read_text(encoding="utf-8"))["settings"]
    record["settings"] = {k: v for k, v in settings.items() if k not in ("split", "drawn_by")}
    (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")
    return folder / "model"


def upload_limit():
    "The option by which `make ask` takes large files: without it Voila cuts the line at 10 MB."
    option = re.search(
        r"(--Voila.tornado_settings)='(.*?)'", (ROOT / "Makefile").read_text(encoding="utf-8")
    )
    return [f"{option[1]}={option[2]}"] if option else []


@pytest.fixture(scope="module")
def address(model):
    "Voila serving the page, as `make ask` does."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    given = os.path.relpath(model, ROOT)  # seen from the Makefile's folder
    env = {**os.environ, "CMI_MTL_MODEL": given, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "voila",
            "nbs/ask.ipynb",
            "--no-browser",
            f"--port={port}",
            "--Voila.ip=127.0.0.1",
            *upload_limit(),
        ],
        cwd=ROOT,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(300):
            assert server.poll() is None, "voila ended"
            try:
                urllib.request.urlopen(f"{url}voila/static/", timeout=1)
                break
            except urllib.error.HTTPError:
                break
            except OSError:
                time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope="module")
def page(address):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 950})
        page.goto(address, timeout=120_000)
        page.get_by_role("button", name="Ask").wait_for(timeout=120_000)
        page.locator("img[src^=blob]").wait_for(timeout=60_000)
        yield page
        browser.close()


def upload(page, path):
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Upload").click()
    chooser.value.set_files(path)


def shown(page):
    return page.locator("img[src^=blob]").get_attribute("src")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_page_answers_and_shows_a_map(page, tmp_path):
    assert "not for clinical use" in page.inner_text("body")
    chosen = page.get_by_label("Map").evaluate("e => e.selectedOptions[0].text")
    assert chosen == "integrated_gradients"  # best on validation
    before = shown(page)
    page.get_by_role("button", name="Ask").click()
    page.get_by_text("Runners-up").wait_for(timeout=60_000)
    page.get_by_text("How far to trust the map").wait_for(timeout=60_000)
    text = page.inner_text("body")
    assert "%)" in text and "Written by the generator" in text
    how_often = r"inside the right region in \d+ of 100 test cases \(by training: \d[^)]*\)"
    assert re.search(how_often, text)
    assert shown(page) != before
    size = page.locator("img[src^=blob]").evaluate("i => [i.naturalWidth, i.naturalHeight]")
    assert size[0] > 1.5 * size[1]  # picture and map side by side
    page.screenshot(
        path=os.environ.get("CMI_MTL_SCREENSHOT") or tmp_path / "ask.png", full_page=True
    )


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_empty_question_gets_a_message(page):
    page.get_by_label("Question").fill("   ")
    page.get_by_role("button", name="Ask").click()
    page.get_by_text("it is empty").wait_for(timeout=60_000)
    assert "Runners-up" not in page.inner_text("body")
    assert "of 100 test cases" not in page.inner_text("body")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_wrong_file_gets_a_message_and_a_right_one_an_answer(page, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture", encoding="utf-8")
    upload(page, tmp_path / "notes.txt")
    page.get_by_text("notes.txt: cannot be read as an image (of no known kind)").wait_for(
        timeout=60_000
    )
    page.get_by_label("Question").fill("Is this an x-ray?")
    page.get_by_role("button", name="Ask").click()
    page.get_by_text("notes.txt: cannot be read as an image").wait_for(timeout=60_000)
    assert "Runners-up" not in page.inner_text("body")
    assert "of 100 test cases" not in page.inner_text("body")

    import made_data

    (tmp_path / "mine.png").write_bytes(made_data.picture(3))
    upload(page, tmp_path / "mine.png")
    page.get_by_text("notes.txt").wait_for(state="detached", timeout=60_000)
    page.get_by_role("button", name="Ask").click()
    page.get_by_text("Runners-up").wait_for(timeout=60_000)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_large_picture_is_taken(page, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (2048, 2048, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.tif")
    assert (tmp_path / "large.tif").stat().st_size > 12e6
    before = shown(page)
    upload(page, tmp_path / "large.tif")
    page.wait_for_function(
        "before => [...document.querySelectorAll('img[src^=blob]')].some(i => i.src != before)",
        arg=before,
        timeout=60_000,
    )


def test_python_of_the_readme_runs(model, tmp_path):
    "With this model in place of the one that `make run` leaves, and another table's questions."
    from cmi_mtl.datasets import load_dataset

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", readme, re.M | re.S))
    theirs, samples = tmp_path / "theirs.csv", load_dataset("phantom", n_images=60)[:12]
    columns = ("image", "question", "answer")
    with open(theirs, "w", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows([columns, *([getattr(s, c) for c in columns] for s in samples)])
    places = {"runs/train/phantom/cmi_mtl/seed0/model": str(model), "theirs.csv": str(theirs)}
    for written, here in places.items():
        assert code.count(written) == 1
        code = code.replace(written, here)
    found = {}
    exec(code, found)
    assert found["heat"].min() >= 0 and found["heat"].max() <= 1
    assert [r["question"] for r in found["rows"]] == [s.question for s in samples]
    assert all(r["correct"] in (True, False) for r in found["rows"])
