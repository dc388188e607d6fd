"""Gives ``TrainingArguments`` the rotational fields in place, and takes them away again.

In place, so that the arguments that a script saves are of the stock class, and load where this package is not there.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, get_type_hints

from transformers import TrainingArguments

from hf_rotational.errors import UserError
from hf_rotational.optim.factory import OPTIMIZERS, optim_name
from hf_rotational.training.arguments import RotationalTrainingArguments, check_arguments
from trainer_patches.attributes import replace

Fields = Mapping[str, "dataclasses.Field[Any]"]

#: Fields that mean something with every optimizer.
INDEPENDENT = ("rotation_logging_steps", "weight_standardization")


def add_fields(undo: ExitStack) -> None:
    """Add the fields to ``TrainingArguments`` and the subclasses there are; subclasses to come inherit them."""
    fields = script_fields()
    annotations = {name: field.type for name, field in fields.items()}
    replace(TrainingArguments, "__annotations__", vars(TrainingArguments)["__annotations__"] | annotations, undo)
    for name, field in fields.items():
        # Read by arguments that were made before.
        replace(TrainingArguments, name, default(field), undo)
    for cls in _dataclasses(TrainingArguments):
        _extend(cls, fields, undo)
    replace(TrainingArguments, "__post_init__", _checking(TrainingArguments.__post_init__, fields), undo)
    undo.callback(_forget, fields)


def script_fields() -> Fields:
    """The fields of ``RotationalTrainingArguments``, by whose default one can tell that a script was not given them."""
    types = get_type_hints(RotationalTrainingArguments)
    inherited = TrainingArguments.__dataclass_fields__
    fields: Fields = dataclasses.make_dataclass(
        "ScriptFields",
        [
            (field.name, *_script_field(field, types[field.name]))
            for field in dataclasses.fields(RotationalTrainingArguments)
            if field.name not in inherited
        ],
    ).__dataclass_fields__  # type: ignore[attr-defined]
    return fields


def _script_field(field: dataclasses.Field[Any], annotation: Any) -> tuple[Any, dataclasses.Field[Any]]:
    value = default(field)
    if field.name == "weight_standardization" or isinstance(value, (bool, list)):
        # Their defaults are as good as saying nothing.
        return annotation, copy.copy(field)
    shown = f"{value} with a rotational --optim, else 0" if field.name == "rotation_logging_steps" else value
    own = "" if shown is None else f" (default: {shown})"  # else the text says what holds
    # Formatting the parser's own default to no characters keeps it from adding "(default: None)".
    described = {**field.metadata, "help": f"{field.metadata['help']}{own}%(default).0s"}
    unset: Any = dataclasses.field(default=None, metadata=described)
    return annotation | None, unset


def default(field: dataclasses.Field[Any]) -> Any:
    """A field's default; a new list where it is one."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def check_script_arguments(args: Any, fields: Fields) -> None:
    """Check what a script was given, and settle what depends on the optimizer.

    Raises:
        UserError: for rotational settings without a rotational ``optim``, which would ignore them, or bad ones.
    """
    optim = optim_name(args)
    given = [
        f"--{name}"
        for name, field in fields.items()
        if name not in INDEPENDENT and getattr(args, name) != default(field)
    ]
    if given and optim not in OPTIMIZERS:
        raise UserError(
            f"{', '.join(given)} would do nothing with --optim {optim}: add --optim rotational_adamw "
            f"(or {', '.join(name for name in OPTIMIZERS if name != 'rotational_adamw')})"
        )
    for name in fields:
        if getattr(args, name) is None and optim in OPTIMIZERS:
            setattr(args, name, getattr(RotationalTrainingArguments, name))
    args.rotation_logging_steps = args.rotation_logging_steps or 0
    try:
        check_arguments(args)
    except ValueError as error:
        raise UserError(str(error)) from None


def _dataclasses(cls: Any) -> Iterator[Any]:
    """A class and its subclasses, as far as they are dataclasses that have not got the fields from us."""
    if "__dataclass_fields__" in vars(cls):
        yield cls
    for subclass in cls.__subclasses__():
        if subclass is not RotationalTrainingArguments:
            yield from _dataclasses(subclass)


def _extend(cls: Any, fields: Fields, undo: ExitStack) -> None:
    known = vars(cls)["__dataclass_fields__"]
    new = {name: field for name, field in fields.items() if name not in known}
    replace(cls, "__dataclass_fields__", known | new, undo)
    if "__init__" in vars(cls) and not new.keys() <= inspect.signature(cls.__init__).parameters.keys():
        replace(cls, "__init__", _accepting(cls.__init__, new), undo)


def _accepting(original: Callable[..., None], fields: Fields) -> Callable[..., None]:
    """A constructor that takes the fields as keyword arguments too."""

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        for name, field in fields.items():
            if name in kwargs:
                setattr(self, name, kwargs.pop(name))
            elif name not in vars(self):  # a subclass's constructor may have set it
                setattr(self, name, default(field))
        original(self, *args, **kwargs)

    signature = inspect.signature(original)
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default(f)) for name, f in fields.items()]
    parameters = sorted([*signature.parameters.values(), *added], key=lambda parameter: parameter.kind)
    __init__.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return __init__


def _checking(original: Callable[..., None], fields: Fields) -> Callable[..., None]:
    @functools.wraps(original)
    def __post_init__(self: Any) -> None:
        original(self)
        if not isinstance(self, RotationalTrainingArguments):
            check_script_arguments(self, fields)

    return __post_init__


def _forget(fields: Fields) -> None:
    """Take the fields out of the classes that inherited them; their constructors still take them, to no effect."""
    for cls in _dataclasses(TrainingArguments):
        known = cls.__dataclass_fields__
        if any(known.get(name) is field for name, field in fields.items()):
            cls.__dataclass_fields__ = {name: f for name, f in known.items() if fields.get(name) is not f}
