"""A hook of mkdocs: of :func:`cir.unlearn` and its like in docstrings, the site shows the name alone."""

import re
from typing import Any

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):(?=<code>)")


def on_page_content(html: str, **_: Any) -> str:
    return ROLE.sub("", html)
