"""A pydantic model for each dataclass, derived from its fields, which gives validation, error
locations and a JSON schema.

The members of a union or family of dataclasses are distinguished by the key `kind`. The kind alone
may stand for the whole object, and where it is left out the class is that of the field's default.
Former kinds and keys are read as their current ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from dataclasses import field as dataclass_field
from functools import cache, lru_cache
from typing import Annotated, Any, Literal, Optional, TypeVar, Union, get_args, get_type_hints

import pydantic
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from sfumato.config.aliases import FORMER_KEYS, FORMER_VALUES, current_kind
from sfumato.config.descriptions import attribute_docs
from sfumato.config.kinds import SHORTHANDS, TAG, is_tagged, kind_of, members
from sfumato.errors import ConfigError, SfumatoError, closest, nearest

T = TypeVar("T")
_BEFORE = "before"
# likeness of a key to the one that is suggested for it: a letter or two of a word apart
NEAR = 0.75
SHOWN = 20  # problems that an error names; to look for near names takes a while


@cache
def config_fields(cls: Any) -> tuple[tuple[Field[Any], Any], ...]:
    """Return the fields that a configuration may set, with resolved types and declared bounds."""
    hints = get_type_hints(cls, include_extras=True)
    return tuple((field, hints[field.name]) for field in fields(cls) if field.init)


def plain(value: Any, annotation: Any = None) -> Any:
    """Return a configuration as dicts, lists, strings and numbers.

    `kind` is written where a union needs it.
    """
    if is_dataclass(value) and not isinstance(value, type):
        body = {
            field.name: plain(getattr(value, field.name), hint)
            for field, hint in config_fields(type(value))
        }
        return {TAG: kind_of(type(value)), **body} if is_tagged(annotation) else body
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def parse(cls: type[T], data: Any, *, where: str = "configuration") -> T:
    """Build a dataclass from plain data.

    Raises:
        ConfigError: naming every key that is unknown, missing, of the wrong type or out of bounds,
            and the nearest legal name.
    """
    present = modern(cls, data)
    try:
        model: Any = _model(cls)
        result: T = _build(cls, model.model_validate(present))
        return result
    except ValidationError as error:
        legal, found = _legal_keys(cls, present), error.errors()
        lines = [_explain(item, cls, legal) for item in found[:SHOWN]]
        if len(found) > SHOWN:
            lines.append(f"and {len(found) - SHOWN} more")
        raise ConfigError(
            "; ".join(lines),
            where=where,
            hint="`sfumato config show RECIPE` prints every key, `config schema` their types",
        ) from None


def modern(cls: type, data: Any) -> Any:
    """Return plain data of `cls` in current words and in full.

    Former kinds, keys and values are replaced; short names and left-out kinds are written out.
    """
    if not isinstance(data, Mapping):
        return data
    former = FORMER_KEYS.get(cls.__name__, {})
    result = {
        former.get(key, key): value
        for key, value in data.items()
        if key not in former.values() or not _former_key_given(key, former, data)
    }
    for name, values in FORMER_VALUES.get(cls.__name__, {}).items():
        if isinstance(result.get(name), str):
            result[name] = values.get(result[name], result[name])
    for entry, hint in config_fields(cls):
        if entry.name in result:
            result[entry.name] = _modern_value(entry, hint, result[entry.name])
    return result


def _former_key_given(key: str, former: Mapping[str, str], data: Mapping[str, Any]) -> bool:
    """Return whether a key's former spelling is given too.

    It then decides, since it was written on top of a whole configuration.
    """
    return any(old in data for old, new in former.items() if new == key)


def _modern_value(entry: Field[Any], hint: Any, value: Any) -> Any:
    options = members(hint)
    if not options:
        return value
    if not is_tagged(hint):
        return modern(options[0], value)
    if isinstance(value, str):
        value = {TAG: value}
    if not isinstance(value, Mapping):
        return value
    default = _default_kind(entry, hint)
    name = value.get(TAG, default)
    if not isinstance(name, str):
        return dict(value)
    kind = current_kind(name)
    shorthands = entry.metadata.get(SHORTHANDS, {})
    member = next(
        (option for option in options if kind_of(option) == kind or option.__name__ == name), None
    )
    if member is None and kind in shorthands:
        settings = plain(shorthands[kind], hint)
        return {**settings, **{key: item for key, item in value.items() if key != TAG}}
    if member is None:  # as it was written, for the error
        return {**value, TAG: name}
    return {
        TAG: kind_of(member),
        **modern(member, {key: item for key, item in value.items() if key != TAG}),
    }


def _default_kind(entry: Field[Any], hint: Any) -> str | None:
    """Return the kind that is meant where none is given: the default's, or the first for None.

    The result is None if the field has no default.
    """
    default = _default(entry, hint)
    if isinstance(default, dict):
        return str(default[TAG])
    return kind_of(members(hint)[0]) if default is None else None


def since(default: T, *, before: Any) -> T:
    """Declare a field that was added later: `default` is for new runs.

    `before` is what earlier runs did, for `fill_former_defaults`.
    """
    return dataclass_field(default=default, metadata={_BEFORE: before})


def fill_former_defaults(cls: type, data: Any) -> Any:
    """Fill in the keys that were added after a run's configuration was written.

    They get the values that describe what the run did then.
    """
    if not isinstance(data, dict):
        return data
    result = modern(cls, data)
    for entry, hint in config_fields(cls):
        if entry.name in result:
            chosen = result[entry.name]
            name = chosen.get(TAG) if isinstance(chosen, dict) else None
            options = members(hint)
            option = next(
                (option for option in options if kind_of(option) == name or not is_tagged(hint)),
                None,
            )
            result[entry.name] = chosen if option is None else fill_former_defaults(option, chosen)
        elif _BEFORE in entry.metadata:
            result[entry.name] = plain(entry.metadata[_BEFORE], hint)
    return result


def clear_model_cache() -> None:
    """Discard all derived models, after the fields of a dataclass have changed."""
    config_fields.cache_clear()
    _models.cache_clear()


def json_schema(cls: type) -> dict[str, Any]:
    """Return the JSON schema of a configuration, for completion in editors.

    Keys are described by the docstrings of their dataclasses.
    """
    schema = _model(cls).model_json_schema()
    described = {
        f"{_identifier(reached)}_{suffix}": reached
        for reached in _reachable_classes(cls)
        for suffix in ("plain", "tagged")
    }
    for name, part in {**schema.get("$defs", {}), f"{_identifier(cls)}_plain": schema}.items():
        texts = attribute_docs(described[name]) if name in described else {}
        for key, entry in part.get("properties", {}).items():
            if key in texts:
                entry["description"] = texts[key]
    return schema


def _build(annotation: Any, value: Any, path: str = "") -> Any:
    """Build the dataclass (or tuple, or scalar) that a validated model stands for.

    `path` is its key, "" for the root.
    """
    if isinstance(value, BaseModel):
        name = type(value).__name__.rpartition("_")[0]
        cls = next(option for option in members(annotation) if _identifier(option) == name)
        below = {
            field.name: _build(hint, getattr(value, field.name), _key(path, field.name))
            for field, hint in config_fields(cls)
        }
        try:
            return cls(**below)
        except SfumatoError as error:
            raise _with_key(error, path) from None
    return tuple(value) if isinstance(value, list) else value


def _key(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _with_key(error: SfumatoError, path: str) -> SfumatoError:
    """Return a dataclass's own error with the key of that dataclass, where it names none.

    A dataclass does not know what holds it.
    """
    if not path or error.where == path or error.where.startswith(f"{path}."):
        return error
    return ConfigError(error.what, where=path, hint=error.hint)


def _identifier(cls: type) -> str:
    return f"{cls.__module__}_{cls.__qualname__}".replace(".", "_")


def _reference(annotation: Any) -> Any:
    """Return the annotation with dataclasses replaced by the names of their models.

    The models may be mutually recursive.
    """
    options = members(annotation)
    if not options:
        return annotation
    optional = type(None) in get_args(annotation)
    if not is_tagged(annotation):
        inner: Any = f"{_identifier(options[0])}_plain"
    else:
        names = ", ".join(f"{_identifier(option)}_tagged" for option in options)
        inner = f"Annotated[Union[{names}], Field(discriminator='{TAG}')]"
    return f"Optional[{inner}]" if optional else inner


def _default(field: Field[Any], hint: Any) -> Any:
    if field.default_factory is not MISSING:
        return plain(field.default_factory(), hint)
    return ... if field.default is MISSING else plain(field.default, hint)


def _model(cls: Any) -> type[BaseModel]:
    """Return the pydantic model of `cls`, made with those of all dataclasses that it reaches."""
    return _models(cls, tuple(_reachable_classes(cls)))


@lru_cache
def _models(cls: Any, reachable: tuple[type, ...]) -> type[BaseModel]:
    namespace: dict[str, Any] = {
        "Annotated": Annotated,
        "Union": Union,
        "Optional": Optional,
        "Field": pydantic.Field,
    }
    models = []
    for reached in reachable:
        body: dict[str, Any] = {
            f.name: (_reference(hint), _default(f, hint)) for f, hint in config_fields(reached)
        }
        config = ConfigDict(
            extra="forbid", validate_default=True, title=reached.__name__, allow_inf_nan=False
        )
        kind = kind_of(reached)
        for suffix, extra in (("plain", {}), ("tagged", {TAG: (Literal[kind], kind)})):
            name = f"{_identifier(reached)}_{suffix}"
            namespace[name] = create_model(name, __config__=config, **extra, **body)  # type: ignore[call-overload]
            models.append(namespace[name])
    for model in models:
        model.model_rebuild(_types_namespace=namespace)
    root: type[BaseModel] = namespace[f"{_identifier(cls)}_plain"]
    return root


def _reachable_classes(cls: type) -> list[type]:
    reached: dict[type, None] = {}
    queue = [cls]
    while queue:
        current = queue.pop()
        if current not in reached:
            reached[current] = None
            queue += [option for _, hint in config_fields(current) for option in members(hint)]
    return list(reached)


def _legal_keys(cls: type, data: Any, prefix: str = "") -> list[str]:
    """Return the dotted paths of all keys that a configuration of these kinds has."""
    keys = []
    for field, hint in config_fields(cls):
        value = (
            data[field.name]
            if isinstance(data, dict) and field.name in data
            else _default(field, hint)
        )
        keys.append(prefix + field.name)
        options = members(hint)
        name = value.get(TAG) if isinstance(value, dict) else value
        for option in (
            options
            if not is_tagged(hint)
            else [option for option in options if kind_of(option) == name]
        ):
            keys += _legal_keys(option, value, f"{prefix}{field.name}.")
    return keys


def _nearest(key: str, legal: list[str]) -> str | None:
    """Return the key that was meant, or None if nothing is near.

    It is spelled similarly, or else is the outermost key that ends with the same word.
    """
    similar = nearest(key, legal, cutoff=NEAR)
    same = [path for path in legal if path.rpartition(".")[2] == key]
    return similar or min(same, key=lambda path: path.count("."), default=None)


def _locate(cls: type, location: Sequence[int | str]) -> tuple[str, Field[Any] | None]:
    """Return the dotted path of an error's location, and the last field.

    The location also names the kind after each key whose value has one; the path does not.
    """
    path: list[str] = []
    options, after_tagged, last = [cls], False, None
    for part in location:
        if after_tagged and (chosen := [option for option in options if kind_of(option) == part]):
            options, after_tagged = chosen, False
            continue
        path.append(str(part))
        known = [
            pair for option in options[:1] for pair in config_fields(option) if pair[0].name == part
        ]
        last, hint = known[0] if known else (None, None)
        options, after_tagged = members(hint), is_tagged(hint)
    return ".".join(path), last


def _explain(error: Any, cls: type, legal: list[str]) -> str:
    key, entry = _locate(cls, error["loc"])
    if error["type"] == "extra_forbidden":
        legal_key = _nearest(key, legal)
        return f"unknown key `{key}`" + (f" (did you mean `{legal_key}`?)" if legal_key else "")
    if error["type"] in ("model_type", "model_attributes_type"):
        return (
            f"`{key}` = {error['input']!r}: must be a mapping of keys to values"
            if key
            else f"{error['input']!r} is not a mapping of keys to values"
        )
    if error["type"] == "missing":
        return f"`{key}` is missing"
    if error["type"] == "union_tag_invalid":
        context = error["ctx"]
        options = [name.strip(" '") for name in context["expected_tags"].split(",")]
        options += [
            name
            for name in (entry.metadata.get(SHORTHANDS, {}) if entry else ())
            if name not in options
        ]
        guess = closest(current_kind(context["tag"]), options, cutoff=0.5).strip()
        listed = ", ".join(options) + (f"; {guess}" if guess else "")
        return f"`{key}` = {context['tag']!r} is not one of {listed}"
    if error["type"] == "union_tag_not_found":
        return f"`{key}` needs a `{TAG}`"
    return f"`{key}` = {error['input']!r}: {error['msg'].lower()}"
