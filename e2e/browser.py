"""Drives the playground as a person would: python browser.py URL KEY CHROMIUM PICTURE.

Runs in an environment with Playwright and nothing of Pagoda; `playground.py` starts it.
"""

from __future__ import annotations

import sys

from playwright.sync_api import Page, expect, sync_playwright

TOOLS = """[{"type": "function", "function": {"name": "weather", "parameters":
  {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}}}]"""
EXTRA = '{"top_p": 0.9}'
# Controls that nothing names for those who cannot see them.
NAMELESS = """() => [...document.querySelectorAll("button, input, textarea, select")].filter(
  (node) => !(node.textContent.trim() || node.ariaLabel || node.labels?.length)).map(
  (node) => node.outerHTML)"""


def ask(page: Page, question: str) -> None:
    page.get_by_label("Message").fill(question)
    page.keyboard.press("Enter")


def give_key_and_settings(page: Page, key: str) -> None:
    """The page asks for the key by itself, and tells what is no JSON."""
    settings = page.get_by_role("dialog", name="Settings")
    expect(settings).to_be_visible()
    expect(settings.get_by_role("alert")).to_contain_text("asks for an API key")
    expect(settings.get_by_label("API key")).to_be_focused()
    settings.get_by_label("API key").fill(key)
    settings.get_by_label("Other fields").fill("[")
    settings.get_by_role("button", name="Done").click()
    expect(settings.get_by_role("alert")).to_contain_text("not a JSON object")
    settings.get_by_label("Other fields").fill(EXTRA)
    settings.get_by_role("button", name="Done").click()
    expect(settings).to_be_hidden()
    expect(page.get_by_label("Model")).to_have_value("scripted")


def see_an_answer(page: Page) -> None:
    """Reasoning apart, words as they are meant, nothing run, and the figures."""
    ask(page, "What is a pagoda?")
    answer = page.locator("#log > li").last
    expect(answer).to_have_class("busy")
    expect(answer.locator("details")).to_contain_text("A pagoda is a tower")
    expect(answer.locator(".facts")).to_contain_text("tokens/s", timeout=15_000)
    expect(page.get_by_role("button", name="Again")).to_be_visible(timeout=15_000)
    expect(answer.locator("strong")).to_have_text("pagoda")
    expect(answer.locator("li")).to_have_count(2)
    expect(answer.locator("pre code")).to_contain_text("len(pagoda.eaves)")
    expect(answer.locator(".text")).to_contain_text("<img src=x onerror=alert(1)>")
    expect(answer.locator("img")).to_have_count(0)
    expect(answer.locator(".facts")).to_contain_text("first token")
    answer.locator("summary").click()
    expect(answer.locator("details")).to_have_attribute("open", "")


def answer_a_tool(page: Page) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Tools").fill(TOOLS)
    page.get_by_role("button", name="Done").click()
    ask(page, "How will the weather be in Kyōto?")
    call = page.locator(".call")
    expect(call.locator("b")).to_have_text("weather")
    expect(call.locator("pre").first).to_contain_text('"city": "Kyōto"')
    result = page.get_by_label("Result of weather")
    expect(result).to_be_focused()
    result.fill("sunny")
    page.keyboard.press("Enter")
    expect(page.locator("#log > li").last).to_contain_text("It will be sunny")


def stop_and_begin_anew(page: Page) -> None:
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    ask(page, "Go on for ever.")
    expect(page.locator("#log > li").last).to_contain_text("goes on")
    page.keyboard.press("Escape")
    expect(page.locator("#log > li").last.locator(".facts")).to_contain_text("stopped")
    page.get_by_label("Message").press("ArrowUp")
    expect(page.get_by_label("Message")).to_have_value("Go on for ever.")
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("#log > li")).to_have_count(0)
    expect(page.get_by_text("Ask the model something")).to_be_visible()


def change_the_light(page: Page) -> None:
    ground = "() => getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.get_by_role("button", name="Light or dark").click()
    assert page.evaluate(ground) != light
    page.reload()
    assert page.evaluate(ground) != light, "the choice is forgotten"
    page.set_viewport_size({"width": 360, "height": 640})
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360


def main(url: str, key: str, browser: str, picture: str) -> None:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1100, "height": 1000}, color_scheme="light")
        problems: list[str] = []
        hosts: set[str] = set()
        page.on("pageerror", lambda error: problems.append(str(error)))
        # The 401 that the page answers by asking for the key is told on the console, too.
        page.on(
            "console",
            lambda line: (
                problems.append(line.text)
                if line.type == "error" and "401" not in line.text
                else None
            ),
        )
        page.on("request", lambda request: hosts.add("/".join(request.url.split("/")[:3])))
        page.goto(f"{url}/")
        give_key_and_settings(page, key)
        see_an_answer(page)
        answer_a_tool(page)
        page.screenshot(path=picture)
        stop_and_begin_anew(page)
        change_the_light(page)
        assert not (nameless := page.evaluate(NAMELESS)), nameless
        assert hosts <= {url, "data:,"}, hosts
        assert not problems, problems
        chromium.close()
    print(f"The page works in Chromium {chromium.version}; its picture is {picture}.")


if __name__ == "__main__":
    main(*sys.argv[1:])
