"""The explorer as a person uses it, in real Chromium: views, addresses, keys, edits, streams; and widgets on a page."""

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from browsers import PHONE, open_page, run_chromium, wait_until

import saelab as sl

HOOK, D_SAE = "blocks.1.hook_resid_post", 256
HOSTILE = '</script><img src=x onerror="alert(1)">'
SETUP = {"prompt": "Tom saw", "features": [{"feature": 3, "strength": 2, "mode": "add", "unit": "raw"}], "n_tokens": 6}
VIEWS = {
    "#/features": "[data-feature]",
    "#/feature/3": ".fcard",
    "#/prompt?text=Tom+saw+a+dog": ".fires li",
    f"#/steer?setup={json.dumps(SETUP)}": ".moved",
    "#/dead": "figure .main-svg",
    "#/lists": "main form",
}
"""addresses, and what is there once the view is drawn"""


@pytest.fixture(scope="module")
def model() -> Any:
    return sl.load_model("tales", progress=False)


@pytest.fixture(scope="module")
def store(model: Any, tmp_path_factory: pytest.TempPathFactory) -> sl.FeatureStore:
    folder = tmp_path_factory.mktemp("explorer")
    config = sl.SAEConfig(d_in=model.cfg.d_model, d_sae=D_SAE, activation=sl.AbsTopK(k=6))
    sl.SAE(config, seed=2).save_pretrained(folder / "sae")
    tokens = sl.tokenize(model, ["Tom saw a dog. The owl saw Tom.", "The dog was happy."] * 30, ctx_len=16)
    sae = sl.SAE.from_pretrained(folder / "sae")
    return sl.harvest(sae, model, tokens, folder / "store", hook_point=HOOK, progress=False)


@pytest.fixture(scope="module")
def server(store: sl.FeatureStore, model: Any) -> Iterator[Any]:
    with sl.explore(store, model, title=HOSTILE, port=0) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with run_chromium() as made:
        yield made


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    with open_page(browser, lambda url: "127.0.0.1" in url.split("?")[0]) as made:
        yield made


def has(page: Any, text: str) -> None:
    page.get_by_text(text).first.wait_for()


def test_a_reader_finds_a_feature_names_it_and_sends_its_address(server: Any, page: Any) -> None:
    page.goto(server.url)
    has(page, f"{D_SAE} of {D_SAE} features")
    assert page.locator("h1").inner_text() == HOSTILE and page.locator("img").count() == 0
    page.keyboard.press("j")
    page.keyboard.press("j")
    second = page.locator('[data-index="1"]').get_attribute("data-feature")
    assert page.evaluate("document.activeElement.textContent") == second
    page.keyboard.press("Enter")
    page.locator(".fcard").wait_for()
    assert f"#/feature/{second}?" in page.url
    page.get_by_label("Label", exact=True).fill(HOSTILE)
    page.get_by_role("button", name="Save label").click()
    page.locator(".fcard h2", has_text=HOSTILE).wait_for()
    page.get_by_label("Note", exact=True).fill("seen <b>today</b>")
    page.get_by_role("button", name="Save note").click()
    page.locator("footer").get_by_role("button", name="Undo").wait_for()
    page.reload()
    page.locator(".fcard h2", has_text=HOSTILE).wait_for()
    assert page.get_by_label("Note", exact=True).input_value() == "seen <b>today</b>"
    page.keyboard.press("/")
    wait_until(page, "document.activeElement.type === 'search'")
    page.keyboard.type("onerror")
    has(page, f"1 of {D_SAE} features")
    assert page.locator(".rows .row").get_attribute("data-feature") == second and page.locator("img").count() == 0
    page.go_back()
    page.locator(".fcard").wait_for()


