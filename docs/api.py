"""What a module offers, read from its source: nothing is imported, so defaults and the comments on a signature stay as written."""
import ast
import re
from dataclasses import dataclass, field
from importlib.util import resolve_name

SPECIAL = ("__init__", "__call__")  # methods worth showing though their names start with _
LONGEST = 12  # lines of a constant


@dataclass
class Entry:
    "A public name: its signature as source, its docstring, the notebook cell it is written in."
    name: str
    signature: str
    doc: str = ""
    cell: str = ""
    members: list = field(default_factory=list)


class Module:
    "The public names of a module, in the order of its source; a method stands with its class, however it got there."

    def __init__(self, source):
        self.lines, self.tree = source.splitlines(), ast.parse(source)
        self.doc = ast.get_docstring(self.tree) or ""
        self.functions = {node.name: node for node in self.tree.body if isinstance(node, ast.FunctionDef)}
        self.found, self.methods, self.moved, self.imported, public = {}, [], set(), {}, None
        for node in self.tree.body:
            if isinstance(node, ast.ImportFrom):
                self.imported |= {alias.name: "." * node.level + (node.module or "") for alias in node.names}
            elif isinstance(node, ast.ClassDef): self.add_class(node)
            elif isinstance(node, ast.FunctionDef): self.add_function(node)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                if "__all__" in [name_of(target) for target, _ in pairs(node)]: public = ast.literal_eval(node.value)
                else: self.add_assignment(node)
        for entry in self.methods:
            owner, name = entry.name.split(".")
            if owner in self.found and (name[0] != "_" or name in SPECIAL): self.found[owner].members.append(entry)
        self.public = public
        self.entries = [entry for name, entry in self.found.items()
                        if name not in self.moved and (name[0] != "_" if public is None else name in public)]

    def imports(self, package):
        "The names that a package imports, each with the full name of its module."
        return {name: resolve_name(module, package) for name, module in self.imported.items()}

    def add_class(self, node):
        self.found[node.name] = self.entry(node, node.name)
        self.methods += [self.entry(each, f"{node.name}.{each.name}") for each in node.body if isinstance(each, ast.FunctionDef)]

    def add_function(self, node):
        "A function of its own, or with `@patch` a method of the classes that its first argument is annotated with."
        if "patch" not in map(name_of, node.decorator_list): self.found[node.name] = self.entry(node, node.name)
        else:
            owners = filter(None, map(name_of, ast.walk(node.args.args[0].annotation)))
            self.methods += [self.entry(node, f"{owner}.{node.name}") for owner in owners]

    def add_assignment(self, node):
        "Constants, and methods put into their class: `Class.name = function`, also through `property` or `classmethod`."
        for target, value in pairs(node):
            constant = Entry(target.id if isinstance(target, ast.Name) else "", self.constant(node), cell=self.cell(node))
            if constant.name: self.found[constant.name] = constant
            if not isinstance(target, ast.Attribute): continue
            given = value.args if isinstance(value, ast.Call) else [value]
            used = [name for name in map(name_of, given) if name in self.functions]
            method = self.entry(self.functions[used[0]], "") if used else constant
            method.name = f"{name_of(target.value)}.{target.attr}"
            self.methods.append(method)
            self.moved |= set(used)

    def entry(self, node, name):
        return Entry(name, self.signature(node), ast.get_docstring(node) or "", self.cell(node))

    def cell(self, node):
        "The id of the notebook cell that a node was written in, '' for a module written by hand."
        above = (re.fullmatch(r"# %% .*\.ipynb #(\w+)", line) for line in reversed(self.lines[:node.lineno]))
        return next((mark[1] for mark in above if mark), "")

    def constant(self, node):
        text = self.lines[node.lineno - 1:node.end_lineno]
        return "\n".join(text[:LONGEST] + ["..."] * (len(text) > LONGEST))

    def signature(self, node):
        "The source of a definition up to its docstring or body; the fields of a class belong to it."
        first = node.body[0]
        start = min([node.lineno, *(each.lineno for each in node.decorator_list if name_of(each) != "patch")])
        text = self.lines[start - 1:first.lineno]
        text[-1] = text[-1].encode()[:first.col_offset].decode()  # ast counts bytes
        if isinstance(node, ast.ClassDef):
            fields = [each for each in node.body if isinstance(each, (ast.Assign, ast.AnnAssign))]
            text += [line for each in fields for line in self.lines[each.lineno - 1:each.end_lineno]]
        text = [line.rstrip() for line in text if line.strip() not in ("", "@patch")]
        indent = len(text[0]) - len(text[0].lstrip())
        return "\n".join(line[indent:] for line in text)


def name_of(node):
    return getattr(node, "id", "")


def pairs(node):
    "What an assignment binds and to what, one by one; the whole value where it cannot be taken apart."
    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
        if not isinstance(target, ast.Tuple): yield target, node.value
        elif isinstance(node.value, ast.Tuple): yield from zip(target.elts, node.value.elts)
        else: yield from ((each, node.value) for each in target.elts)
