"""Scripts and manifests that start workers: templates in `templates/`, filled in."""

import functools
from typing import Any

import jinja2


def render(template: str, **values: Any) -> str:
    """Returns a template of `templates/` with its values filled in; missing ones are errors."""
    return _templates().get_template(template).render(**values)


@functools.cache
def _templates() -> jinja2.Environment:
    """The templates. Comments have a form of their own, since bash has `${#array[@]}`."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("softprompt.trials.engine"),
        undefined=jinja2.StrictUndefined,
        comment_start_string="{!",
        comment_end_string="!}",
        keep_trailing_newline=True,
        lstrip_blocks=True,
        trim_blocks=True,
    )
