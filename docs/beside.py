"""The lecture beside the code: a page for each script, its equations and lines lit together.

python -m docs.beside            # all pages, to docs/_site; open docs/_site/index.html
python -m docs.beside FOLDER     # or elsewhere

Everything comes from what exists: the scripts, the pages in docs, and the diffs of the README. A
number (n) is the bridge: it stands in a script's docstring, at its lines, and on its page.
"""

import ast
import difflib
import re
import shutil
import struct
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import tyro
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.renderer import RendererHTML
from markupsafe import Markup
from math_core import LatexToMathML
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
NAMES = re.findall(r"^\| \[`(\w+)\.py`\]", README, flags=re.M)  # in the order of its table
DIFFS = re.findall(r"^diff (\w+)\.py (\w+)\.py +# (.+)$", README, flags=re.M)  # old, new, idea
TEXTS = ["results", "environments", "runs", "errata"]  # pages without code, to which others link
NUMBER = r"(?<!\w)\((\d{1,2})\)"  # of an equation
SCRIPT = "|".join(NAMES)


@dataclass(frozen=True)
class Script:
    """What the text of a script says about its equations."""

    name: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def equations(self) -> dict[int, str]:
        """Number of each equation in the docstring, and the function it names there."""
        found = re.findall(r"^    .*\((\d+)\) +(\w+)$", ast.get_docstring(self.tree), flags=re.M)
        return {int(number): function for number, function in found}

    @cached_property
    def nodes(self) -> dict[str, ast.FunctionDef | ast.ClassDef]:
        """Functions and classes by their names."""
        kinds = ast.FunctionDef | ast.ClassDef
        return {node.name: node for node in self.tree.body if isinstance(node, kinds)}

    @cached_property
    def definitions(self) -> dict[str, range]:
        """Lines of each function and class, decorators included."""
        found = {}
        for name, node in self.nodes.items():
            first = min([node.lineno, *(part.lineno for part in node.decorator_list)])
            found[name] = range(first, node.end_lineno + 1)
        return found

    @cached_property
    def marks(self) -> dict[int, list[int]]:
        """Numbers at each line that has some, in a comment or a string."""
        lines = enumerate(self.text.splitlines(), start=1)
        found = {line: numbers_in(text) for line, text in lines}
        return {line: numbers for line, numbers in found.items() if numbers}

    @cached_property
    def start(self) -> int:
        """The line after the settings; the code of the algorithm comes below."""
        return self.definitions["Args"].stop

    @cached_property
    def lit(self) -> dict[int, set[int]]:
        """Lines of each equation: those with its number; its function, if the docstring has it."""
        found = defaultdict(set)
        for line, numbers in self.marks.items():
            for number in numbers:
                found[number].add(line)
        for number, function in self.equations.items():
            if number in numbers_in(ast.get_docstring(self.nodes[function]) or ""):
                found[number].update(self.definitions[function])
        return found

    @cached_property
    def homes(self) -> dict[int, int]:
        """The line that each equation stands beside: its function, or its first line in train."""
        found = {}
        for number, function in self.equations.items():
            lines = self.definitions[function]
            marked = [line for line in lines if number in self.marks.get(line, [])]
            found[number] = marked[0] if function == "train" and marked else lines.start
        return found

    @cached_property
    def echoes(self) -> list[tuple[int, int]]:
        """(line, number) where a comment names an equation, first in each other function."""
        found = {}
        texts = self.text.splitlines()
        for function, lines in self.definitions.items():
            for line in lines if lines.start >= self.start else ():
                _, _, comment = texts[line - 1].partition("  # ")
                for number in numbers_in(comment):
                    if self.homes.get(number) not in lines:
                        found.setdefault((function, number), line)
        return [(line, number) for (_, number), line in found.items()]

    def places(self, number: int) -> list[range]:
        """Where the lines of an equation are, below the settings."""
        places = []
        for line in sorted(line for line in self.lit[number] if line >= self.start):
            if places and line == places[-1].stop:
                places[-1] = range(places[-1].start, line + 1)
            else:
                places.append(range(line, line + 1))
        return places


def numbers_in(text: str) -> list[int]:
    """Numbers of equations; (5) to (7) are three."""
    found = [int(number) for number in re.findall(NUMBER, text)]
    for first, last in re.findall(rf"{NUMBER} to {NUMBER}", text):
        found += range(int(first) + 1, int(last))
    return found


@cache
def script(name: str) -> Script:
    return Script(name, (ROOT / f"{name}.py").read_text())


@cache
def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text()


def formulas(text: str) -> list[tuple[int, str, str]]:
    """(number, LaTeX, explanation) of each equation of a script's page."""
    equations = section(text, "Equations")
    parts = re.split(r"^\$\$(.+?) *\\tag\{(\d+)\}\$\$$", equations, flags=re.M)
    return [(int(n), latex, words.strip()) for latex, n, words in zip(*[iter(parts[1:])] * 3)]