def test_a_list_of_many_rows_draws_those_in_view_and_comes_back_to_its_place(server: Any, page: Any) -> None:
    page.goto(server.url + "#/features?sort=feature&order=asc&at=200")
    page.locator('[data-feature="200"]').wait_for()
    assert page.locator(".rows .row").count() < 60 and page.locator('[aria-sort="ascending"]').count() == 1
    page.locator('[data-feature="203"] a').click()
    page.locator(".fcard").wait_for()
    page.keyboard.press("ArrowRight")
    page.wait_for_url(re.compile(r"#/feature/204\?"))
    page.keyboard.press("Escape")
    page.locator('[data-feature="204"]').wait_for()
    page.locator(".filters summary").click()
    page.get_by_label("Kind").select_option("dead")
    page.wait_for_url(re.compile("kind=dead"))


def test_a_prompt_is_read_and_a_feature_of_it_moved(server: Any, page: Any) -> None:
    page.goto(server.url + "#/prompt")
    page.get_by_label("Text", exact=True).fill("Tom saw a dog.")
    page.get_by_role("button", name="Show features").click()
    words = page.locator(".prompt button")
    words.nth(3).click()
    assert page.locator(".fires li").count() > 0 and "token=3" in page.url and "text=Tom" in page.url
    page.locator(".predictions button").first.click()
    page.wait_for_url(re.compile("rank=attribution"))
    page.get_by_role("link", name=re.compile("^Steer feature")).first.click()
    page.get_by_label("Text to go on from").fill("Tom saw")
    page.get_by_label("Tokens").fill("6")
    page.get_by_role("button", name="Write").click()
    has(page, "KL from unsteered")
    texts = {
        name: page.locator(f".streams .{name} .stream").inner_text() for name in ("unsteered", "steered", "random")
    }
    assert all(text.startswith("Tom saw") and len(text) > len("Tom saw ") for text in texts.values())
    page.get_by_label("Name of this set-up").fill("more of it")
    page.get_by_role("button", name="Pin").click()
    address = page.url
    page.goto(server.url + "#/lists")
    page.get_by_role("link", name="more of it").click()
    page.locator(".moved").wait_for()
    page.goto("about:blank")
    page.goto(address)
    page.get_by_role("button", name="Write").wait_for()
    assert page.get_by_label("Text to go on from").input_value() == "Tom saw" and page.locator(".moved").count() == 1


def test_every_view_fits_a_phone_and_has_its_headings_names_and_contrast(server: Any, page: Any) -> None:
    page.set_viewport_size(PHONE)
    for view, drawn in VIEWS.items():
        page.goto("about:blank")
        page.goto(server.url + view)
        page.locator(drawn).first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), view
        levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map(h => Number(h.tagName[1]))")
        assert levels[0] == 1 and all(b <= a + 1 for a, b in pairwise(levels)), (view, levels)
        assert page.evaluate(UNNAMED) == [], view
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate(FAINT) == [], (view, scheme)


UNNAMED = """[...document.querySelectorAll("input, select, textarea, button, a[href]")].filter(one =>
  !(one.getAttribute("aria-label") || one.textContent.trim() || one.labels?.length)).map(one => one.outerHTML)"""
FAINT = """(() => {  // text whose contrast to its background is below 4.5
  const read = color => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(x => x / 255)
    .map(x => (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = one => {
    for (; one; one = one.parentElement) {
      const color = read(getComputedStyle(one).backgroundColor);
      if (color.length < 4 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const holdsText = one => [...one.childNodes].some(node => node.nodeType === 3 && node.data.trim());
  return [...document.querySelectorAll("body *")].filter(one => holdsText(one) && one.checkVisibility()
    && !one.closest(":disabled, [aria-disabled=true], svg")).filter(one => {
    const [a, b] = [read(getComputedStyle(one).color), behind(one)].map(light).sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05) < 4.5;
  }).map(one => one.outerHTML.slice(0, 120));
})()"""


def test_a_page_without_the_token_says_so(server: Any, page: Any) -> None:
    root = re.sub(r"[^/]+/$", "", server.url)
    answer = page.request.get(root)
    assert answer.status == 403 and len(answer.text().splitlines()) == 1


