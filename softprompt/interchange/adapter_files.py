"""The files of a PEFT adapter: adapter_config.json, and adapter_model.safetensors (or .bin).

Source: `PeftModel.save_pretrained` and `PeftConfigMixin.save_pretrained` of peft 0.21.2.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from softprompt.errors import UserError
from softprompt.files import read_json, write_bytes, write_text
from softprompt.methods.delta_file import KEY
from softprompt.pretrained.tensor_files import ALL, open_file

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The content of an adapter's files.

    Attributes:
        config: the content of adapter_config.json.
        tensors: name in adapter_model.safetensors -> float32.
        provenance: our metadata of adapter_model.safetensors, {} where PEFT wrote it.
        file: names the adapter in errors.
    """

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    file: str = "adapter"


def tensors_bytes(tensors: Mapping[str, np.ndarray], provenance: Mapping[str, Any]) -> bytes:
    """The bytes of adapter_model.safetensors.

    The header is PEFT's, with one more key of metadata, `KEY`, for the provenance. safetensors
    orders metadata at random; here the same adapter always gives the same bytes.
    """
    content = save(dict(tensors), {"format": "pt"})
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    if provenance:
        header["__metadata__"][KEY] = json.dumps(provenance, sort_keys=True)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[end:]


def write_adapter(folder: epath.PathLike, adapter: Adapter) -> None:
    """Writes the two files into a folder, local or gs://; the config last."""
    folder = epath.Path(folder)
    write_bytes(folder / TENSORS, tensors_bytes(adapter.tensors, adapter.provenance))
    write_text(folder / CONFIG, json.dumps(adapter.config, indent=2, sort_keys=True))


def read_adapter(folder: Path) -> Adapter:
    """Reads an adapter's folder; tensors become float32.

    Raises:
        UserError: there is no adapter; its config is malformed; its tensors are incomplete, or have
            entries that are not finite; a .bin holds more than tensors, or PyTorch is missing.
    """
    if not (folder / CONFIG).exists():
        inside = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}"))
        hint = f"; there are adapters in its folders {', '.join(inside)}" if inside else ""
        raise UserError(f"{folder}: no PEFT adapter there (it has no {CONFIG}){hint}")
    config = read_json(folder / CONFIG)
    file = folder / TENSORS
    file = file if file.exists() else folder / PICKLE
    if not file.exists():
        raise UserError(f"{folder}: neither {TENSORS} nor {PICKLE}")
    opened = open_file(file)
    tensors = {name: opened.read(name, ALL).astype(np.float32) for name in opened.tensors}
    check_finite(file, tensors)
    return Adapter(config, tensors, _provenance(file), str(folder))


def check_finite(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Checks that all entries of tensors are finite.

    Raises:
        UserError: names the first tensor with entries that are not.
    """
    for name, tensor in tensors.items():
        if wrong := np.count_nonzero(~np.isfinite(tensor)):
            raise UserError(f"{file}: {name}: {wrong:,} of {tensor.size:,} are not finite")


def _provenance(file: Path) -> dict[str, Any]:
    """Our metadata of a file; {} for a file that PEFT wrote."""
    if file.name == PICKLE:
        return {}
    try:
        with safe_open(file, framework="np") as opened:
            found = json.loads((opened.metadata() or {}).get(KEY, "{}"))
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{file}: its metadata {KEY!r} is not JSON ({error})") from error
    return found if isinstance(found, dict) else {}