def section(text: str, title: str) -> str:
    return sections(text).get(title, "")


def sections(text: str) -> dict[str, str]:
    """Text under each heading of level 2; under "" what stands before the first."""
    first, *parts = re.split(r"^## (.+)\n", text, flags=re.M)
    return {"": first} | dict(zip(parts[::2], parts[1::2]))


def unpaired(code: Script, text: str) -> set[int]:
    """Numbers that lack a partner: in the docstring, on the page, or at a line below it."""
    named = set(code.equations)
    shown = {number for number, _, _ in formulas(text)}
    marked = {number for number in code.lit if code.places(number)}
    return (named | shown | marked) - (named & shown & marked)


@dataclass(frozen=True)
class Item:
    """A row of docs/lecture.md."""

    number: int
    title: str  # the heading above the row
    says: str
    see: list[str]  # what to run or look at, the functions, the tests
    errata: list[int]

    @property
    def scripts(self) -> list[str]:
        """Those whose functions or commands the row names; if none, those of its tests."""
        text = " ".join(self.see)
        named = re.findall(rf"`(?:python |diff \w+\.py )?({SCRIPT})\.\w|\]\(({SCRIPT})\.md", text)
        names = [first or second for first, second in named]
        names = names or [owner_of_test(test) for test in re.findall(r"`(test_\w+)`", text)]
        return [name for name in dict.fromkeys(names) if name in NAMES]

    def numbers(self, name: str) -> list[int]:
        """Equations of a script that the row names."""
        parts = [part for part in self.see if f"`{name}." in part]
        return [number for part in parts for number in numbers_in(part)]


@cache
def owner_of_test(test: str) -> str:
    """The script by which the file of a test is named, if by one."""
    for path in (ROOT / "tests").glob("test_*.py"):
        if f"def {test}(" in path.read_text():
            return path.stem.removeprefix("test_")
    return ""


def items() -> list[Item]:
    """The rows of docs/lecture.md, in their order."""
    found = []
    for title, text in sections(page("lecture")).items():
        for number, says, see in re.findall(r"^\| (\d+) \| (.+) \| (.+) \|$", text, flags=re.M):
            number = int(number)
            own = [erratum for erratum, (about, _) in errata().items() if number in about]
            found.append(Item(number, title, says, see.split("<br>"), own))
    return found


@cache
def errata() -> dict[int, tuple[list[int], str]]:
    """Items that each erratum belongs to, and its text."""
    rows = re.findall(r"^(\d+)\. \*(Items? .+?)\.\* (.+)$", page("errata"), flags=re.M)
    return {int(n): ([int(x) for x in re.findall(r"\d+", about)], x) for n, about, x in rows}


def exercises(name: str) -> list[tuple[int, str, int | None]]:
    """(number, text, equation) of each exercise; the equation is the first that it names."""
    found = []
    text = section(page(name), "Exercises")
    for number, words in re.findall(r"^(\d+)\. (.+)$", text, flags=re.M):
        found.append((int(number), words, subject(name, words)))
    return found


def subject(name: str, text: str) -> int | None:
    """The equation whose number, function or flag stands first in a text."""
    explanations = {number: words for number, _, words in formulas(page(name))}
    for number, function, flag in re.findall(rf"{NUMBER}|`(\w+)`|`(--[\w-]+[^`]*)`", text):
        if number:
            return int(number)
        for equation, named in script(name).equations.items():
            if function == named:
                return equation
        for part in (flag, flag.split(" ")[0]):
            for equation, words in explanations.items():
                if part and f"`{part}" in words:
                    return equation
    return None


MATH = LatexToMathML()


def math(latex: str, display: bool = False) -> Markup:
    """MathML. A browser never breaks a formula, so it is several, and its words stand between."""
    ends = r"(?<= [=+-] )|(?<=quad )|(?<=arrow )|(?<=approx )"
    parts = [""]
    for piece in filter(None, re.split(rf"(\\text{{[^{{}}]* [^{{}}]*}},?)|{ends}", latex)):
        if all(parts[-1].count(start) == parts[-1].count(end) for start, end in ("{}", "()")):
            parts.append("")
        parts[-1] += piece
    html = ""
    for part in parts[1:]:
        if words := re.fullmatch(r"\\text{(.+)}(,?)", part):
            html += escapeHtml(words[1] + words[2])
        else:
            html += MATH.convert_with_local_state(part + "{}", displaystyle=display)
    return Markup(html)


def color(text: str, language: str) -> str:
    formatter = HtmlFormatter(nowrap=True)
    return highlight(text, get_lexer_by_name(language, stripnl=False), formatter)


