"""Pages that are files: a template, its styles and scripts, and the data, all in one HTML that needs no network."""

from __future__ import annotations

import importlib.resources
import json
import math
import re
import string
from typing import Any


def fill(name: str, specs: dict[str, Any], **parts: str) -> str:
    """The page <name>.html with the styles, <name>.js, the chart library and the charts' specs by figure id inside.

    parts: what the template's own $names stand for, as HTML.
    """
    import vl_convert

    from xentlab import charts

    read = lambda file: importlib.resources.files("xentlab.pages").joinpath(file).read_text()
    return string.Template(read(f"{name}.html")).substitute(
        style=read("base.css"),
        charts=read("charts.js"),
        script=read(f"{name}.js"),
        bundle=_code_in_script(vl_convert.javascript_bundle(vl_version=charts.vegalite_version())),
        specs=json_in_script(specs),
        hues=json_in_script(list(charts.HUES)),
        **parts,
    )


def json_in_script(content: Any) -> str:
    """JSON that may stand inside a script element, whatever names a user gave; NaN is null, infinities are words."""
    return json.dumps(_plain(content), separators=(",", ":")).replace("<", "\\u003c")


def _plain(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(each) for each in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None if math.isnan(content) else "∞" if content > 0 else "-∞"
    return content


def _code_in_script(code: str) -> str:
    """Code that may stand inside a script element: only `</script` would end it. (`</` alone also occurs in /</g.)"""
    return re.sub(r"</(script)", r"<\\/\1", code, flags=re.IGNORECASE)
