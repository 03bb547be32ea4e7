"""Sphinx: ``pip install -e ".[docs]" && sphinx-build -W --keep-going docs out/docs``."""

from inference.core.release import __version__

project = "elbozoo"
author = "The elbozoo maintainers"
release = __version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode", "myst_nb"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_output_stderr = "remove"
nb_render_markdown_format = "myst"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_use_ivar = True
html_theme = "alabaster"
html_theme_options = {"description": "How far is the ELBO from the evidence, and why?", "page_width": "1100px"}
exclude_patterns = ["_build"]
