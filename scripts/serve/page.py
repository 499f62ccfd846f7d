"""The page in headless Chromium: page.py URL PICTURE. Needs playwright and a chromium in the path.

By keyboard alone: ask, read the answer as it comes, stop one, change compensation, begin anew; on a wide screen and on a
phone, dark and light. Nothing outside the server is asked for."""

import pathlib
import shutil
import sys

from playwright.sync_api import sync_playwright

url, picture = sys.argv[1].rstrip("/"), pathlib.Path(sys.argv[2])
outside, wrong = [], []
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])

    def open_page(width, height, scheme, **more):
        page = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **more).new_page()
        page.on("request", lambda request: request.url.startswith(url) or outside.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(url + "/")
        page.get_by_text("texts of").wait_for()
        return page

    # What this script looks for is code in a string, which the page's own policy forbids; the phone has that policy.
    page = open_page(1200, 800, "light", bypass_csp=True)
    assert page.evaluate("document.activeElement.id") == "text", "the cursor waits in the field"
    page.keyboard.type("Name three colours.")
    page.keyboard.press("Enter")
    page.wait_for_selector(".assistant .note", timeout=120_000)
    answer = page.inner_text(".assistant")
    assert "tokens/s" in answer, answer
    assert page.locator("#speeds tr").count() == 1
    # Another compensation by keyboard: the table gets a row for it.
    if page.locator("#compensation").is_visible():
        before = page.input_value("[data-k='3']")
        page.focus("[data-k='3']")
        with page.expect_response("**/compensation") as changed:
            page.keyboard.press("Home" if before == "64" else "End")
        assert changed.value.ok, changed.value.text()
        page.focus("#text")
        page.keyboard.type("Name three more.")
        page.keyboard.press("Enter")
        page.wait_for_function("document.querySelectorAll('.assistant .note').length === 2", timeout=120_000)
        assert page.locator("#speeds tr").count() == 2, page.inner_text("#speeds")
        page.evaluate("k => { const r = document.querySelector(\"[data-k='3']\"); r.value = k; r.dispatchEvent(new Event('change')); }", before)
    page.screenshot(path=picture)
    # A long answer, stopped with Escape.
    page.focus("#text")
    page.keyboard.type("Write a very long story.")
    page.keyboard.press("Enter")
    page.wait_for_function("[...document.querySelectorAll('.assistant')].at(-1).textContent.length > 20", timeout=120_000)
    page.keyboard.press("Escape")
    page.wait_for_function("[...document.querySelectorAll('.note')].at(-1).textContent === 'stopped'")
    page.keyboard.press("Alt+n")
    assert page.locator(".turn").count() == 0
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    phone = open_page(390, 800, "dark", has_touch=True, is_mobile=True)
    assert phone.evaluate("getComputedStyle(document.body).backgroundColor") != light, "dark is another colour"
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390, "nothing is cut off"
    assert not phone.locator("aside").is_visible()
    phone.tap("#open")
    assert phone.locator("aside").is_visible() and phone.get_attribute("#open", "aria-expanded") == "true"
    phone.tap("#open")
    phone.fill("#text", "Hello")
    phone.tap("#send")
    phone.wait_for_selector(".assistant .note", timeout=120_000)
    phone.screenshot(path=picture.with_name(picture.stem + "-phone.png"))
    browser.close()
assert not outside, f"asked elsewhere: {outside}"
assert not wrong, wrong
print(f"ok: keyboard, stopping, compensation, phone, dark and light; {picture}")
