"""Extending an enum. Nothing here imports torch; the same checks hold on every supported Python."""

from __future__ import annotations

import copy
import pickle
from enum import Enum
from typing import Any

import pytest

from trainer_patches.enums import add_member, remove_member


class Fruit(str, Enum):
    """Made the way Transformers makes its enums."""

    APPLE = "apple"
    PEAR = "pear"

    @classmethod
    def _missing_(cls, value: object) -> Any:
        raise ValueError(f"{value} is not a fruit, select one of {list(cls._value2member_map_)}")


class Number(Enum):
    ONE = 1


def snapshot(enum_class: type[Enum]) -> dict[str, Any]:
    """Everything the class holds, with its containers copied, so that a later change shows."""
    return {name: copy.copy(v) if isinstance(v, list | dict) else v for name, v in vars(enum_class).items()}


@pytest.fixture
def plum():
    member = add_member(Fruit, "PLUM", "plum")
    yield member
    remove_member(Fruit, member)


def test_every_lookup_finds_the_member(plum):
    assert Fruit("plum") is Fruit["PLUM"] is Fruit.PLUM is Fruit(plum) is plum
    assert list(Fruit) == [Fruit.APPLE, Fruit.PEAR, plum]
    assert next(reversed(Fruit)) is plum
    assert len(Fruit) == 3
    assert plum in Fruit
    assert Fruit.__members__["PLUM"] is plum
    assert "PLUM" in dir(Fruit)
    assert (plum.name, plum.value) == ("PLUM", "plum")
    assert isinstance(plum, Fruit)


def test_the_member_is_its_string(plum):
    assert plum == "plum"
    assert hash(plum) == hash("plum")
    assert {plum: 1}["plum"] == 1
    assert repr(plum) == "<Fruit.PLUM: 'plum'>"
    assert str(plum) == "Fruit.PLUM"


@pytest.mark.filterwarnings("ignore:in 3.12 __contains__:DeprecationWarning")
def test_membership_of_values_follows_the_original_members(plum):
    def contains(value: object) -> object:
        try:
            return value in Fruit
        except TypeError as error:  # before Python 3.12 only members could be asked for
            return type(error)

    assert contains("plum") == contains("pear")
    assert contains("grape") in (False, TypeError)
    assert contains([]) in (False, TypeError)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dumps", [pickle.dumps, pickle._dumps], ids=["c", "python"])
def test_pickles_as_a_plain_string(plum, dumps, protocol):
    loaded = pickle.loads(dumps({"optim": plum, "again": plum}, protocol))
    assert type(loaded["optim"]) is str
    assert loaded == {"optim": "plum", "again": "plum"}
    assert pickle.loads(dumps(Fruit.PEAR, protocol)) is Fruit.PEAR


def test_deep_copies_hold_the_member(plum):
    assert copy.deepcopy({"optim": [plum]})["optim"][0] is plum


def test_removing_restores_the_class_exactly():
    before = snapshot(Fruit)
    member = add_member(Fruit, "PLUM", "plum")
    assert snapshot(Fruit) != before
    remove_member(Fruit, member)

    assert snapshot(Fruit) == before
    assert all(vars(Fruit)[name] is v for name, v in before.items() if not isinstance(v, list | dict))
    with pytest.raises(ValueError, match="plum is not a fruit"):
        Fruit("plum")
    assert not hasattr(Fruit, "PLUM")


def test_members_can_leave_in_any_order():
    before = snapshot(Fruit)
    plum, fig = add_member(Fruit, "PLUM", "plum"), add_member(Fruit, "FIG", "fig")
    remove_member(Fruit, plum)
    assert list(Fruit) == [Fruit.APPLE, Fruit.PEAR, fig]
    remove_member(Fruit, fig)
    assert snapshot(Fruit) == before


@pytest.mark.parametrize(
    ("name", "value"), [("PEAR", "new"), ("NEW", "pear"), ("upper", "new")], ids=["name", "value", "attribute"]
)
def test_what_is_taken_is_refused(name, value):
    before = snapshot(Fruit)
    with pytest.raises(ValueError, match=r"already has|exists and is not a member"):
        add_member(Fruit, name, value)
    assert snapshot(Fruit) == before


def test_only_string_enums():
    with pytest.raises(TypeError, match="not a subtype of str"):
        add_member(Number, "TWO", "two")


def test_only_a_member_can_be_removed(plum):
    stranger = str.__new__(Fruit, "plum")
    stranger._name_, stranger._value_ = "PLUM", "plum"
    with pytest.raises(ValueError, match="is not a member of Fruit"):
        remove_member(Fruit, stranger)
    assert Fruit("plum") is plum
