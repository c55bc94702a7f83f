"""Sphinx configuration: builds offline and writes the pages of the public names by itself."""

from __future__ import annotations

import inspect
import os
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ConfigError

project = "lightning-mnp"
author = "The lightning-mnp developers"
copyright = "The lightning-mnp developers"
version = release = installed_version("lightning-mnp")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
html_theme = "furo"

# Read the Docs builds one copy for each branch and tag, and says which one in the environment.
html_title = f"lightning-mnp {os.environ.get('READTHEDOCS_VERSION', version)}"
html_baseurl = os.environ.get("READTHEDOCS_CANONICAL_URL", "")

myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_preserve_defaults = True
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # else an attribute with a docstring of its own comes out twice

# The groups of the reference: file name, title, a sentence, and the names. A name may be a pattern.
# Every public name has to be in exactly one group, and internal names in none.
GROUPS: list[tuple[str, str, str, list[str]]] = [
    (
        "doors",
        "Doors",
        "How an audit or a defense is started, and how its threshold is calibrated.",
        [
            "lightning_mnp.audit",
            "lightning_mnp.defend",
            "lightning_mnp.MNPCallback",
            "lightning_mnp.MNPModule",
            "lightning_mnp.pytorch_lightning.MNPModule",
            "lightning_mnp.calibrate_threshold",
            "lightning_mnp.Calibration",
        ],
    ),
    (
        "options",
        "Options",
        "All settings of the method, in groups.",
        ["lightning_mnp.MNPConfig", "lightning_mnp.*Options", "lightning_mnp.Constants"],
    ),
    (
        "report",
        "Report",
        "What an audit or a defense found, and how it is shown.",
        [
            "lightning_mnp.DefenseReport",
            "lightning_mnp.Signal",
            "lightning_mnp.RunResult",
            "lightning_mnp.PruningReport",
            "lightning_mnp.ReferenceRate",
            "lightning_mnp.SurrogateTrigger",
            "lightning_mnp.TriggerExample",
            "lightning_mnp.SecondAudit",
            "lightning_mnp.DefenseSetSummary",
            "lightning_mnp.WeightsFile",
            "lightning_mnp.ReportError",
            "lightning_mnp.reporting.*",
        ],
    ),
    (
        "checkpoints",
        "Checkpoints",
        "Untrusted files in, safe files out.",
        [
            "lightning_mnp.read_state_dict",
            "lightning_mnp.load_into",
            "lightning_mnp.write_state_dict",
            "lightning_mnp.CheckpointError",
        ],
    ),
    (
        "networks",
        "Networks and masks",
        "The filters of a network: finding them, masking them and pruning them.",
        [
            "lightning_mnp.find_filter_layers",
            "lightning_mnp.FilterLayers",
            "lightning_mnp.FilterLayer",
            "lightning_mnp.FilterMasks",
            "lightning_mnp.prune",
        ],
    ),
    (
        "engine",
        "Engine",
        "The defense one step at a time, for those who write a door of their own.",
        ["lightning_mnp.MNPDefense"],
    ),
    (
        "signals",
        "Signals",
        "What a signal of your own, or a search for pruning, is made of, and how it is added.",
        ["lightning_mnp.signals.*"],
    ),
    (
        "attacks",
        "Attacks",
        "Backdoor attacks to check a defense with. [](../attacks/index.md) describes each of them.",
        ["lightning_mnp.attacks.*"],
    ),
    (
        "data",
        "Data",
        "The defense set, and data sets and datamodules with clean, poisoned and triggered images.",
        ["lightning_mnp.DefenseSet", "lightning_mnp.data.*"],
    ),
    (
        "models",
        "Models",
        "Networks for small images, and a plain classifier to train them.",
        ["lightning_mnp.models.*"],
    ),
    (
        "metrics",
        "Metrics",
        "Clean accuracy, attack success and detection: as functions, and as torchmetrics.",
        ["lightning_mnp.metrics.*"],
    ),
    (
        "baselines",
        "Baselines",
        "Published defenses to compare with. [](../baselines.md) describes them.",
        ["lightning_mnp.baselines.*"],
    ),
    (
        "benchmark",
        "Benchmark",
        "What each filter is worth. [](../benchmark.md) compares defenses.",
        ["lightning_mnp.benchmark.*"],
    ),
]
PACKAGES = [
    "lightning_mnp",
    *(
        f"lightning_mnp.{room}"
        for room in (
            "pytorch_lightning",
            "reporting",
            "signals",
            "attacks",
            "data",
            "models",
            "metrics",
            "baselines",
            "benchmark",
        )
    ),
]


