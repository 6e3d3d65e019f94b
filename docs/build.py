"""Make the documentation site: `python docs/build.py [FOLDER]`; `make docs` writes it to `_docs/`.

Pages come from the notebooks as they are committed (nothing is executed), from the Markdown files and from the source of
the modules. No network is used, and none is needed to read the result: formulas are MathML, pictures lie in the pages.
Links and anchors that lead nowhere, formulas that cannot be set and tests that do not exist are named, and nothing is written.
"""
import re
import shutil
import sys
from configparser import ConfigParser
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from posixpath import dirname, join, normpath
from string import Template
from urllib.parse import unquote, urldefrag, urlsplit

import nbformat
from latex2mathml.converter import convert
from nbconvert.filters.markdown_mistune import MarkdownWithMath
from pages import Page, Renderer, cell_html, coloured, module_pages, notebook_pages, places_of_names, spelled
from pygments.formatters import HtmlFormatter

HERE = Path(__file__).resolve().parent
GUIDE = {  # in reading order; other Markdown files of docs/ follow
    "docs/index.md": "index.html", "data/README.md": "data.html", "docs/protocols.md": "protocols.html",
    "docs/reproduce.md": "reproduce.html", "CONTRIBUTING.md": "adding.html", "docs/promises.md": "promises.html",
    "docs/performance.md": "performance.html", "docs/terminal.md": "terminal.html", "CHANGELOG.md": "changes.html",
}


def plain(doc):
    "A docstring as Markdown: its backticks are meant, a star or a dollar outside them is itself."
    return re.sub(r"(`[^`]*`)|([*_$<])", lambda found: found[1] or "\\" + found[2], doc)


