"""What docs/architecture.md says of folders and imports is true, and every page names files and links that exist."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# folder → folders it may import. Whoever adds an arrow here draws it in docs/architecture.md.
ALLOWED: dict[str, set[str]] = {
    "schemas": set(),
    "metrics": {"schemas"},
    "models": {"schemas"},
    "storage": {"schemas"},
    "reports": {"schemas"},
    "tasks": {"schemas", "metrics", "models", "storage", "reports"},
    "flows": {"schemas", "storage", "reports", "tasks"},
    "frontalis": {"schemas", "models", "storage", "reports", "tasks", "flows"},
}
FILES = {"pyarrow", "deltalake", "polars", "pandas"}
# folder → packages it never imports: arrays know nothing of files, and only flows know Prefect.
FOREIGN = {
    "schemas": {"prefect", "torch", "faiss", "matplotlib"},
    "metrics": {"prefect", "matplotlib", *FILES},
    "models": {"prefect", "faiss", "matplotlib", *FILES},
    "storage": {"prefect", "torch", "matplotlib"},
    "reports": {"prefect", "torch", "faiss", *FILES},
    "tasks": {"prefect"},
}


def imports(file: Path) -> Iterator[str]:
    """Yield the dotted name of each module a file imports, also within functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write imports in full, not relative"
            yield node.module or ""


def importers(folder: str, names: set[str]) -> list[str]:
    """Return `file imports module` for each import of a file of `folder` whose top-level name is among `names`."""
    return [
        f"{file.relative_to(ROOT)} imports {module}"
        for file in sorted((ROOT / folder).rglob("*.py"))
        for module in imports(file)
        if module.partition(".")[0] in names
    ]


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_go_down_only(folder: str) -> None:
    assert importers(folder, ALLOWED.keys() - ALLOWED[folder] - {folder}) == []


@pytest.mark.parametrize("folder", FOREIGN)
def test_lower_folders_know_nothing_of_files_or_prefect(folder: str) -> None:
    assert importers(folder, FOREIGN[folder]) == []


def test_no_product_file_imports_tests_or_benchmarks() -> None:
    assert [line for folder in ALLOWED for line in importers(folder, {"tests", "benchmarks"})] == []


def test_each_folder_of_the_layout_is_checked() -> None:
    packages = {file.parent.name for file in ROOT.glob("*/__init__.py")}
    assert packages - {"tests", "benchmarks"} == set(ALLOWED)


def test_the_architecture_page_names_every_module() -> None:
    rows = re.findall(r"^\| `([\w/]+)/` \| (.*) \|$", (ROOT / "docs/architecture.md").read_text("utf-8"), re.MULTILINE)
    named = {folder: set(re.findall(r"`([a-z_]+)`", text)) for folder, text in rows}
    found: dict[str, set[str]] = {}
    for folder in ALLOWED:
        for file in (ROOT / folder).rglob("[a-z]*.py"):
            found.setdefault(str(file.parent.relative_to(ROOT)), set()).add(file.stem)
    assert named == found


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_and_links_of_a_page_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    files = re.findall(r"`((?:\w+/)+\w+\.(?:py|md|j2|toml|yaml))`", text)
    assert [name for name in files if not (ROOT / name).exists() and name != "deployments/pipeline.toml"] == []
    for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\((?!http)([^)]+)\)", text)):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        headings = re.findall(r"^#+ (.*)$", linked.read_text("utf-8"), re.MULTILINE)
        slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in slugs, f"{target}#{anchor}"