def public_names() -> dict[str, Any]:
    """Return what the packages export, by full name."""
    return {
        f"{package}.{name}": getattr(import_module(package), name)
        for package in PACKAGES
        for name in import_module(package).__all__
    }


PUBLIC = public_names()
# The full name at an object's home, such as `lightning_mnp.api.audit`, and its public name.
HOMES = {f"{item.__module__}.{item.__qualname__}": name for name, item in PUBLIC.items()}


def fits(name: str, pattern: str) -> bool:
    """Check whether a pattern stands for a name; `*` stands for no dots."""
    return name.count(".") == pattern.count(".") and fnmatchcase(name, pattern)


def names_of_groups() -> dict[str, list[str]]:
    """Return the public names of each group.

    Raises:
        ConfigError: If a public name is in no group or in two, or if a listed name is not public.
    """
    groups = {}
    for group, _, _, patterns in GROUPS:
        groups[group] = []
        for pattern in patterns:
            found = [name for name in PUBLIC if fits(name, pattern)]
            if not found and "*" not in pattern:
                raise ConfigError(f"`GROUPS` lists {pattern}, which no package exports; remove it.")
            groups[group] += found
    listed = [name for names in groups.values() for name in names]
    for name in PUBLIC:
        if listed.count(name) != 1:
            raise ConfigError(
                f"Expected {name} in exactly one group of `GROUPS`, but found it in "
                f"{listed.count(name)}. Correct the list in docs/conf.py."
            )
    return groups


def write_reference(app: Sphinx, config: object) -> None:
    """Write a page for each group and for each public name."""
    folder = Path(app.srcdir) / "reference" / "api"
    folder.mkdir(exist_ok=True)
    for page in folder.glob("*.md"):
        page.unlink()
    groups = names_of_groups()
    for group, title, sentence, _ in GROUPS:
        names = groups[group]
        table = "\n".join(f"   ~{name}" for name in names)
        pages = "\n".join(names)
        (folder / f"{group}.md").write_text(
            f"# {title}\n\n{sentence}\n\n"
            f"```{{eval-rst}}\n.. autosummary::\n   :nosignatures:\n\n{table}\n```\n\n"
            f"```{{toctree}}\n:hidden:\n\n{pages}\n```\n",
            "utf-8",
        )
        for name in names:
            (folder / f"{name}.md").write_text(page_of(name), "utf-8")


def page_of(name: str) -> str:
    """Return the page of one public name."""
    item = PUBLIC[name]
    if inspect.isclass(item):
        # What comes from an internal base is described here, what comes from elsewhere is not.
        bases = {base.__name__ for base in item.__mro__[1:] if public_base(base) is base}
        directive = f"autoclass:: {name}\n   :inherited-members: {', '.join(sorted(bases))}"
    else:
        directive = f"autofunction:: {name}"
    title = name.rpartition(".")[2]
    return f"# `{title}`\n\n```{{eval-rst}}\n.. {directive}\n```\n"


def public_base(base: type) -> type:
    """Return the class itself if it is public or of another project, else the next such base."""
    for item in base.__mro__:
        home = f"{item.__module__}.{item.__qualname__}"
        if home in HOMES or not home.startswith("lightning_mnp."):
            return item
    raise AssertionError("unreachable: `object` is of another project")


def show_public_bases(
    app: Sphinx, name: str, item: object, options: object, bases: list[Any]
) -> None:
    """Show no internal class as a base."""
    bases[:] = dict.fromkeys(public_base(b) if inspect.isclass(b) else b for b in bases)


def resolve_homes(
    app: Sphinx, env: Any, node: nodes.Element, content: nodes.TextElement
) -> nodes.Element | None:
    """Let references to the home of a public name lead to its page.

    Annotations and docstrings name `lightning_mnp.api.audit`, whose page is that of
    `lightning_mnp.audit`. References to internal names stay plain literals.
    """
    if node.get("refdomain") != "py":
        return None
    home, members = node["reftarget"], ""
    while home and home not in HOMES:
        home, _, last = home.rpartition(".")
        members = f".{last}{members}"
    if not home:
        return None
    found: nodes.Element | None = env.get_domain("py").resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], HOMES[home] + members, node, content
    )
    return found


def setup(app: Sphinx) -> None:
    """Connect the functions above to what Sphinx does."""
    app.connect("config-inited", write_reference)
    app.connect("autodoc-process-bases", show_public_bases)
    app.connect("missing-reference", resolve_homes)