class Site:
    "All pages of a checkout, and what is wrong with them."

    def __init__(self, root=HERE.parent):
        self.root, self.problems, self.files = Path(root), [], set()
        more = sorted(f"docs/{path.name}" for path in (self.root / "docs").glob("*.md"))
        guide = GUIDE | {source: source[5:].replace(".md", ".html") for source in more if source not in GUIDE}
        guide = {source: target for source, target in guide.items() if (self.root / source).exists()}
        pages = [Page(source, target, "Guide", re.search("^# (.+)", self.read(source), re.M)[1]) for source, target in guide.items()]
        pages += notebook_pages(self.root)
        self.modules = module_pages(self.root, pages)
        self.pages = pages + self.modules
        self.by_source = {page.source: page for page in self.pages}
        self.by_source["README.md"] = self.by_source["docs/index.md"]
        self.names = places_of_names(self.modules)
        tests = {path.relative_to(self.root).as_posix() for path in (self.root / "tests").rglob("*.py")}
        self.tests = {name: source for source in sorted(tests) for name in re.findall(r"^def (test_\w+)", self.read(source), re.M)}

    def read(self, source): return (self.root / source).read_text(encoding="utf-8")

    def address(self, page, base, url):
        "Where a link in a file of folder `base` leads on the site: to a page, or to a copy of the file."
        if urlsplit(url).scheme: return url
        path, fragment = urldefrag(url)
        fragment = spelled(unquote(fragment))
        if not path: return f"#{fragment}"
        path = normpath(join(base, unquote(path)))
        if path in self.by_source: return page.link(self.by_source[path].target + f"#{fragment}" * bool(fragment))
        if path.split("/")[0] == "nbs" and (self.root / path).is_dir(): return page.link(f"index.html#{path}")
        if not path.startswith("..") and (self.root / path).is_file():
            self.files.add(path)
            return page.link(f"files/{path}")
        self.problems.append(f"{page.source}: the link {url} leads nowhere")
        return "#"

    def test(self, page, name):
        "A test with its file."
        if name not in self.tests: self.problems.append(f"{page.source}: there is no test {name}")
        return f"{self.tests.get(name)}::{name}"

    def formula(self, page, tex, display):
        "MathML. Letters of other alphabets want braces, and latex2mathml forgets double bars after a size."
        plain = re.sub(r"\\(?:bigg?|Bigg?)[lrm]?(?![a-zA-Z])|\\!", "", tex)  # sizes and negative space: MathML stretches by itself
        made = convert(re.sub(r"\\(mathbb|mathbf|mathcal) ?(\w)", r"\\\1{\2}", plain), display=display)
        made = re.sub(r">\\(lVert|rVert|\|)<", ">&#x2016;<", made)
        if "\\" in made: self.problems.append(f"{page.source}: the formula {tex} cannot be set")
        return made

    def markdown(self, page, text, base): return MarkdownWithMath(renderer=Renderer(self, page, base)).render(text)

    def fill(self, page):
        "Write the body of a page."
        if page.module: self.fill_module(page)
        elif page.source.endswith(".ipynb"): self.fill_notebook(page)
        else: self.fill_guide(page)

    def fill_guide(self, page):
        "`<!-- include FILE -->` stands for a file, `<!-- include FILE: HEADING -->` for what is under one of its headings."
        base = dirname(page.source)
        for part in re.split(r"^(<!-- .+ -->)$", self.read(page.source), flags=re.M):
            include = re.fullmatch(r"<!-- include ([^:\s]+)(?:: (.+))? -->", part)
            if part == "<!-- reading order -->": page.body += self.reading_order(page)
            elif include: page.body += self.included(page, normpath(join(base, include[1])), include[2])
            else: page.body += self.markdown(page, part, base)

    def included(self, page, source, heading):
        text = self.read(source)
        if heading: text = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^##+ |\Z)", text, re.M | re.S)
        if text is None: self.problems.append(f"{page.source}: {source} has no heading {heading!r} to include")
        return self.markdown(page, text if isinstance(text, str) else text[1] if text else "", dirname(source))

    def reading_order(self, page):
        "Every notebook with its subtitle, folder by folder."
        notebooks, html = [each for each in self.pages if each.source.endswith(".ipynb")], ""
        for folder in dict.fromkeys(dirname(each.source) for each in notebooks):
            inside = [each for each in notebooks if dirname(each.source) == folder]
            items = (f'<li><a href="{page.link(each.target)}">{escape(each.title)}</a><span>{escape(each.subtitle)}</span></li>' for each in inside)
            html += f'<h3 id="{folder}">{escape(inside[0].group)}</h3>\n<ul class="pages">{"".join(items)}</ul>\n'
        return html

    def fill_notebook(self, page):
        render = lambda text: self.markdown(page, text, dirname(page.source))
        body = "".join(cell_html(cell, render) for cell in nbformat.read(self.root / page.source, 4).cells)
        written = ", ".join(f'<a href="{page.link(each.target)}">{each.title}</a>' for each in self.modules if each.notebook == page.source)
        page.body = f'<p class="source">{page.source}{" writes " * bool(written)}{written}</p>\n{body}'

    def fill_module(self, page):
        origin = page.link(self.by_source[page.notebook].target) if page.notebook in self.by_source else ""
        base = dirname(page.notebook or page.source)  # what a docstring links to is written from there
        source = f'from <a href="{origin}">{page.notebook}</a>' if origin else ""
        page.body = f'<p class="source">{page.source} {source}</p>\n<h1>{page.title}</h1>\n' + self.markdown(page, page.module.doc, base)
        if page.source.endswith("__init__.py"):
            places = {name: self.names.get(f"{page.title}.{name}") for name in page.module.imported}
            items = (f'<li><a href="{page.link(place)}"><code>{name}</code></a></li>' for name, place in places.items() if place)
            page.body += f'<ul class="names">{"".join(items)}</ul>'
        for each in page.module.entries:
            page.headings.append((2, each.name, each.name))
            for level, entry in [(2, each), *((3, member) for member in each.members)]:
                cell = f'<a class="cell" href="{origin}#cell-{entry.cell}">notebook</a>' if origin and entry.cell else ""
                page.body += f'<section class="level{level}"><h{level} id="{entry.name}">{entry.name}</h{level}>{cell}\n{coloured(entry.signature)}'
                page.body += self.markdown(page, plain(entry.doc), base) + "</section>\n"

    # ---- all pages together

    def navigation(self, page):
        "The pages by group; the group of this page is open, and under its title stand its parts."
        html = ""
        parts = "".join(f'<li><a href="#{anchor}">{text}</a></li>' for level, anchor, text in page.headings if level == 2)
        for group in dict.fromkeys(each.group for each in self.pages):
            items = ""
            for each in [each for each in self.pages if each.group == group]:
                here = ' class="here"' * (each is page)
                items += f'<li><a{here} href="{page.link(each.target)}">{escape(each.title)}</a></li>'
                if here and parts: items += f'<li class="parts"><ul>{parts}</ul></li>'
            html += f'<details{" open" * (group in (page.group, "Guide"))}><summary>{escape(group)}</summary><ul>{items}</ul></details>\n'
        return html

    def html(self, number, template, version):
        page = self.pages[number]
        before = self.pages[number - 1] if number else None
        after = self.pages[number + 1] if number + 1 < len(self.pages) else None
        step = lambda other, name: f'<a class="{name}" href="{page.link(other.target)}">{escape(other.title)}</a>' if other else "<span></span>"
        return template.substitute(title=escape(page.title), home=page.link("index.html"), style=page.link("style.css"), version=version,
                                   navigation=self.navigation(page), body=page.body, steps=step(before, "before") + step(after, "after"))

    def build(self):
        "All files of the site as a dict target -> text; ends with a list of everything that is wrong, if anything is."
        for page in self.pages: self.fill(page)
        if (self.root / "README.md").exists(): self.markdown(Page("README.md", "index.html", "", ""), self.read("README.md"), "")  # all its links
        settings = ConfigParser()
        settings.read(self.root / "settings.ini", encoding="utf-8")
        template = Template((HERE / "page.html").read_text(encoding="utf-8"))
        made = {page.target: self.html(number, template, settings["DEFAULT"]["version"]) for number, page in enumerate(self.pages)}
        problems = self.problems + broken_links(made, {f"files/{name}" for name in self.files} | {"style.css"})
        if problems: raise SystemExit("\n".join(["the site was not written:", *dict.fromkeys(problems)]))
        return made

    def write(self, folder):
        made, folder = self.build(), Path(folder)
        if folder.exists() and not (folder / "style.css").exists():
            raise SystemExit(f"{folder} is there and is no site made by this script: name another folder")
        shutil.rmtree(folder, ignore_errors=True)
        for target, text in made.items():
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            (folder / target).write_text(text, encoding="utf-8")
        for name in self.files:
            (folder / "files" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.root / name, folder / "files" / name)
        colours = HtmlFormatter(style="friendly").get_style_defs(".highlight")
        (folder / "style.css").write_text((HERE / "style.css").read_text(encoding="utf-8") + colours, encoding="utf-8")
        return made


class Links(HTMLParser):
    "The anchors and the links of a page."

    def __init__(self, text):
        super().__init__()
        self.anchors, self.links = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id": self.anchors.add(value)
            elif name in ("href", "src"): self.links.append(value)


def broken_links(made, files=frozenset()):
    "One line per relative link whose page or anchor is not there. `made` maps a page's place to its text."
    read = {target: Links(text) for target, text in made.items()}
    problems = []
    for target, page in read.items():
        for link in page.links:
            if urlsplit(link).scheme: continue
            path, anchor = urldefrag(link)
            path = normpath(join(dirname(target), unquote(path))) if path else target
            if path not in read and path not in files or anchor and path in read and unquote(anchor) not in read[path].anchors:
                problems.append(f"{target}: the link {link} leads nowhere")
    return problems


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else HERE.parent / "_docs")
    print(f"{len(Site().write(folder))} pages: {folder / 'index.html'}")
