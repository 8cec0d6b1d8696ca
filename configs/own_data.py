"""Your own data: a JSONL file a split, one object a line, and what its labels read as.

Question: whatever yours is. Copy this file, or pass another source as its argument. A line:
    {"text": "The parcel came two weeks late.", "label": "complaint"}

Command:
    softprompt data show --config configs/own_data.py
    softprompt train --config configs/own_data.py --workdir runs/mine

Cost: as the base config for texts of a sentence or two; in proportion to tokens.
"""

from ml_collections import ConfigDict

from softprompt.config import base_config
from softprompt.config.files import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """Returns a config for texts that are complaints, questions or praise.

    Args:
        arg: "source=jsonl:PATH", where {split} in PATH becomes train, validation and test.
    """
    given = parse_arg(arg, source="jsonl:data/{split}.jsonl")
    config = base_config()
    config.task.name = "messages"
    config.task.source = given.source
    config.task.template = "Message: {text}\nKind:"
    # What the model is to write for each label, with the space that sets it off from the template.
    config.task.verbalizers = {
        "complaint": " complaint",
        "question": " question",
        "praise": " praise",
    }
    config.method.init = "labels"
    return config