def test_read_only_offers_no_edits(store: sl.FeatureStore, page: Any) -> None:
    with sl.explore(store, read_only=True, port=0) as running:
        page.goto(running.url + "#/feature/3")
        page.locator(".fcard").wait_for()
        assert page.get_by_role("button", name=re.compile("Save|Delete|list$")).count() == 0


STUB = """window.shown = import(URL.createObjectURL(new Blob([ESM], {type: "text/javascript"}))).then(widget => {
  const state = STATE, heard = [];
  window.say = content => heard.forEach(hear => hear(content));
  const model = {
    get: name => state[name], set: (name, value) => { state[name] = value; }, save_changes: () => {},
    on: (_, hear) => heard.push(hear), off: () => {}, send: content => window.ask(JSON.stringify(content)),
  };
  window.state = state;
  widget.default.render({ model, el: document.body });
});"""


def show(page: Any, widget: Any, kernel: bool = True) -> None:
    """The widget on an empty page, with its messages carried to Python and back, or lost without a kernel."""
    answers: list[Any] = []
    widget.send = lambda content, buffers=None: answers.append(json.loads(json.dumps(content)))
    page.expose_function("ask", lambda text: kernel and widget._handle_custom_msg(json.loads(text), []))
    page.goto("about:blank")
    state = {name: getattr(widget, name) for name in ("view", "query", "held", "style")}
    page.evaluate(STUB.replace("ESM", json.dumps(widget._esm)).replace("STATE", json.dumps(state)))
    page.carry = lambda: [page.evaluate("content => window.say(content)", answers.pop(0)) for _ in range(len(answers))]


def wait_for(page: Any, what: str) -> Any:
    found = page.locator(what).first
    for _ in range(200):
        page.carry()
        if found.count():
            return found
        page.wait_for_timeout(50)
    raise AssertionError(f"there is no {what}")


def test_widgets_work_without_a_server(store: sl.FeatureStore, model: Any, browser: Any) -> None:
    pytest.importorskip("anywidget")
    from saelab.explorer import feature_widget, prompt_widget, steering_widget
    from saelab.explorer.live_steering import SteeringSetup

    card = browser.new_page()
    show(card, feature_widget(store, 3))
    assert wait_for(card, ".fcard h2").inner_text().startswith("3 ")
    prompt = browser.new_page()
    show(prompt, prompt_widget(store, model, "Tom saw a dog."))
    wait_for(prompt, ".fires li")
    assert prompt.locator(".prompt button").count() > 4 and prompt.locator("a[href]").count() == 0
    steering = browser.new_page()
    show(steering, steering_widget(store, model, SteeringSetup.from_dict(SETUP)))
    wait_for(steering, ".moved")
    steering.get_by_role("button", name="Write").click()
    wait_for(steering, ".costs")
    assert steering.locator(".steered .stream").inner_text().startswith("Tom saw")
    for shown in (card, prompt, steering):
        shown.close()


def test_a_saved_widget_shows_its_last_answers_without_a_kernel(
    store: sl.FeatureStore, model: Any, browser: Any
) -> None:
    pytest.importorskip("anywidget")
    from saelab.explorer import feature_widget, prompt_widget, steering_widget
    from saelab.explorer.live_steering import SteeringSetup

    made = {
        ".fcard h2": feature_widget(store, 3),
        ".fires li": prompt_widget(store, model, "Tom saw a dog."),
        ".costs": steering_widget(store, model, SteeringSetup.from_dict(SETUP), write=True),
    }
    for mode, background in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(18, 23, 29)")):
        for what, widget in made.items():
            page = browser.new_page(color_scheme="light" if mode == "dark" else "dark")
            show(page, widget, kernel=False)
            wait_for(page, what)
            page.evaluate("is => { document.body.dataset.jpThemeLight = is; }", str(mode == "light").lower())
            wait_until(page, "mode => document.body.firstChild.dataset.theme === mode", arg=mode)
            shown = page.evaluate("getComputedStyle(document.body.firstChild.shadowRoot.firstChild).backgroundColor")
            assert (mode, what, shown) == (mode, what, background)
            page.close()
