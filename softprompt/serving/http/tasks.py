"""The endpoints of tasks: list, predict, load, unload, and outcomes of A/B aliases."""

from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from softprompt.analysis.outcomes import append_outcome
from softprompt.serving.folders import task_folder
from softprompt.serving.http.errors import Json, Refusal
from softprompt.serving.http.fields import Fields, is_text, parse_body, refusal
from softprompt.serving.http.service import Service
from softprompt.serving.requests import TaskInfo

LARGEST = 1e9  # of an outcome's value


async def list_models(http: HttpRequest) -> Response:
    """The base model, the tasks and the aliases."""
    return Json({"object": "list", "data": _models(http.app.state.service)})


async def show_model(http: HttpRequest) -> Response:
    """One of them."""
    name = http.path_params["name"]
    found = [one for one in _models(http.app.state.service) if one["id"] == name]
    if not found:
        raise Refusal("no such model or task is loaded; /v1/models lists them", 404)
    return Json(found[0])


def _models(service: Service) -> list[dict[str, Any]]:
    """A line each: the base model first, then tasks and aliases."""
    settings = service.settings
    tasks = sorted(service.engine.tasks(), key=lambda one: one.name)
    aliases = [
        _model(alias.name, 0, arms=dict(zip(alias.arms, alias.weights, strict=True)))
        for alias in settings.aliases.values()
    ]
    return [_model(settings.base, 0), *map(_task, tasks), *aliases]


def _model(name: str, created: int, **facts: Any) -> dict[str, Any]:
    """A line of the list."""
    return {"id": name, "object": "model", "created": created, "owned_by": "softprompt", **facts}


def _task(info: TaskInfo) -> dict[str, Any]:
    """A task's line."""
    return _model(
        info.name,
        int(info.loaded_at),
        root=info.model,
        method=info.method,
        length=info.length,
        bytes_file=info.bytes_file,
        bytes_cache=info.bytes_cache,
        digest=info.digest,
    )


async def predict(http: HttpRequest) -> Response:
    """Fills a task's template with each input and answers with labels and probabilities."""
    service: Service = http.app.state.service
    fields = parse_body(await http.body())
    user, inputs = fields.text("user", ""), take_inputs(fields, service.settings.rows)
    fields.finish({})
    task = service.resolve(http.path_params["name"], user, "the path")
    if not task:
        raise Refusal(f"{service.settings.base} is the model; allowed: a task or an alias", 404)
    found = await service.loading.run(service.engine.predict, task, inputs)
    return Json({"task": task, "predictions": found})


def take_inputs(fields: Fields, most: int) -> list[str]:
    """The inputs of predict: texts, the fields of each separated by tabs."""
    value = fields.take("inputs")
    if isinstance(value, list) and 0 < len(value) <= most and all(map(is_text, value)):
        return value
    raise refusal("inputs", value, f"a list of 1 to {most} texts")


async def load(http: HttpRequest) -> Response:
    """Loads the folder of a task, or loads it again; running rows finish on the old version."""
    service: Service = http.app.state.service
    name = http.path_params["name"]
    folder = await service.threads.run(task_folder, service.settings.root, name)
    if name == service.settings.base or name in service.settings.aliases:
        raise Refusal(f"{name!r} is the name of the model or of an alias", 409)
    return Json(_task(await service.loading.run(service.engine.load, name, folder)))


async def unload(http: HttpRequest) -> Response:
    """Forgets a task; its running rows finish."""
    service: Service = http.app.state.service
    name = http.path_params["name"]
    await service.loading.run(service.engine.unload, name)
    return Json({"id": name, "object": "model", "deleted": True})


async def outcome(http: HttpRequest) -> Response:
    """Records the outcome of an answer, a number, for the arm that gave it."""
    service: Service = http.app.state.service
    fields = parse_body(await http.body())
    name, arm, user = fields.text("alias"), fields.text("arm"), fields.text("user", "")
    value = fields.number("value", None, -LARGEST, LARGEST)
    fields.finish({})
    alias = service.settings.aliases.get(name)
    if alias is None:
        raise refusal("alias", name, ", ".join(service.settings.aliases) or "none; none is set")
    if arm not in alias.arms:
        raise refusal("arm", arm, ", ".join(alias.arms))
    await service.threads.run(
        append_outcome,
        service.settings.root,
        {"alias": name, "arm": arm, "baseline": alias.arms[0], "user": user, "value": value},
    )
    return Json({"alias": name, "arm": arm, "value": value}, 201)
