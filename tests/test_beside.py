"""The pages that set the lecture beside the code, as files and in a browser.

The browser is a Chromium on the PATH: apt install chromium. AXE_CORE names a copy of axe.min.js,
which `npm pack axe-core` fetches. What needs one of them is skipped without it.
"""

import os
import re
import shutil
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from docs import beside

BROWSERS = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
BROWSER = next(filter(None, BROWSERS), "")
AXE = os.environ.get("AXE_CORE", "")
PAGES = ["index", *beside.NAMES, *(f"{old}-{new}" for old, new, _ in beside.DIFFS), *beside.TEXTS]
EQUATIONS = [(name, number) for name in beside.NAMES for number in beside.script(name).equations]
WIDTHS = (390, 1440)
THEMES = ("light", "dark")


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The folder of the pages, and the seconds that they took."""
    folder = tmp_path_factory.mktemp("site")
    start = time.perf_counter()
    beside.build(folder)
    return folder, time.perf_counter() - start


@pytest.fixture(scope="session")
def site(built):
    return built[0]


class Page(HTMLParser):
    """The ids of a page, and what it links to and loads."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads = [], [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs["href"]] if tag == "a" and "href" in attrs else []
        if tag in ("img", "script"):
            self.loads.append(attrs["src"])
        if tag == "link":
            self.loads.append(attrs["href"])


@pytest.fixture(scope="session")
def pages(site):
    return {path.stem: Page(path) for path in site.glob("*.html")}


@pytest.mark.parametrize("name", beside.NAMES)
def test_every_number_has_its_partners(name):
    """In the docstring, on the script's page in docs, and at a line of the code."""
    assert len(beside.script(name).equations) >= 5
    assert beside.unpaired(beside.script(name), beside.page(name)) == set()


def test_a_number_without_a_partner_is_found():
    code, text = beside.script("naf"), beside.page("naf")
    lost = replace(code, text=re.sub(r"  # \(5\)|, \(4\) to \(6\)", "", code.text))
    assert beside.unpaired(lost, text) == {5}
    lost = replace(code, text=re.sub(r"\(5\)  train", "train", code.text))
    assert beside.unpaired(lost, text) == {5}
    assert beside.unpaired(code, text.replace(r"\tag{7}", r"\tag{8}")) == {7, 8}


def test_the_lines_of_an_equation():
    text = '''"""Title.

    a = b        (1)  double
    c = d        (2)  train
    e = f        (3)  double

(1) is first.
"""
class Args:
    pass
@cache
def double(a):
    """(1) or (3)."""
    return a
def train():
    """(2) twice: not here."""
    step(3)
    b = double(a)  # (1) to (3)
    c = d  # (2)
'''
    code = beside.Script("made_up", text)
    assert code.equations == {1: "double", 2: "train", 3: "double"}
    assert code.lit[1] == {3, 7, 11, 12, 13, 14, 18}
    assert code.lit[2] >= {18, 19} and code.lit[3] >= {11, 12, 13, 14, 18}
    assert code.homes == {1: 11, 2: 16, 3: 11}
    assert code.echoes == [(18, 1), (18, 3)]
    assert code.places(1) == [range(11, 15), range(18, 19)]


def test_every_page_is_made(pages):
    assert set(pages) == set(PAGES)
    assert len(beside.NAMES) == 7 and len(beside.DIFFS) == 5
    assert {f"{old}-{new}.html" for old, new, _ in beside.DIFFS} <= set(pages["index"].links)


def test_every_item_of_the_lecture_is_reached_from_the_index(pages):
    """All 52 in order; each but the overview leads to where it stands beside its script."""
    shown = [int(x[5:]) for x in pages["index"].ids if x.startswith("item-")]
    assert shown == list(range(1, 53))
    for item in beside.items()[1:]:
        assert item.scripts, item
        for name in item.scripts:
            assert f"{name}.html#item-{item.number}" in pages["index"].links
            assert f"item-{item.number}" in pages[name].ids
            assert all(figure["src"] in pages[name].loads for figure in beside.figures(item))


def test_every_erratum_stands_at_its_item(site, pages):
    assert list(beside.errata()) == list(range(1, 27))
    for number, (about, _) in beside.errata().items():
        for item in beside.items():
            if item.number in about:
                for name in item.scripts:
                    assert f"erratum-{number}" in pages[name].ids
                    text = (site / f"{name}.html").read_text()
                    (section,) = re.findall(rf'id="item-{item.number}".+?</section>', text, re.S)
                    assert f"Erratum {number}" in section
    shown = {x for name in beside.NAMES for x in pages[name].ids if x.startswith("erratum-")}
    assert shown == {f"erratum-{number}" for number in range(1, 27)}


def test_every_item_of_the_errata_exists():
    numbers = {item.number for item in beside.items()}
    assert all(about and set(about) <= numbers for about, _ in beside.errata().values())


@pytest.mark.parametrize("name", beside.NAMES)
def test_every_exercise_is_shown_once(name, site):
    text = (site / f"{name}.html").read_text()
    numbers = [number for number, _, _ in beside.exercises(name)]
    assert len(numbers) >= 3
    assert sorted(re.findall(r"<b>Exercise (\d+)\.", text)) == [str(x) for x in numbers]


