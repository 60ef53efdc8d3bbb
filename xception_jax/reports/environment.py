"""The jinja environment of all reports: one set of filters, one base page and one style sheet."""

from __future__ import annotations

import base64
import functools
import hashlib
import math
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from xception_jax.logs.console import format_count, format_duration
from xception_jax.names import escaped, in_markdown

_SHARED = Path(__file__).parent  # base.html, style.css and report.js


@functools.cache  # a live report is written often, and compiling the templates would take a third of its time
def make_environment(templates: Path) -> jinja2.Environment:
    """Builds the environment that renders the templates of one report.

    Texts are escaped in .html templates, invisible characters included. Markdown templates mark names by `| name`.

    Args:
      templates: the directory of the templates, which may extend `base.html`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([templates, _SHARED]),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "name": in_markdown,
        "percent": format_percent,
        "points": format_points,
        "interval": format_interval,
        "p": format_p,
        "number": format_number,
        "rate": format_rate,
        "integer": format_integer,
        "heading": format_heading,
        "count": format_count,
        "duration": format_duration,
    }
    script = (_SHARED / "report.js").read_text(encoding="utf-8")
    # The page runs this script only: its security policy names the hash, so that no text of a dataset can run.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals |= {"script": Markup(script), "script_hash": f"sha256-{digest}"}
    return environment


def _finalize(value: Any) -> Any:
    """Escapes invisible characters in a text from outside, whose line breaks a page shows as spaces."""
    return escaped(value, kept="\n") if type(value) is str else value


def format_percent(share: float | None, digits: int = 2) -> str:
    """Returns a share in percent: 0.8 is '80.00 %', with a no-break space; '-' if it is None or not finite."""
    return "-" if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def format_rate(value: float) -> str:
    """Returns a rate with four decimals, as `evaluate` prints it; '-' if it is not finite."""
    return f"{value:.4f}" if math.isfinite(value) else "-"


def format_heading(title: str) -> str:
    """Returns a title with a capital letter: 'top-1 accuracy' is 'Top-1 accuracy', and 'MAP@100' stays as it is."""
    return title[:1].upper() + title[1:]


def format_points(share: float) -> str:
    """Returns a difference of two shares in signed percentage points: 0.0125 is '+1.25'; '-' if it is not finite."""
    return f"{100 * share:+.2f}" if math.isfinite(share) else "-"


def format_interval(ends: tuple[float, float]) -> str:
    """Returns an interval of shares in percentage points, such as '[-0.22, +3.40]'."""
    return f"[{format_points(ends[0])}, {format_points(ends[1])}]"


def format_p(value: float) -> str:
    """Returns a p-value with four decimals; '-' if it is not finite."""
    return "-" if not math.isfinite(value) else "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def format_number(value: Any) -> str:
    """Returns a float with four digits, an integer with separators and other values as text; '-' for None and NaN."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return format_integer(value) if isinstance(value, int) else str(value)


def format_integer(value: float) -> str:
    """Returns a number without decimals, with thousands separators: 22855952.0 is '22,855,952'."""
    return f"{value:,.0f}"
