"""Sphinx configuration; builds offline and writes the list of modules by itself."""

from __future__ import annotations

import pkgutil
from importlib.metadata import version as installed_version
from pathlib import Path

import lightning_mnp

project = "lightning-mnp"
author = "The lightning-mnp developers"
copyright = "The lightning-mnp developers"
version = release = installed_version("lightning-mnp")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "lightning-mnp"

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_default_options = {
    "members": True,
    "show-inheritance": True,
    "ignore-module-all": True,  # a name is described only where it is defined
}
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # else an attribute with a docstring of its own comes out twice


def write_module_pages(folder: Path) -> None:
    """Write one page for each public module, so that a new module needs no entry by hand."""
    folder.mkdir(exist_ok=True)
    for page in folder.glob("*.md"):
        page.unlink()
    for module in pkgutil.walk_packages(lightning_mnp.__path__, "lightning_mnp."):
        if module.ispkg or any(part.startswith("_") for part in module.name.split(".")):
            continue
        page = f"# `{module.name}`\n\n```{{eval-rst}}\n.. automodule:: {module.name}\n```\n"
        (folder / f"{module.name}.md").write_text(page, "utf-8")


write_module_pages(Path(__file__).parent / "reference" / "modules")
