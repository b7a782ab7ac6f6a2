"""Roles in docstrings, such as :func:`~package.name`, as names alone."""

import re
from typing import Any

_ROLE = re.compile(r":(?:func|class|meth|mod|attr):<code>~?(?:[\w.]+\.)?([\w.]+?)</code>")


def on_page_content(html: str, **_: Any) -> str:
    return _ROLE.sub(r"<code>\1</code>", html)