def test_an_exercise_stands_at_the_equation_that_it_names():
    assert {n: about for n, _, about in beside.exercises("cem_q")} == {1: 9, 2: 1, 3: None}
    assert {n: about for n, _, about in beside.exercises("dqn")} == {1: 2, 2: 7, 3: 5, 4: 6}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole(name, site, pages):
    """Its ids are unique, its links lead somewhere, and nothing comes from another machine."""
    ids = pages[name].ids
    assert len(ids) == len(set(ids))
    for link in pages[name].links:
        path, _, anchor = link.partition("#")
        if not path.startswith("http"):
            target = Path(path).stem or name
            assert target in pages, link
            assert not anchor or anchor in pages[target].ids, link
    assert all(load == "data:," or (site / load).is_file() for load in pages[name].loads)


def test_every_formula_is_set(site):
    """Nothing of LaTeX is left, neither in a formula nor around it."""
    for path in site.glob("*.html"):
        text = path.read_text()
        formulas = re.findall(r"<math.+?</math>", text)
        assert formulas or path.stem in ("index", "results", "environments", "runs")
        assert not any("\\" in formula or "merror" in formula for formula in formulas)
        assert "$" not in re.sub(r"<(code|pre)>.+?</\1>", "", text, flags=re.S)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_weighs_at_most_1_mb(name, site, pages):
    files = {load for load in pages[name].loads if load != "data:,"} | {f"{name}.html"}
    assert sum((site / file).stat().st_size for file in files) <= 1_000_000


def test_the_pages_are_built_in_20_seconds(built):
    assert built[1] <= 20


@pytest.mark.parametrize("name", beside.NAMES)
def test_the_code_is_that_of_the_script(name, site):
    """Word for word, line by line."""
    text = (site / f"{name}.html").read_text()
    lines = re.findall(r'id="L(\d+)".+?</a><span[^>]*>(.*?)\n</span></span>', text)
    assert [int(number) for number, _ in lines] == list(range(1, len(lines) + 1))
    assert [plain(html) for _, html in lines] == beside.script(name).text.splitlines()


def plain(html):
    parser, parts = HTMLParser(), []
    parser.handle_data = parts.append
    parser.feed(html)
    parser.close()
    return "".join(parts)


@pytest.mark.parametrize(("old", "new"), [(old, new) for old, new, _ in beside.DIFFS])
def test_a_diff_lights_the_lines_that_are_new(old, new, site):
    """With the lines that are gone in place of those that are new, it is the old script again."""
    added, gone = beside.changes(beside.script(old), beside.script(new))
    text = (site / f"{old}-{new}.html").read_text()
    assert {int(x) for x in re.findall(r'class="line new" id="L(\d+)"', text)} == added
    before = []
    for number, line in enumerate(beside.script(new).text.splitlines(), start=1):
        before += gone.get(number, []) + ([] if number in added else [line])
    assert before == beside.script(old).text.splitlines()


