"""What the site is made of: pages, the Markdown on them, and where notebooks and modules become pages."""
import re
from collections import Counter
from dataclasses import dataclass, field
from html import escape
from posixpath import dirname, relpath
from urllib.parse import urldefrag

import nbformat
from api import Module
from nbconvert.filters.markdown_mistune import IPythonRenderer
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

FOLDERS = {  # in reading order; other folders follow
    "nbs": "Read and run", "nbs/ideas": "The ideas", "nbs/data": "Data sets", "nbs/encoder": "Encoders",
    "nbs/methods": "Methods", "nbs/evaluator": "Evaluation", "nbs/trainer": "Training", "nbs/show": "Pictures",
    "nbs/retriever": "Search", "nbs/studies": "Studies",
}
SHOWN = ["image/png", "image/jpeg", "image/svg+xml", "text/html", "text/markdown", "text/plain"]  # the first that is there
PROGRESS = "application/vnd.jupyter.widget-view+json"  # progress bars; a page shows what its widgets do as a picture, too
FIGURE = "<p class='note'>A figure that is drawn when the notebook is run.</p>"


@dataclass
class Page:
    "A page: where it comes from (below the checkout), where it goes (below the site), what it holds."
    source: str
    target: str
    group: str
    title: str
    subtitle: str = ""
    body: str = ""
    headings: list = field(default_factory=list)  # (level, anchor, text)
    module: Module | None = None
    notebook: str = ""  # the notebook that a module comes from

    def link(self, target):
        "A place of the site, seen from this page."
        path, fragment = urldefrag(target)
        return relpath(path, dirname(self.target) or ".") + f"#{fragment}" * bool(fragment)

    def heading(self, level, text):
        "A heading with an anchor of its own, spelled as GitHub spells it."
        plain = re.sub(r"<[^>]+>", "", text)
        anchor = spelled(plain)
        taken = [name for _, name, _ in self.headings]
        anchor = next(name for name in (anchor, *(f"{anchor}-{n}" for n in range(1, 99))) if name not in taken)
        self.headings.append((level, anchor, plain))
        return f'<h{level} id="{anchor}">{text} <a class="anchor" href="#{anchor}" aria-label="link">#</a></h{level}>\n'


def spelled(heading):
    "A heading, or JupyterLab's anchor of it, as GitHub spells the anchor."
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def without_links(html): return re.sub(r"</?a\b[^>]*>", "", html)


class Renderer(IPythonRenderer):
    "Markdown of a file in folder `base`: links lead to pages, formulas are MathML, names in code font lead to their definition."

    def __init__(self, site, page, base):
        super().__init__(escape=False)
        self.site, self.page, self.base = site, page, base

    def heading(self, text, level, **attributes): return self.page.heading(level, without_links(text))

    def link(self, text, url, title=None):
        return super().link(without_links(text), self.site.address(self.page, self.base, url), title)

    def image(self, text, url, title=None):
        return super().image(text, self.site.address(self.page, self.base, url), title)

    def codespan(self, text):
        if re.fullmatch(r"test_\w+", text): return super().codespan(self.site.test(self.page, text)).replace("::", "::<wbr>")
        target = self.site.names.get(text.removesuffix("()")) if re.search(r"[A-Z_.(]", text) else None
        code = super().codespan(text)
        return f'<a href="{self.page.link(target)}">{code}</a>' if target else code

    def inline_math(self, body): return self.site.formula(self.page, body, "inline")

    def block_math(self, body): return self.site.formula(self.page, body, "block")

    def latex_environment(self, name, body): return self.block_math(rf"\begin{{{name}}}{body}\end{{{name}}}")


def coloured(code): return highlight(code, PythonLexer(), HtmlFormatter())


