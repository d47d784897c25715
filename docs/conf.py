"""How Sphinx builds these pages; ``nox -s docs`` does it, and a warning is an error."""

from __future__ import annotations

import re
from importlib import metadata
from typing import Any

from sphinx.domains.python import PyObject

project = "ntk_lazy"
author = "The ntk_lazy authors"
copyright = "The ntk_lazy authors, MIT licence"
release = version = metadata.version("ntk-lazy")
language = "en_GB"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
suppress_warnings: list[str] = []

html_theme = "furo"
html_title = f"ntk_lazy {release}"
html_css_files = ["pages.css"]
html_static_path = ["static"]

myst_heading_anchors = 3

add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
# Long signatures get one line for each argument.
python_maximum_signature_line_length = 60
napoleon_numpy_docstring = False
napoleon_use_ivar = True

_FIELD = re.compile(r"(?P<name>Cost|Source): (?P<text>.+)")
_AS_WRITTEN: dict[str, list[str]] = {}

# "Variables" is what Sphinx calls attributes.
for field in PyObject.doc_field_types:
    if field.name == "variable":
        field.label = "Attributes"


def _make_fields(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn sections that napoleon does not know, or takes apart at a colon, into fields beside the parameters."""
    for index, line in enumerate(lines):
        found = _FIELD.fullmatch(line)
        if found is not None:
            text = found["text"]
            lines[index] = f":{found['name']}: {text[0].upper()}{text[1:]}"
        elif line == "Returns:":
            lines[index] = ":returns:"
    if what == "property":
        _AS_WRITTEN[name] = list(lines)


def _restore_property(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Undo what napoleon makes of a property: it takes the words before a colon for a type."""
    if name in _AS_WRITTEN:
        lines[:] = _AS_WRITTEN.pop(name)


def _make_readable(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    """Write a default that is made anew for each instance as ``...``: Sphinx cannot parse what inspect shows."""
    return None if signature is None else (signature.replace("<factory>", "..."), returns)


def setup(app: Any) -> None:
    """Run before and after napoleon, which has the default priority of 500."""
    app.connect("autodoc-process-signature", _make_readable)
    app.connect("autodoc-process-docstring", _make_fields, priority=400)
    app.connect("autodoc-process-docstring", _restore_property, priority=600)
