"""Templates filled in: the report's page and the model card. What is filled in is escaped, as HTML."""

import json
from typing import Any

import jinja2


def render(package: str, template: str, **context: Any) -> str:
    """The template of that name in `package`/templates. A name that the context lacks is an error, no gap."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(package), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )
    environment.filters |= {
        "json": lambda value: json.dumps(value, indent=1),
        "extract": lambda key, table: table[key],
    }
    environment.tests["startswith"] = lambda text, prefixes: text.startswith(prefixes)
    return environment.get_template(template).render(context)
