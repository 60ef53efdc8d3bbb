"""Configures Sphinx: `make docs` builds the pages into docs/_build/html."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_extensions")]

from xception_jax import __version__  # noqa: E402

project = "xception_jax"
author = "The xception_jax authors"
copyright = "The xception_jax authors, Apache-2.0"
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "reference_pages",
]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]

# Pages are Markdown. tests/test_docs.py executes the notebook; so does the workflow that publishes these pages, by
# `-D nb_execution_mode=force`, so that they have its outputs.
nb_execution_mode = "off"
nb_execution_in_temp = True
nb_execution_timeout = 600
nb_output_stderr = "remove"
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
copybutton_exclude = ".linenos, .gp, .go"

# Docstrings are in Google style, and have code in single backticks.
default_role = "code"
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes are listed once, in the docstring of their class
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
add_module_names = False
# Functions and exceptions of this package that a page names have to exist. Types in signatures may lack a page, and
# names of other projects are not looked up, so that a build needs no network.
nitpicky = True
nitpick_ignore_regex = [(r"py:class", r".*"), (r"py:.*", r"(?!xception_jax\.).*")]

html_theme = "sphinx_book_theme"  # the theme of the JAX, Flax, Optax and Orbax documentation; has search and dark mode
html_title = f"xception_jax {version}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_theme_options = {
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
    "navbar_persistent": [],  # the sidebar has the search
}
html_copy_source = False
