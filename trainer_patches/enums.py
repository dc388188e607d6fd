"""Adds members to an existing string enum, and takes them away again.

Python offers no public way to do so: the tables behind an enum are private to the enum module, and which there are
differs between versions. That knowledge stays in this file, which imports nothing but the standard library.
"""

from __future__ import annotations

from enum import Enum
from typing import TypeVar

E = TypeVar("E", bound=Enum)


def add_member(enum_class: type[E], name: str, value: str) -> E:
    """Add ``name = value`` to ``enum_class``, a subclass of both ``str`` and ``Enum``, and return the new member.

    The member behaves like one from the class body: ``E(value)``, ``E[name]``, ``E.name``, iteration, ``in`` and
    equality with the plain string all work. It differs in one thing: it pickles as the plain string, so that what holds
    it can be unpickled where the enum was never extended.
    """
    if name in enum_class._member_map_ or value in enum_class._value2member_map_:
        raise ValueError(f"{enum_class.__name__} already has {name} = {value!r}")
    if hasattr(enum_class, name):
        raise ValueError(f"{enum_class.__name__}.{name} exists and is not a member")

    member: E = str.__new__(enum_class, value)  # type: ignore[type-var]  # no type says "both str and Enum"
    member._name_ = name
    member._value_ = value
    vars(member).update(
        __objclass__=enum_class,
        _sort_order_=len(enum_class._member_names_),
        # Pickle asks the instance before the class. By default a member pickles as a call, `enum_class(value)`, which
        # raises in a process that lacks the member.
        __reduce_ex__=lambda protocol: (str, (value,)),
        # Python 3.10 leaves deepcopy to __reduce_ex__ as well, which would turn the member into a string.
        __deepcopy__=lambda memo: member,
    )

    enum_class._member_names_.append(name)
    enum_class._member_map_[name] = member
    enum_class._value2member_map_[value] = member
    hashable_values = _hashable_values(enum_class)
    if hashable_values is not None:
        hashable_values.append(value)
    type.__setattr__(enum_class, name, member)  # EnumMeta's own refuses to bind the name of a member
    return member


def remove_member(enum_class: type[E], member: E) -> None:
    """Undo :func:``add_member``: leave every table of ``enum_class`` as it was before."""
    name, value = member._name_, member._value_
    if enum_class._member_map_.get(name) is not member:
        raise ValueError(f"{member!r} is not a member of {enum_class.__name__}")

    type.__delattr__(enum_class, name)
    hashable_values = _hashable_values(enum_class)
    if hashable_values is not None:
        hashable_values.remove(value)
    del enum_class._value2member_map_[value]
    del enum_class._member_map_[name]
    enum_class._member_names_.remove(name)


def _hashable_values(enum_class: type[Enum]) -> list[str] | None:
    """The values that ``in`` compares with, a list that later releases of 3.12 and 3.13 keep besides the map."""
    values: list[str] | None = getattr(enum_class, "_hashable_values_", None)
    return values
