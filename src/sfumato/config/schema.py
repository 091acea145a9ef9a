"""A pydantic model for each dataclass, derived from its fields: validation, error locations and JSON schema for nothing.

A union of dataclasses is told apart by the key `kind`, the class's name; `kind` alone may stand for the whole object, and where it is left
out the class is that of the field's default.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from dataclasses import field as dataclass_field
from functools import lru_cache
from typing import Annotated, Any, Literal, Optional, TypeVar, Union, get_args, get_origin, get_type_hints

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, create_model

from sfumato.errors import ConfigError, SfumatoError

T = TypeVar("T")
TAG = "kind"
_BEFORE = "before"
NEAR = 0.75  # likeness of a key to the one that is suggested for it: a letter or two of a word apart


def members(annotation: Any) -> list[type]:
    """The dataclasses of a union, or of a single dataclass annotation; [] if there are none."""
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else [annotation]
    return [option for option in options if is_dataclass(option) and isinstance(option, type)]


def is_tagged(annotation: Any) -> bool:
    """Whether values of this annotation need a `kind`: it is a union of several dataclasses."""
    return len(members(annotation)) > 1


def config_fields(cls: type) -> list[tuple[Field[Any], Any]]:
    """The fields that a configuration may set, with their resolved types and the bounds declared with them."""
    hints = get_type_hints(cls, include_extras=True)
    return [(field, hints[field.name]) for field in fields(cls) if field.init]


def plain(value: Any, annotation: Any = None) -> Any:
    """A configuration as dicts, lists, strings and numbers; `kind` is written where a union needs it."""
    if is_dataclass(value) and not isinstance(value, type):
        body = {field.name: plain(getattr(value, field.name), hint) for field, hint in config_fields(type(value))}
        return {TAG: type(value).__name__, **body} if is_tagged(annotation) else body
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def parse(cls: type[T], data: Any, *, where: str = "configuration") -> T:
    """Build a dataclass from plain data.

    Raises:
        ConfigError: naming every key that is unknown, missing, of the wrong type or out of bounds, and the nearest legal name.
    """
    try:
        model: Any = _model(cls)  # type: ignore[arg-type]
        return _build(cls, model.model_validate(data))
    except ValidationError as error:
        legal = _legal_keys(cls, data)
        lines = [_explain(item, legal) for item in error.errors()]
        raise ConfigError(
            "; ".join(lines), where=where, mend="`sfumato config show RECIPE` prints every key, `config schema` their types"
        ) from None


def since(default: T, *, before: Any) -> T:
    """A field that came later: its default for new runs, and what runs did that were made before it, for `as_before`."""
    return dataclass_field(default=default, metadata={_BEFORE: before})


def as_before(cls: type, data: Any) -> Any:
    """The plain data of a run's own configuration, which were whole when written: a key that is absent means what the run did then."""
    if not isinstance(data, dict):
        return data
    result = dict(data)
    for entry, hint in config_fields(cls):
        if entry.name in data:
            chosen = data[entry.name]
            name = chosen.get(TAG) if isinstance(chosen, dict) else None
            options = members(hint)
            option = next((option for option in options if option.__name__ == name or len(options) == 1), None)
            result[entry.name] = chosen if option is None else as_before(option, chosen)
        elif _BEFORE in entry.metadata:
            result[entry.name] = plain(entry.metadata[_BEFORE], hint)
    return result


def json_schema(cls: type) -> dict[str, Any]:
    """JSON schema of a configuration, for editors' completion."""
    return _model(cls).model_json_schema()


def _build(annotation: Any, value: Any, path: str = "") -> Any:
    """The dataclass (or tuple, or scalar) that a validated model stands for; `path` is its key, "" for the root."""
    if isinstance(value, BaseModel):
        name = type(value).__name__.rpartition("_")[0]
        cls = next(option for option in members(annotation) if _identifier(option) == name)
        below = {
            field.name: _build(hint, getattr(value, field.name), _key(path, field.name)) for field, hint in config_fields(cls)
        }
        try:
            return cls(**below)
        except SfumatoError as error:
            raise _located(error, path) from None
    return tuple(value) if isinstance(value, list) else value


