"""Settings of the server."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from softprompt.serving.http.aliases import Alias


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a server serves, to whom, and its bounds.

    Attributes:
        base: the name of the frozen model.
        root: the folder whose folders are tasks.
        key: that requests need; "" for none.
        admin_key: that loading and unloading need; "" switches them off.
        aliases: A/B aliases by name.
        max_tokens: the most tokens that a request may ask for, of each of its rows.
        rows: the most prompts or inputs of a request.
        seconds: that a request may take.
        body_bytes: the largest body of a request.
        body_seconds: in which the body has to come.
    """

    base: str
    root: Path
    key: str = ""
    admin_key: str = ""
    aliases: Mapping[str, Alias] = dataclasses.field(default_factory=dict)
    max_tokens: int = 512
    rows: int = 64
    seconds: float = 120.0
    body_bytes: int = 2**20
    body_seconds: float = 10.0
