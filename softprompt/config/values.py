"""A trial's configuration: setting keys, checking values, and the trial's id.

Every error in a config is one line that names the key, the value and what is allowed.
"""

import difflib
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from softprompt.config.checks import check_used, check_values
from softprompt.config.data_sections import TASK_KEYS
from softprompt.config.schema import KEYS, METHOD_SETTINGS, OPEN_MAPPINGS, SECTIONS, base_config
from softprompt.data.builtin_tasks import TASKS, get_task
from softprompt.errors import UserError, nearest
from softprompt.methods.base import MethodSettings
from softprompt.methods.initializers import INITIALIZERS, InitializerSettings
from softprompt.settings import coerce
from softprompt.training.optimizers import OPTIMIZERS, UpdateRule

# Old name of a key -> its name. Stored configs may have old names; users are told the new one.
RENAMED = {
    "mesh.attention": "compute.attention",
    "mesh.population": "compute.population",
    "mesh.remat": "compute.remat",
}


def flatten(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """Returns {"method.length": 20, ...}, keys sorted; values of `OPEN_MAPPINGS` stay mappings."""
    tree = config.to_dict() if isinstance(config, ConfigDict) else config
    flat: dict[str, Any] = {}

    def visit(node: Mapping[str, Any], prefix: str) -> None:
        for key, value in node.items():
            path = f"{prefix}{key}"
            if isinstance(value, Mapping) and path not in OPEN_MAPPINGS:
                visit(value, f"{path}.")
            else:
                flat[path] = value

    visit(tree, "")
    return dict(sorted(flat.items()))


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """Returns the config as nested dicts, for JSON."""
    return config.to_dict()


def from_dict(tree: Mapping[str, Any]) -> ConfigDict:
    """Returns a locked config from nested dicts; missing keys (of older runs) get their defaults.

    It allows keys that have no effect, since a run may be older than the check for them, and old
    names of keys.

    Raises:
        UserError: an unknown key, a value of the wrong type, or one that is not allowed.
    """
    config = base_config()
    for key, value in with_new_names(flatten(tree)).items():
        set_key(config, key, value)
    _check_values(config)
    return config


def with_new_names(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Flat keys of a stored config, of which those in `RENAMED` get their new names."""
    return {RENAMED.get(key, key): value for key, value in flat.items()}


def set_key(config: ConfigDict, key: str, value: Any) -> None:
    """Sets one dotted key in place; a string is parsed as the key's type.

    Args:
        config: with the structure of `base_config`.
        key: such as "method.length", or "task.verbalizers.LABEL".
        value: of the key's type, or a string of the command line.

    Raises:
        UserError: the key is unknown (names near matches, or its new name), or the value has
            another type.
    """
    for mapping in OPEN_MAPPINGS:
        if key.startswith(f"{mapping}.") and len(key) > len(mapping) + 1:
            merged = {**flatten(config)[mapping], key[len(mapping) + 1 :]: value}
            set_key(config, mapping, merged)
            return
    if key not in KEYS:
        raise UserError(unknown_key(key, flatten(config)))
    *sections, leaf = key.split(".")
    node = config
    for section in sections:
        node = node[section]
    coerced = coerce(key, value, KEYS[key].default)
    node[leaf] = _tree(coerced) if isinstance(coerced, dict) else coerced


def _tree(tree: Mapping[str, Any]) -> ConfigDict:
    """A ConfigDict whose keys may contain dots, such as the label 1.0."""
    return ConfigDict(tree, allow_dotted_keys=True)


def unknown_key(key: str, known: Mapping[str, Any]) -> str:
    """An error line with a renamed key's new name, near matches, or else the section's keys."""
    if key in RENAMED:
        return f"config key {key!r} is now called {RENAMED[key]!r}"
    inside = [path for path in known if path.startswith(f"{key.split('.', 1)[0]}.")]
    if inside and "." not in key:
        return f"config key {key!r} is a section; its keys: {', '.join(inside)}"
    leaf = key.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.75)
    near += [
        path
        for path in known
        if difflib.get_close_matches(leaf, [path.rsplit(".", 1)[-1]], cutoff=0.75)
    ]
    if near:
        return f"unknown config key {key!r} (did you mean {', '.join(dict.fromkeys(near))}?)"
    if inside:
        return f"unknown config key {key!r}; keys of this section: {', '.join(inside)}"
    sections = dict.fromkeys(path.split(".", 1)[0] for path in known)
    return f"unknown config key {key!r}; sections: {', '.join(sections)}"


def validate(config: ConfigDict) -> None:
    """Checks every value, and that every key that is set has an effect.

    Raises:
        UserError: names the first key whose value has the wrong type or is not allowed, or that
            the method, the optimizer or the initialiser does not have.
    """
    _check_values(config)
    check_used(flatten(config))


def _check_values(config: ConfigDict) -> None:
    """Like `validate`, but allows keys that have no effect."""
    values = flatten(config)
    for name, value in values.items():
        if name not in KEYS:
            raise UserError(unknown_key(name, KEYS))
        coerce(name, value, KEYS[name].default)
    check_values(values)
    names = [one.task.name for one in task_configs(config)]
    if double := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"config key 'data.mixture' names {double[0]!r} twice; allowed: each task once"
        )
    if config.eval.transfer:
        transfers(config)


def method_settings(config: ConfigDict) -> MethodSettings:
    """The settings of a config's method."""
    return METHOD_SETTINGS[config.method.name].of(flatten(config))


def initializer_settings(config: ConfigDict) -> InitializerSettings | None:
    """The settings of a config's initialiser; None if `method.init` names none."""
    cls = INITIALIZERS.get(config.method.init)
    return cls.of(flatten(config)) if cls else None


def optimizer_settings(config: ConfigDict) -> UpdateRule:
    """The settings of a config's optimizer."""
    return OPTIMIZERS[config.optimizer.name].of(flatten(config))


def task_configs(config: ConfigDict) -> list[ConfigDict]:
    """The configs of a mixture's tasks, in order, which differ in the task; [config] for one task.

    Raises:
        UserError: the mixture is neither names nor a list of names and of keys of `task`, or a
            value that it sets is not allowed.
    """
    if not config.data.mixture:
        return [config]
    return [task_config(config, keys) for keys in _entries(config.data.mixture)]


def task_config(config: ConfigDict, keys: Mapping[str, Any]) -> ConfigDict:
    """The config for one task: keys of another task are reset, lengths and EOS are kept.

    Args:
        config: any config.
        keys: values of the section `task`, including its name.

    Raises:
        UserError: a value is not allowed.
    """
    tree, defaults = to_dict(config), to_dict(base_config())["task"]
    if keys["name"] != config.task.name:
        tree["task"] |= {key: defaults[key] for key in TASK_KEYS}
    tree["task"] |= keys
    tree["data"] |= {"mixture": ""}
    tree["eval"] |= {"transfer": ""}
    return from_dict(tree)


def transfers(config: ConfigDict) -> list[ConfigDict]:
    """The configs of the tasks in `eval.transfer`, in order.

    Raises:
        UserError: one is not a built-in task, is named twice, or is one that the config trains on.
    """
    names = [name.strip() for name in config.eval.transfer.split(",") if name.strip()]
    for n, name in enumerate(names):
        allowed = [one for one in TASKS if one not in (*task_names(config), *names[:n])]
        if name not in allowed:
            raise UserError(
                f"config key 'eval.transfer' names {name!r}{nearest(name, allowed)}; allowed, each "
                f"once: {', '.join(allowed)}"
            )
    return [task_config(config, {"name": name}) for name in names]


def _entries(mixture: str) -> list[dict[str, Any]]:
    """The keys that each entry of a mixture sets in the section `task`, including the name."""
    entries: Any = [name.strip() for name in mixture.split(",")]
    if mixture.lstrip().startswith("["):
        try:
            entries = json.loads(mixture)
        except ValueError as error:
            raise UserError(f"config key 'data.mixture' is not JSON: {error}") from error
    made = [{"name": one} if isinstance(one, str) else one for one in entries]
    for keys in made or [None]:
        if not (isinstance(keys, dict) and keys.get("name")):
            raise UserError(
                f"config key 'data.mixture' has an entry {keys!r}; allowed: the name of a task, or "
                'keys of `task` as in {"name": "mine", "source": "jsonl:mine.jsonl"}'
            )
    return made


def resolve(
    config: ConfigDict, *, backend: str = "", jax_version: str = "", cpu_flags: str = ""
) -> ConfigDict:
    """Returns a copy in which no scientific key is "auto", as a trial stores it.

    The dtype becomes the one that trains faster: bfloat16 on an accelerator and, from jax 0.12 on,
    on a CPU with bfloat16 instructions; float32 elsewhere. The default of `eval.metric`, accuracy,
    becomes the first metric of tasks that do not have it, such as free-text tasks.

    Args:
        config: a config, resolved or not.
        backend: "cpu", "gpu" or "tpu"; "" asks JAX, but only if the dtype is "auto".
        jax_version: such as "0.12.0"; "" is the installed one.
        cpu_flags: the processor's features, separated by spaces; "" asks the system.
    """
    resolved = _tree(config.to_dict()).lock()
    if resolved.model.dtype == "auto":
        if not backend:
            import jax

            backend = jax.default_backend()
        version = jax_version or importlib.metadata.version("jax")
        major, minor = (int(part) for part in version.split(".")[:2])
        on_cpu = (major, minor) >= (0, 12) and multiplies_bfloat16(cpu_flags or read_cpu_flags())
        resolved.model.dtype = "bfloat16" if backend != "cpu" or on_cpu else "float32"
    if resolved.eval.metric == "accuracy":
        metrics = [_metrics(one) for one in task_configs(resolved)]
        if not any("accuracy" in names for names in metrics):
            resolved.eval.metric = metrics[0][0]
    return resolved


def _metrics(config: ConfigDict) -> list[str]:
    """The names of a task's metrics, its first evaluator's first."""
    try:
        return [name for names in get_task(config.task).metrics.values() for name in names]
    except UserError:  # raised again when the task is read
        return ["accuracy"]


def multiplies_bfloat16(cpu_flags: str) -> bool:
    """Whether a processor with these features, by their Linux names, has bfloat16 instructions.

    They are AVX-512 BF16 and AMX on x86, and BF16 on Arm. Without them products are computed in
    float32, between conversions.
    """
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(cpu_flags.split())


def read_cpu_flags() -> str:
    """The processor's features by their Linux names; "" on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    flags = [line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))]
    return flags[0] if flags else ""


def scientific(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """Returns the scientific flat keys that differ from their defaults, sorted.

    Mesh, compute and logging are not scientific. Since defaults are left out, a new key whose
    default keeps the old behaviour does not change the result.
    """
    defaults = flatten(base_config())
    return {
        key: value
        for key, value in flatten(config).items()
        if _is_scientific(key) and (key not in defaults or value != defaults[key])
    }


def _is_scientific(key: str) -> bool:
    """Whether a key is part of a trial's id; for a removed key, whether its section is."""
    if key in KEYS:
        return KEYS[key].scientific
    section = key.rpartition(".")[0]
    return all(cls.scientific for cls in SECTIONS if cls.section == section)


def trial_id(config: ConfigDict) -> str:
    """Returns ten hex digits of a hash of `scientific(resolve(config))`."""
    canonical = json.dumps(scientific(resolve(config)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:10]


def weights_key(config: ConfigDict) -> str:
    """A key that identifies a config's model weights and their sharding."""
    return json.dumps([to_dict(config.model), to_dict(config.mesh)], sort_keys=True)


def runs_alone(config: ConfigDict) -> bool:
    """Whether no other trial may run beside this one.

    It trains nothing, it trains the weights, or it measures a latency, which other trials would
    disturb.
    """
    method = method_settings(config)
    return not method.trains or method.trains_weights or bool(config.eval.latency)


def trial_name(config: ConfigDict) -> str:
    """Returns a readable name, such as "prompt-20-vocabulary-s0"; `trial_id` identifies a trial.

    It includes the tasks if they are not the default.
    """
    names = [method_settings(config).label()]
    tasks = task_names(config)
    if tasks != task_names(base_config()):
        names.append(re.sub(r"[^\w.+]", "_", "+".join(tasks))[:40])  # a part of a folder's name
    return "-".join([*names, f"s{config.seed}"])


def task_names(config: ConfigDict | Mapping[str, Any]) -> list[str]:
    """Returns the names of a config's tasks: those of its mixture, or its only one."""
    mixture = config.get("data", {}).get("mixture", "")
    if mixture:
        return [keys["name"] for keys in _entries(mixture)]
    return [config.get("task", {}).get("name", "")]


def differences(ours: ConfigDict, theirs: ConfigDict) -> list[str]:
    """Returns "key: ours, theirs" for each scientific key in which two resolved configs differ."""
    left, right = flatten(ours), flatten(theirs)
    return [
        f"{key}: {left.get(key)!r}, {right.get(key)!r}"
        for key in sorted(left.keys() | right.keys())
        if _is_scientific(key) and left.get(key) != right.get(key)
    ]