def luminance(color):
    shares = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares]
    return sum(x * weight for x, weight in zip(linear, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("theme", THEMES)
def test_colors_can_be_read_on_each_other(theme):
    """Also on lines that are lit; 4.5 is what WCAG asks of small text."""
    style = (beside.DOCS / "templates" / "style.css").read_text()
    blocks = re.findall(r":root \{(.+?)\}", style, re.S)
    colors = dict(re.findall(r"--(\w+): (#\w{6})", blocks[THEMES.index(theme)]))
    behind = {colors.pop(name) for name in ("paper", "panel", "lit", "new")}
    assert len(behind) == 4 and colors.pop("rule") and len(colors) >= 9
    for name, color in colors.items():
        for back in behind:
            dark, light = sorted((luminance(color), luminance(back)))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, back)


@pytest.fixture(scope="session")
def chromium():
    if not BROWSER:
        pytest.skip("no Chromium on the PATH: apt install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, site):
    """visit(page, width, theme) opens it; in the end nothing was said or asked for outside."""
    contexts, said, asked = [], [], []

    def open_page(name, width=1440, theme="light"):
        viewport = {"width": width, "height": 900}
        contexts.append(chromium.new_context(viewport=viewport, color_scheme=theme))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        path, _, anchor = name.partition("#")
        page.goto(f"{(site / path).as_uri()}.html#{anchor}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert all(url.startswith((site.as_uri(), "data:")) for url in asked)


def lit_lines(page):
    """Numbers of the lines that differ from the panel behind the code."""
    return page.evaluate(
        """() => [...document.querySelectorAll('.line[id]')]
            .filter(line => getComputedStyle(line).boxShadow !== 'none')
            .map(line => Number(line.id.slice(1)))"""
    )


def lit_equations(page):
    return page.evaluate(
        """() => [...document.querySelectorAll('.equation')]
            .filter(note => getComputedStyle(note).boxShadow !== 'none')
            .map(note => Number(note.id.slice(2)))"""
    )


@pytest.mark.parametrize("name", beside.NAMES)
def test_equations_and_lines_light_each_other(name, visit):
    """By the pointer: an equation its lines and no others; each of the lines its equations."""
    page = visit(name)
    code = beside.script(name)
    assert lit_lines(page) == lit_equations(page) == []
    for number in code.equations:
        page.hover(f"#eq{number} .formula")
        assert lit_lines(page) == sorted(code.lit[number])
        assert any(line >= code.start for line in lit_lines(page))
    for line in (line for line in code.marks if line >= code.start):
        page.hover(f"#L{line}", position={"x": 100, "y": 5})
        numbers = [n for n in sorted(code.equations) if line in code.lit[n]]
        assert numbers and sorted(lit_equations(page)) == numbers
    page.hover("h1")
    assert lit_lines(page) == []


def test_a_click_holds_the_light(visit):
    page = visit("dqn")
    page.click("#eq4 .formula")
    assert page.url.endswith("dqn.html#eq4")
    page.hover("h1")
    assert lit_lines(page) == sorted(beside.script("dqn").lit[4])
    page.hover("#eq6 .formula")
    assert lit_lines(page) == sorted(beside.script("dqn").lit[6])


def test_links_to_a_line_and_to_an_equation(visit):
    page = visit("dqn#L120")
    assert page.evaluate("document.querySelector('#L120').getBoundingClientRect().top") < 900
    color = "getComputedStyle(document.querySelector('#L{}')).backgroundColor"
    assert page.evaluate(color.format(120)) != page.evaluate(color.format(119))
    page = visit("dqn#eq4")
    assert lit_lines(page) == sorted(beside.script("dqn").lit[4])


def test_the_keyboard_is_enough(visit):
    """The first stop skips the links on top; each equation is a stop that lights its lines."""
    page = visit("naf")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    seen = set()
    for _ in range(400):
        page.keyboard.press("Tab")
        href = page.evaluate("document.activeElement.getAttribute('href')")
        width = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
        if href is None and page.evaluate("document.activeElement === document.body"):
            break
        assert width == "2px", href
        note = page.evaluate("document.activeElement.closest('.equation')?.id")
        if note and page.evaluate("document.activeElement.className") == "formula":
            number = int(note[2:])
            assert set(beside.script("naf").lit[number]) <= set(lit_lines(page))
            seen.add(number)
    assert seen == set(beside.script("naf").equations)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_nothing_sticks_out_of_a_page(name, width, visit):
    page = visit(name, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # nor is anything cut off, but in a box that scrolls
    wide = page.evaluate(
        """() => [...document.querySelectorAll('main *:not(math *)')]
            .filter(x => !x.closest('.scroll, .formula'))
            .filter(x => getComputedStyle(x).display !== 'inline')
            .filter(x => x.getBoundingClientRect().right > innerWidth + 0.5
                || x.matches('.line > span') && x.scrollWidth > x.clientWidth)
            .map(x => x.outerHTML.slice(0, 80))"""
    )
    assert wide == []


BOXES = """() => {
    const boxes = [...document.querySelectorAll('.equation, .line[id]')].map(x => {
        const box = x.getBoundingClientRect()
        return [x.id, [box.left, box.top, box.right, box.bottom]]
    })
    return Object.fromEntries(boxes)
}"""


@pytest.mark.parametrize("name", beside.NAMES)
def test_on_a_phone_equations_stand_between_the_lines(name, visit):
    boxes = visit(name, 390).evaluate(BOXES)
    for number, line in beside.script(name).homes.items():
        _, top, _, bottom = boxes[f"eq{number}"]
        assert boxes[f"L{line - 1}"][3] <= top and bottom <= boxes[f"L{line}"][1]


@pytest.mark.parametrize("medium", ["screen", "print"])
@pytest.mark.parametrize("name", beside.NAMES)
def test_on_a_wide_page_equations_stand_left_of_the_code(name, medium, visit):
    page = visit(name, 1440 if medium == "screen" else 1047)  # A4 without its margins
    page.emulate_media(media=medium)
    boxes = page.evaluate(BOXES)
    notes = [boxes[f"eq{number}"] for number in beside.script(name).homes]
    lines = [box for key, box in boxes.items() if key.startswith("L")]
    assert max(right for _, _, right, _ in notes) <= min(left for left, _, _, _ in lines)
    for number, line in beside.script(name).homes.items():
        assert boxes[f"eq{number}"][1] >= boxes[f"L{line}"][1] - 5  # never above its line
    for first in notes:  # nor over another
        for second in notes:
            assert first is second or first[3] <= second[1] or second[3] <= first[1]


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_nothing_serious(name, width, theme, visit):
    if not Path(AXE).is_file():
        pytest.skip("AXE_CORE is not the path of axe.min.js")
    page = visit(f"{name}#eq1", width, theme)  # one equation is lit
    page.evaluate(Path(AXE).read_text())
    found = page.evaluate("axe.run({preload: false}).then(results => results.violations)")
    assert [x["id"] for x in found if x["impact"] in ("serious", "critical")] == []
