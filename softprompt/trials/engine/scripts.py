"""Scripts and manifests that start workers: templates in `templates/`, filled in."""

import functools
from typing import Any

import jinja2

from softprompt.trials.engine.restarts import FINAL


def render(template: str, **values: Any) -> str:
    """Returns a template of `templates/` with its values filled in; missing ones are errors.

    `final` are the exit codes after which a worker is not started again.
    """
    return _templates().get_template(template).render(final=list(FINAL), **values)


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
