"""One self-contained source file of our classes, for the Hub repos that people load without this package."""

import ast
import importlib.util
from pathlib import Path

from visbio_diffusers import __version__


PACKAGE = __name__.split(".")[0]
HEADER = '''"""{what} of visbio_diffusers {version}, for people who have not installed it.

Made by the package from its own sources; change those instead. Apache-2.0.

{sources}
"""

'''


class _Module:
    """The top-level statements of a module of ours, by the names that they bind."""

    def __init__(self, name: str):
        self.name = name
        self.path = Path(importlib.util.find_spec(name).origin)
        self.source = self.path.read_text(encoding="utf-8")
        self.definitions: dict[str, ast.stmt] = {}
        self.ours: dict[str, tuple[str, str]] = {}  # local name -> module of ours and its name there
        self.external: dict[str, str] = {}  # local name -> the import of a library
        for node in ast.parse(self.source).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                self._add_import(node)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    self.definitions[ast.unparse(target)] = node
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                self.definitions[node.name] = node

    def _add_import(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            local = alias.asname or alias.name.split(".")[0]
            if isinstance(node, ast.Import):
                self.external[local] = ast.unparse(ast.Import([alias]))
            elif node.module.split(".")[0] == PACKAGE:
                self.ours[local] = node.module, alias.name
            else:
                self.external[local] = ast.unparse(ast.ImportFrom(node.module, [alias], 0))

    def text(self, node: ast.stmt) -> str:
        """Return a statement as it stands in the file, with its decorators and the comments right above it."""
        lines = self.source.splitlines()
        first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))]) - 1
        while first and lines[first - 1].startswith("#"):
            first -= 1
        return "\n".join(lines[first : node.end_lineno])


class _Bundle:
    """What has been gathered for one file."""

    def __init__(self):
        self.modules: dict[str, _Module] = {}
        self.imports: dict[str, str] = {}
        self.definitions: dict[str, str] = {}  # in the order of their use: what a class is derived from stands above
        self._begun: set[tuple[str, str]] = set()

    def add(self, module_name: str, name: str) -> None:
        """Gather what a name means in a module, and all that it uses; nothing for Python's own names and locals."""
        if (module_name, name) in self._begun:
            return
        self._begun.add((module_name, name))
        if module_name not in self.modules:
            self.modules[module_name] = _Module(module_name)
        module = self.modules[module_name]
        if name in module.ours:
            self.add(*module.ours[name])
        elif name in module.external:
            self._keep(self.imports, name, module.external[name])
        elif name in module.definitions:
            node = module.definitions[name]
            for each in ast.walk(node):
                if isinstance(each, ast.Name):
                    self.add(module_name, each.id)
            self._keep(self.definitions, name, module.text(node))

    def _keep(self, kept: dict[str, str], name: str, text: str) -> None:
        others = self.definitions if kept is self.imports else self.imports
        if kept.setdefault(name, text) != text or name in others:
            raise ValueError(f"two modules mean different things by {name}, so they fit into no one file: rename one")


def bundle(what: str, module: str, names: list[str]) -> str:
    """Return the source of one file that has `names` of a module of ours and everything of ours that they use.

    Args:
        what (`str`): the title of the file.
        module (`str`): dotted name of the module.
        names (`list[str]`): classes, functions or constants of it.

    Raises:
        ValueError: if two modules give one name to different things.
    """
    found = _Bundle()
    for name in names:
        found.add(module, name)
    sources = "\n".join(sorted(name.replace(".", "/") + ".py" for name in found.modules))
    header = HEADER.format(what=what, version=__version__, sources=sources)
    imports = sorted(set(found.imports.values()), key=lambda line: (line.startswith("from"), line))
    return header + "\n".join(imports) + "\n\n\n" + "\n\n\n".join(found.definitions.values()) + "\n"
