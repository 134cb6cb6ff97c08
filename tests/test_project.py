"""The shape of the project: layers, docstrings, size of files, declared dependencies, content of the wheel."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder
from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "visbio_diffusers"
CHECKPOINT = Path("model_cards", "visbio-blood-28")
CHECKPOINTS = CHECKPOINT, Path("model_cards", "visbio-align-blood")
SOURCES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted((ROOT / "train_scripts").glob("*.py"))

# A file imports from the layers above its own line here, and from its own subpackage, never sideways or down.
LAYERS = [
    {"files"},
    {"augmentation", "checkpoints", "config", "grid", "losses", "marked_yaml", "objectives", "policy", "registration"},
    {"wording"},
    {"captions"},
    {"data", "models", "text", "training"},
    {"image_sets", "pipelines", "preferences"},
    {"visbio_diffusers"},
    {"bundle", "generate", "load", "text_to_image", "validation"},
    {"evaluation", "redrawing"},
    {"alignment"},
    {"adapters", "prompts", "rewards", "rollouts"},
    {"explanation", "reward_tuning"},
    {"rounds"},
    {"cards"},
    {"demo"},
    {"commands", "hub"},
    {"cli"},
    {"train_scripts"},
]
LAYER = {part: number for number, layer in enumerate(LAYERS) for part in layer}
DISTRIBUTION = {
    "Bio": "biopython",
    "PIL": "pillow",
    "huggingface_hub": "huggingface-hub",
    "skimage": "scikit-image",
    "yaml": "pyyaml",
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def part_of(path: Path) -> str:
    """Return the name in LAYERS of a file: its module, its subpackage, or its folder outside the package."""
    if path == PACKAGE / "__init__.py":
        return PACKAGE.name
    parts = path.relative_to(ROOT).parts
    return parts[1].removesuffix(".py") if parts[0] == PACKAGE.name else parts[0]


def public_names(tree: ast.Module | ast.ClassDef) -> list[ast.FunctionDef | ast.ClassDef]:
    definitions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return [node for node in definitions if not node.name.startswith("_")]


def imported_modules(path: Path, at_the_top: bool = False) -> set[str]:
    """Return the dotted names that a file imports anywhere; `from a import b` gives a.b where that is a module."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in tree.body if at_the_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno} imports relatively"
            for alias in node.names:
                inner = ROOT.joinpath(*node.module.split("."), alias.name)
                is_module = inner.with_suffix(".py").is_file() or inner.is_dir()
                found.add(f"{node.module}.{alias.name}" if is_module else node.module)
    return found


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS], ids=relative)
def test_imports_run_one_way(path):
    part = part_of(path)
    assert part in LAYER, f"{part} has no place in LAYERS"
    for module in imported_modules(path):
        package, *inner = module.split(".")
        if package == PACKAGE.name:
            target = inner[0] if inner else package
            assert target == part or LAYER[target] < LAYER[part], f"{part} imports {module}"


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS], ids=relative)
def test_every_imported_library_is_declared(path):
    core = ProjectMetadata(str(ROOT), PluginManager()).core
    extras = [line for name in ("train", "pubmed", "demo") for line in core.optional_dependencies[name]]
    for at_the_top in (True, False):  # within a function an extra may be imported
        declared = [*core.dependencies, *(extras if path in SCRIPTS or not at_the_top else [])]
        names = {Requirement(line).name.lower() for line in declared} | {PACKAGE.name}
        modules = {module.split(".")[0] for module in imported_modules(path, at_the_top)} - sys.stdlib_module_names
        assert {DISTRIBUTION.get(module, module) for module in modules} <= names


def test_every_dependency_is_pinned_within_its_bounds():
    core = ProjectMetadata(str(ROOT), PluginManager()).core
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(pin.name): pin.specifier for pin in map(Requirement, lines)}
    for line in [*core.dependencies, *(line for extra in core.optional_dependencies.values() for line in extra)]:
        requirement = Requirement(line)
        (pin,) = pins[canonicalize_name(requirement.name)]
        assert pin.operator == "==" and requirement.specifier.contains(pin.version), f"{line} against {pin}"


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS], ids=relative)
def test_every_public_name_has_a_docstring(path):
    tree = ast.parse(path.read_text())
    public = public_names(tree)
    for each in [node for node in public if isinstance(node, ast.ClassDef)]:
        if "Protocol" not in [ast.unparse(base) for base in each.bases]:
            public += public_names(each)
    assert [node.name for node in public if not ast.get_docstring(node)] == []
    assert ast.get_docstring(tree)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_file_is_over_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Return the wheel of this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    return Path(next(WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])))


def test_wheel_holds_the_package_and_the_default_checkpoints_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {relative(path) for path in PACKAGE.rglob("*.*") if path.suffix in (".py", ".yaml", ".j2")}
    card = {relative(path) for folder in CHECKPOINTS for path in (ROOT / folder).rglob("*") if path.is_file()}
    assert any(name.endswith("caption_banks/bloodmnist.yaml") for name in package)
    assert any(name.endswith("unet/diffusion_pytorch_model.safetensors") for name in card), "no checkpoint to ship"
    assert names == package | {f"{PACKAGE.name}/{name}" for name in card}


def test_wheel_works_where_it_is_unpacked(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    (info,) = tmp_path.glob("*.dist-info")
    assert "visbio = visbio_diffusers.cli:main" in (info / "entry_points.txt").read_text()
    code = """
import visbio_diffusers
from visbio_diffusers.captions import load_bank
from visbio_diffusers.cli import main
from visbio_diffusers.load import default_model

load_bank("bloodmnist")
print(visbio_diffusers.__version__, default_model(), callable(main), sep="\\n")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    version, model, is_callable = done.stdout.splitlines()[-3:]
    assert re.search(rf"^Version: {re.escape(version)}$", (info / "METADATA").read_text(), re.MULTILINE)
    assert Path(model) == tmp_path / PACKAGE.name / CHECKPOINT
    assert is_callable == "True"