def _key(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _located(error: SfumatoError, path: str) -> SfumatoError:
    """A dataclass's own error, with the key of that dataclass where it names none: it does not know what holds it."""
    if not path or error.where == path or error.where.startswith(f"{path}."):
        return error
    return ConfigError(error.what, where=path, mend=error.mend)


def _identifier(cls: type) -> str:
    return f"{cls.__module__}_{cls.__qualname__}".replace(".", "_")


def _reference(annotation: Any, default: Any) -> Any:
    """The annotation with dataclasses replaced by the names of their models, which may be mutually recursive.

    Args:
        default: the field's, as plain data.
    """
    options = members(annotation)
    if not options:
        return annotation
    optional = type(None) in get_args(annotation)
    if len(options) == 1:
        inner: Any = f"{_identifier(options[0])}_plain"
    else:
        names = ", ".join(f"{_identifier(option)}_tagged" for option in options)
        usual = default[TAG] if isinstance(default, dict) else options[0].__name__ if optional else None
        inner = f"Annotated[Annotated[Union[{names}], Field(discriminator='{TAG}')], BeforeValidator(by_name({usual!r}))]"
    return f"Optional[{inner}]" if optional else inner


def _by_name(usual: str | None) -> Callable[[Any], Any]:
    """`schedule: Cosine` is short for `schedule: {kind: Cosine}`; a mapping without `kind` is of the usual one: the default's, and the
    first where the default is none at all.
    """

    def whole(value: Any) -> Any:
        if isinstance(value, str):
            return {TAG: value}
        return {TAG: usual, **value} if isinstance(value, dict) and TAG not in value and usual is not None else value

    return whole


def _default(field: Field[Any], hint: Any) -> Any:
    if field.default_factory is not MISSING:
        return plain(field.default_factory(), hint)
    return ... if field.default is MISSING else plain(field.default, hint)


@lru_cache
def _model(cls: Any) -> type[BaseModel]:
    """The pydantic model of `cls`, with those of all dataclasses that it reaches."""
    namespace: dict[str, Any] = {
        "Annotated": Annotated, "Union": Union, "Optional": Optional, "Field": pydantic.Field,
        "BeforeValidator": BeforeValidator, "by_name": _by_name,
    }  # fmt: skip
    models = []
    for reached in _reachable(cls):
        body: dict[str, Any] = {
            f.name: (_reference(hint, _default(f, hint)), _default(f, hint)) for f, hint in config_fields(reached)
        }
        config = ConfigDict(extra="forbid", validate_default=True, title=reached.__name__, allow_inf_nan=False)
        for suffix, extra in (("plain", {}), ("tagged", {TAG: (Literal[reached.__name__], reached.__name__)})):
            name = f"{_identifier(reached)}_{suffix}"
            namespace[name] = create_model(name, __config__=config, **extra, **body)  # type: ignore[call-overload]
            models.append(namespace[name])
    for model in models:
        model.model_rebuild(_types_namespace=namespace)
    root: type[BaseModel] = namespace[f"{_identifier(cls)}_plain"]
    return root


def _reachable(cls: type) -> list[type]:
    found: list[type] = []
    queue = [cls]
    while queue:
        current = queue.pop()
        if current not in found:
            found.append(current)
            queue += [option for _, hint in config_fields(current) for option in members(hint)]
    return found


def _legal_keys(cls: type, data: Any, prefix: str = "") -> list[str]:
    """Dotted paths of all keys that a configuration of these kinds has."""
    keys = []
    for field, hint in config_fields(cls):
        value = data[field.name] if isinstance(data, dict) and field.name in data else _default(field, hint)
        keys.append(prefix + field.name)
        options = members(hint)
        name = value.get(TAG) if isinstance(value, dict) else value
        for option in options if len(options) == 1 else [option for option in options if option.__name__ == name]:
            keys += _legal_keys(option, value, f"{prefix}{field.name}.")
    return keys


def _nearest(key: str, legal: list[str]) -> str | None:
    """The key that was meant: one that is spelled nearly so, or the outermost that ends with the same word; None if nothing is near."""
    close = difflib.get_close_matches(key, legal, n=1, cutoff=NEAR)
    same = [path for path in legal if path.rpartition(".")[2] == key]
    return close[0] if close else min(same, key=lambda path: path.count("."), default=None)


def _explain(error: Any, legal: list[str]) -> str:
    # A union's location repeats the class name; keys are lower case, class names are not.
    *parents, last = error["loc"] or ("",)
    path = [part for part in map(str, parents) if not part[:1].isupper()]
    if error["type"] == "extra_forbidden":
        key = ".".join([*path, str(last)])
        nearest = _nearest(key, legal)
        return f"`{key}` is no key" + (f" (did you mean `{nearest}`?)" if nearest else "")
    key = ".".join(path if str(last)[:1].isupper() else [*path, str(last)])
    if error["type"] in ("model_type", "model_attributes_type"):
        return (
            f"`{key}` = {error['input']!r}: needs keys and values"
            if key
            else f"{error['input']!r} is no mapping of keys to values"
        )
    if error["type"] == "missing":
        return f"`{key}` is missing"
    if error["type"] == "union_tag_invalid":
        context = error["ctx"]
        options = [name.strip(" '") for name in context["expected_tags"].split(",")]
        close = difflib.get_close_matches(str(context["tag"]), options, n=1, cutoff=0.4)
        guess = f"; did you mean `{close[0]}`?" if close else ""
        return f"`{key}` = {context['tag']!r} is none of {', '.join(options)}{guess}"
    if error["type"] == "union_tag_not_found":
        return f"`{key}` needs a `{TAG}`"
    return f"`{key}` = {error['input']!r}: {error['msg'].lower()}"
