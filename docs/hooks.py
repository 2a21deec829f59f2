"""Formulas of the site: fenced blocks of language `math` become MathML, which browsers show by themselves.

GitHub shows the same blocks by its own means.
"""

from typing import Any

from latex2mathml.converter import convert


def fence(source: str, language: str, css_class: str, options: Any, md: Any, **others: Any) -> str:
    """One formula, as superfences asks for it."""
    return f'<div class="math">{convert(source.strip(), display="block")}</div>'


def on_config(config: Any) -> Any:
    """Tell superfences of formulas, before pages are read."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": fence})
    return config
