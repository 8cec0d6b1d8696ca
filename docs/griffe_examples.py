"""A Griffe extension: the code below "Example:" in a docstring is shown as code."""

import re
from typing import Any

from griffe import Extension, Object

EXAMPLE = re.compile(r"^Example:\n((?:    .*\n?|\n)+)", re.MULTILINE)


class Examples(Extension):
    """Puts fences around examples."""

    def on_object(self, *, obj: Object, **more: Any) -> None:
        """Changes an object's docstring."""
        if obj.docstring:
            fenced = r"Example:\n    ```python\n\g<1>\n    ```\n"
            obj.docstring.value = EXAMPLE.sub(fenced, obj.docstring.value)