def cell_html(cell, markdown):
    "A cell as readers see it: without directives, and nothing of a hidden one. `markdown` makes HTML of Markdown."
    if cell.cell_type == "markdown": return markdown(cell.source)
    directives = set(re.findall(r"^#\s*\|\s*(\w+)", cell.source, re.M))
    code = re.sub(r"^#\s*\|.*\n?", "", cell.source, flags=re.M).strip()
    if cell.cell_type != "code" or not code or directives & {"hide", "default_exp"}: return ""
    outputs = "".join(output_html(output, markdown) for output in cell.outputs)
    if directives & {"hide_input", "echo"}: return outputs
    kind = "library" if "export" in directives else "example"
    return f'<div id="cell-{cell.id}" class="{kind}">{coloured(code)}</div>\n{outputs}'


def output_html(output, markdown):
    "The richest form of an output that can be read without running anything."
    if output.output_type == "stream":
        return f'<pre class="output">{escape(output.text)}</pre>\n' if output.name == "stdout" else ""
    if PROGRESS in output.data: return ""
    kind = next((kind for kind in SHOWN if kind in output.data), "")
    data = output.data.get(kind, "")
    if kind in ("image/png", "image/jpeg"): data = f'<img alt="figure" src="data:{kind};base64,{data.strip()}">'
    if kind == "text/markdown": data = markdown(data)
    if kind == "text/plain": return f'<pre class="output">{escape(data)}</pre>\n'
    return f'<div class="output">{data or FIGURE}</div>\n'


def notebook_pages(root):
    "Every notebook, folder by folder in reading order, by name within a folder."
    places = [path.relative_to(root).as_posix() for path in (root / "nbs").rglob("*.ipynb")]
    known = list(FOLDERS)
    rank = lambda place: (known.index(dirname(place)) if dirname(place) in known else len(known), place)
    for place in sorted((place for place in places if not re.search(r"/[._]", place)), key=rank):
        cells = nbformat.read(root / place, 4).cells
        text = next((cell.source for cell in cells if cell.cell_type == "markdown"), "")
        title, subtitle = re.search(r"^# (.+)", text, re.M), re.search(r"^> (.+(?:\n> .+)*)", text, re.M)
        group = FOLDERS.get(dirname(place), dirname(place).removeprefix("nbs/").capitalize())
        yield Page(place, place.replace(".ipynb", ".html"), group, title[1] if title else place,
                   subtitle[1].replace("\n> ", " ") if subtitle else "")


def module_pages(root, notebooks):
    "A page per module that offers something, in the order of the notebooks; a package stands before its modules."
    pages, place = [], {page.source: number for number, page in enumerate(notebooks)}
    for path in (root / "dqe_cir").rglob("*.py"):
        text, source = path.read_text(encoding="utf-8"), path.relative_to(root).as_posix()
        name = source.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        origin = re.search(r"^# %% (?:\.\./)+(nbs/.+\.ipynb) #", text, re.M)
        module = Module(text)
        if path.stem != "_modidx" and (module.entries or path.stem == "__init__" and module.imported):
            page = Page(source, f"api/{name}.html", "Reference", name, module=module, notebook=origin[1] if origin else "")
            pages.append(page)
    inside = lambda page: [each for each in pages if f"{each.title}.".startswith(f"{page.title}.")]
    return sorted(pages, key=lambda page: (min(place.get(each.notebook, len(place)) for each in inside(page)), page.title))


def places_of_names(pages):
    "Where public names are defined: `dqe_cir.losses.info_nce`, and `info_nce` alone where no other module has one."
    places = {page.title: page.target for page in pages}
    short = []
    for page in pages:
        for entry in [name for each in page.module.entries for name in (each, *each.members)]:
            places[f"{page.title}.{entry.name}"] = f"{page.target}#{entry.name}"
            short.append((entry.name, f"{page.target}#{entry.name}"))
    for page in sorted(pages, key=lambda page: -len(page.title)):  # what a package hands on, deepest first
        handed = page.module.imports(page.title) if page.source.endswith("__init__.py") else {}
        places |= {f"{page.title}.{name}": places[f"{module}.{name}"] for name, module in handed.items() if f"{module}.{name}" in places}
    count = Counter(name for name, _ in short)
    modules = {page.title.split(".")[-1] for page in pages}  # `info_nce` is a method as well
    return places | {name: target for name, target in short if count[name] == 1 and name not in modules}