def links(text: str, page: str = "") -> Markup:
    """Each (n) in some HTML becomes a link to its equation, on this page or on another."""
    light = "" if page else r' data-eq="\1"'
    return Markup(re.sub(NUMBER, rf'<a class="number" href="{page}#eq\1"{light}>(\1)</a>', text))


@cache
def places() -> dict[str, str]:
    """Where a file is on the pages made here; a figure is on the first that explains it."""
    found = {f"{name}.md": f"{name}.html" for name in NAMES + TEXTS}
    found |= {f"../{name}.py": f"{name}.html" for name in NAMES}
    found |= {"lecture.md": "index.html", "../README.md": "index.html"}
    for name in NAMES + TEXTS:
        for path in re.findall(r"!\[[^]]*\]\((figures/.+?)\)", page(name)):
            found.setdefault(path, f"{name}.html#figure-{Path(path).stem}")
    return found


def target_of(link: str) -> str | None:
    """Where a link of the docs leads to: to a page made here, elsewhere, or nowhere."""
    path, hash, part = link.partition("#")
    if path.startswith("http") or not path:
        return link
    return places()[path] + hash + part if path in places() else None


def anchor(title: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def size_of(image: Path) -> tuple[int, int]:
    """Width and height of a PNG."""
    return struct.unpack(">II", image.read_bytes()[16:24])


class Renderer(RendererHTML):
    """HTML of the docs; env["page"] is that of the equations whose numbers a text has, if any."""

    def text(self, tokens, index, options, env):
        text = escapeHtml(tokens[index].content)
        if index and tokens[index - 1].type == "math_inline" and text[0] in ".,:;)":
            text = f"\u2060{text}"  # no line begins with it
        return links(text, env["page"]) if "page" in env else text

    def code_inline(self, tokens, index, options, env):
        text = tokens[index].content
        code = re.sub(r"--[\w-]+", r'<span class="flag">\g<0></span>', escapeHtml(text))
        code = f"<code>{code}</code>"
        match = re.fullmatch(rf"({SCRIPT})\.(\w+)", text)
        if match and match[2] in script(match[1]).definitions:
            line = script(match[1]).definitions[match[2]].start
            return f'<a href="{match[1]}.html#L{line}">{code}</a>'
        return code

    def link_open(self, tokens, index, options, env):
        target = target_of(tokens[index].attrs["href"])
        return f'<a href="{escapeHtml(target)}">' if target else "<a>"

    def image(self, tokens, index, options, env):
        path = tokens[index].attrs["src"]
        width, height = size_of(DOCS / path)
        alt = escapeHtml(tokens[index].content)
        place = f'id="figure-{Path(path).stem}" width="{width}" height="{height}"'
        return f'<img {place} src="{path}" alt="{alt}">'

    def heading_open(self, tokens, index, options, env):
        return f'<{tokens[index].tag} id="{anchor(tokens[index + 1].content)}">'

    def table_open(self, tokens, index, options, env):
        return '<div class="scroll" tabindex="0" role="group" aria-label="table"><table>'

    def table_close(self, tokens, index, options, env):
        return "</table></div>"


MARKDOWN = MarkdownIt(
    "commonmark",
    {"highlight": lambda text, language, _: color(text, language or "text")},
    renderer_cls=Renderer,
)
MARKDOWN.enable("table")
MARKDOWN.use(dollarmath_plugin, renderer=lambda text, kind: math(text, kind["display_mode"]))


def render(text: str) -> Markup:
    return Markup(MARKDOWN.render(text, {}))


def render_line(text: str) -> Markup:
    return Markup(MARKDOWN.renderInline(text, {}))


def render_own(text: str) -> Markup:
    """A text from a script's page in docs, for the page of that script."""
    return Markup(MARKDOWN.render(text, {"page": ""}))


def see(part: str, name: str = "") -> Markup:
    """A part of the right column of docs/lecture.md, for the page of a script or for another."""
    named = re.search(rf"`({SCRIPT})\.\w+`", part)
    if not named:
        return render_line(part)
    page = "" if named[1] == name else f"{named[1]}.html"
    return Markup(MARKDOWN.renderInline(part, {"page": page}))


def figures(item: Item) -> list[dict]:
    """The figures that an item shows, and where their explanation is."""
    found = []
    for text, path in re.findall(r"\[figure: (.+?)\]\((figures/\w+\.png)\)", " ".join(item.see)):
        width, height = size_of(DOCS / path)
        found.append({"alt": text, "src": path, "width": width, "height": height})
        found[-1]["href"] = target_of(path)
    return found


@dataclass
class Line:
    number: int
    html: Markup
    indent: int
    equations: list[int]
    new: bool


def colored_lines(code: Script) -> list[Line]:
    found = []
    plain = code.text.splitlines()
    colored = color(code.text, "python").splitlines()
    for number, (text, html) in enumerate(zip(plain, colored, strict=True), start=1):
        equations = sorted(x for x, lines in code.lit.items() if number in lines)
        indent = len(text) - len(text.lstrip())
        found.append(Line(number, links(html), indent, equations, new=False))
    return found


def changes(old: Script, new: Script) -> tuple[set[int], dict[int, list[str]]]:
    """Lines of the new script that the old one lacks; those that are gone, before each line."""
    before, after = old.text.splitlines(), new.text.splitlines()
    added, gone = set(), {}
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for kind, first, last, start, stop in matcher.get_opcodes():
        if kind != "equal":
            added |= set(range(start + 1, stop + 1))
            if last > first:
                gone[start + 1] = before[first:last]
    return added, gone


def chunks(lines: list[Line], breaks: set[int]) -> list[list[Line]]:
    """The lines, divided before each of `breaks`."""
    found = [[]]
    for line in lines:
        if line.number in breaks and found[-1]:
            found.append([])
        found[-1].append(line)
    return found


def notes(name: str) -> Iterator[dict]:
    """What a page says about each equation of its script."""
    for number, latex, words in formulas(page(name)):
        yield {
            "number": number,
            "math": math(latex, display=True),
            "words": render_own(words),
            "places": script(name).places(number),
            "exercises": [(n, render_own(x)) for n, x, about in exercises(name) if about == number],
        }


def script_page(name: str, old: str = "", idea: str = "") -> str:
    """The page of a script, or that of its diff to an old one."""
    code = script(name)
    lines = colored_lines(code)
    added, gone = changes(script(old), code) if old else (set(), {})
    for line in lines:
        line.new = line.number in added
    texts = sections(page(name))
    titles = [x for x in texts if x not in ("", "Equations", "Exercises")]
    equations = {equation["number"]: equation for equation in notes(name)}
    full, echoes = defaultdict(list), defaultdict(list)
    for number, line in code.homes.items():
        full[line].append(equations[number])
    for line, number in code.echoes:
        echoes[line].append(equations[number])
    heading, about, *lead = texts[""].strip().split("\n\n")
    return TEMPLATES.get_template("script.html").render(
        name=name,
        old=old,
        idea=idea,
        title=heading.removeprefix("# "),
        about=render_line(about),
        lead=render_own("\n\n".join(lead)),
        the_diff=render_own(texts.get("The diff", "")),
        counts=(len(added), sum(len(x) for x in gone.values())),
        equations=equations,
        full=full,
        echoes=echoes,
        gone=gone,
        chunks=chunks(lines, {*full, *echoes, *gone}),
        items=[item for item in items() if name in item.scripts],
        sections=[render_own(f"## {x}\n\n{texts[x]}") for x in titles],
        exercises=[(n, render_own(x)) for n, x, about in exercises(name) if not about],
    )


def text_page(name: str) -> str:
    title = page(name).splitlines()[0].removeprefix("# ")
    body = render(page(name))
    return TEMPLATES.get_template("text.html").render(title=title, body=body)


def index_page() -> str:
    title, lead = README.split("\n\n")[:2]
    titles = {name: page(name).splitlines()[0].removeprefix("# ") for name in NAMES}
    roots = [name for name in NAMES if name not in {new for _, new, _ in DIFFS}]
    about = re.search(r"\n\n(.+?\.) ", page("lecture"))[1]
    return TEMPLATES.get_template("index.html").render(
        title=title.removeprefix("# "),
        lead=render_line(lead),
        about=render_line(about),
        titles=titles,
        roots=roots,
        items=items(),
    )


def build(folder: Path) -> None:
    """All pages, their figures and their style."""
    shutil.copytree(DOCS / "figures", folder / "figures", dirs_exist_ok=True)
    shutil.copy(DOCS / "templates" / "style.css", folder)
    pages = {"index": index_page()}
    pages |= {name: script_page(name) for name in NAMES}
    pages |= {f"{old}-{new}": script_page(new, old, idea) for old, new, idea in DIFFS}
    pages |= {name: text_page(name) for name in TEXTS}
    for name, text in pages.items():
        (folder / f"{name}.html").write_text(text)


TEMPLATES = Environment(
    loader=FileSystemLoader(DOCS / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.globals |= {"NAMES": NAMES, "DIFFS": DIFFS, "see": see, "render_line": render_line}
TEMPLATES.globals |= {"figures": figures, "errata": errata}


def main(folder: tyro.conf.Positional[Path] = DOCS / "_site") -> None:
    build(folder)
    print(f"open {folder / 'index.html'}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
