"""What a forward pass may leave behind in a module, and the places where it finds its parameters.

Modules build masks and caches at their first call, install hooks, count, and keep what they have seen: in attributes,
in lists and dicts that these hold, in their classes. Under a transform of functions these would be tensors that are
dead outside of it. All of it is written down before a call and put back after.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any, Final, Self, TypeAlias, final

import torch
from torch import Tensor, nn

from ntk_lazy.modes import as_recordable, is_recordable

# A tensor that is not kept alive, and its name.
Named: TypeAlias = tuple["weakref.ref[Tensor]", str]
# A function of a holder, a key and a new value; the holder; and the key.
Place: TypeAlias = tuple[Callable[[Any, Any, Any], None], Any, Any]

_DEPTH: Final = 4  # of objects and containers inside each other; modules are followed wherever they are
_MOST_ENTRIES: Final = 1 << 16  # of a container: more are data, and no cache
# What these packages define is no part of a user's module, or is a module itself.
_FOREIGN: Final = frozenset(("torch", "numpy", "builtins", "typing", "abc", "logging", "ntk_lazy", "linear_operator"))
_PLAIN: Final = (int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size, type, ModuleType)
_DICTS: Final = frozenset((dict, OrderedDict))
_SKIPPED: Final = frozenset((int, float, str, bytes, bool, complex, type(None), torch.dtype, torch.device, torch.Size))


def _drop(holder: Any, key: Any, value: Any) -> None:
    """What is stored nowhere is not exchanged."""


_NOWHERE: Final[Place] = (_drop, None, None)


@final
class ModuleState:
    """Attributes, hooks, submodules, buffers and containers of modules and of their classes, as they are now.

    Tensors are held and not copied: what is written into a buffer is the business of whoever hands out copies.
    """

    def __init__(self, names: Mapping[int, Named] | None = None) -> None:
        """Begin with nothing."""
        self._names = names or {}
        self._places: list[tuple[str | None, Place, Tensor, bool]] = []
        self._copies: list[tuple[Tensor, int]] = []
        self._empty: list[Any] = []
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._lists: list[tuple[Any, list[Any]]] = []
        self._classes: list[tuple[type, dict[str, Any]]] = []
        self._functions: list[Any] = []
        self._seen: set[int] = set()

    @classmethod
    def of(cls, *roots: Any, names: Mapping[int, Named] | None = None) -> Self:
        """Look at modules, and at functions that may hold modules or their tensors; None is nothing.

        Of what a function holds no more is noted than modules, and the places of tensors.

        Args:
            roots: Where to look.
            names: Those of the tensors whose places are wanted, by identity, with the tensors.
        """
        state = cls(names)
        for root in roots:
            state._visit(root, _NOWHERE, _DEPTH, keeps=False)
        # What lies in a closure and in an attribute too is put back.
        while state._functions:
            state._visit_function(*state._functions.pop())
        return state

    def exchange(self, tensors: Mapping[str, Tensor], *, copies: bool = False) -> None:
        """Put other tensors in the place of those that are registered under these names, wherever they were found.

        Args:
            tensors: By name.
            copies: Whether tensors that are not registered, and whose place is in an attribute, are copied. One that
                was made in inference mode is exchanged for an ordinary one in any case.
        """
        for name, (put, holder, key), old, is_view in self._places:
            if name is None:
                if copies or not is_recordable(old):
                    own = as_recordable(old).clone() if copies else as_recordable(old)
                    self._copies.append((own, own._version))
                    put(holder, key, own)
            elif name in tensors:
                put(holder, key, _same_view(old, tensors[name]) if is_view else tensors[name])

    def put_back(self) -> None:
        """Make everything as it was."""
        for _, (put, holder, key), old, _ in reversed(self._places):
            put(holder, key, old)
        for kind, kept in self._classes:
            _put_class_back(kind, kept)
        for empty in self._empty:
            if empty:
                empty.clear()
        for entries, kept in self._dicts:
            if not _is_same(entries, kept):
                _put_dict_back(entries, kept)
        for entries, items in self._lists:
            if list(map(id, entries)) != list(map(id, items)):
                entries.clear()
                (entries.update if isinstance(entries, set) else entries.extend)(items)

    @property
    def is_written_to(self) -> bool:
        """Whether somebody has written to one of the copies."""
        return any(copy._version != version for copy, version in self._copies)

    def _visit(self, value: Any, place: Place, depth: int, *, keeps: bool) -> None:
        """Look at a value; with ``keeps`` what it holds is put back later."""
        if isinstance(value, Tensor):
            self._note(value, place, keeps=keeps)
            return
        if id(value) in self._seen or isinstance(value, _PLAIN):
            return
        if isinstance(value, nn.Module):
            self._seen.add(id(value))
            self._visit_module(value)
            return
        if depth == 0:
            return
        if isinstance(value, tuple):
            self._visit_tuple(value, place, depth - 1, keeps=keeps)
            return
        self._seen.add(id(value))
        if isinstance(value, dict):
            self._visit_dict(value, depth - 1, keeps=keeps)
        elif isinstance(value, list | deque):
            self._visit_list(value, depth - 1, keeps=keeps)
        elif isinstance(value, set):
            if keeps:
                (self._lists.append((value, list(value))) if value else self._empty.append(value))
        elif isinstance(value, FunctionType | MethodType | partial):
            self._functions.append((value, depth - 1))
        elif _is_of_user(type(value)) and hasattr(value, "__dict__"):
            self._visit_dict(vars(value), depth - 1, keeps=keeps)

    def _visit_module(self, module: nn.Module) -> None:
        self._visit_dict(vars(module), _DEPTH, keeps=True)
        for kind in type(module).__mro__:
            if id(kind) not in self._seen and _is_of_user(kind):
                self._seen.add(id(kind))
                kept = dict(vars(kind))
                self._classes.append((kind, kept))
                for name, value in kept.items():
                    if not isinstance(value, FunctionType) or value.__closure__ is not None:
                        self._visit(value, (setattr, kind, name), _DEPTH, keeps=True)

    def _visit_dict(self, entries: dict[Any, Any], depth: int, *, keeps: bool) -> None:
        if not entries and keeps:
            self._empty.append(entries)
        if not 0 < len(entries) <= _MOST_ENTRIES:
            return
        put = OrderedDict.__setitem__ if isinstance(entries, OrderedDict) else dict.__setitem__
        if keeps:
            self._dicts.append((entries, dict(entries)))
        for key, value in entries.items():
            # Most of what a module holds are numbers, and dicts of hooks that are empty.
            kind = type(value)
            if kind in _SKIPPED:
                continue
            if kind in _DICTS and not value:
                if keeps:
                    self._empty.append(value)
                continue
            self._visit(value, (put, entries, key), depth, keeps=keeps)

    def _visit_list(self, entries: list[Any] | deque[Any], depth: int, *, keeps: bool) -> None:
        if not entries and keeps:
            self._empty.append(entries)
        if not 0 < len(entries) <= _MOST_ENTRIES:
            return
        if keeps:
            self._lists.append((entries, list(entries)))
        put = list.__setitem__ if isinstance(entries, list) else deque.__setitem__
        for index, value in enumerate(entries):
            if type(value) not in _SKIPPED:
                self._visit(value, (put, entries, index), depth, keeps=keeps)

    def _visit_tuple(self, value: tuple[Any, ...], place: Place, depth: int, *, keeps: bool) -> None:
        items = _TupleItems(value, place)
        for index, item in enumerate(value):
            self._visit(item, (_TupleItems.put, items, index), depth, keeps=keeps)

    def _visit_function(self, function: Any, depth: int) -> None:
        if isinstance(function, MethodType):
            self._visit(function.__self__, _NOWHERE, depth, keeps=False)
            function = function.__func__
        if isinstance(function, partial):
            self._visit(function.func, _NOWHERE, depth, keeps=False)
            self._visit(function.args, (_put_arguments, function, None), depth, keeps=False)
            self._visit(function.keywords, _NOWHERE, depth, keeps=False)
            return
        if not isinstance(function, FunctionType):
            return
        for cell in function.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            self._visit(content, (setattr, cell, "cell_contents"), depth, keeps=False)
        self._visit(function.__defaults__, (setattr, function, "__defaults__"), depth, keeps=False)
        self._visit(function.__kwdefaults__, (setattr, function, "__kwdefaults__"), depth, keeps=False)

    def _note(self, tensor: Tensor, place: Place, *, keeps: bool) -> None:
        name, is_view = self._name_of(tensor), False
        if name is None and tensor.requires_grad and tensor._is_view():
            # A view with a graph that leads to a parameter.
            name, is_view = self._name_of(tensor._base), True
        is_plain = name is None and tensor.layout == torch.strided and not tensor.requires_grad
        if place is not _NOWHERE and (name is not None or (is_plain and (keeps or not is_recordable(tensor)))):
            self._places.append((name, place, tensor, is_view))

    def _name_of(self, tensor: Tensor | None) -> str | None:
        found, name = self._names.get(id(tensor), (None, None))
        return name if found is not None and found() is tensor else None


@contextmanager
def module_state_kept(*roots: Any, names: Mapping[int, Named] | None = None) -> Iterator[ModuleState]:
    """Put back what happens to modules within the context; see ``ModuleState.of``."""
    state = ModuleState.of(*roots, names=names)
    try:
        yield state
    finally:
        state.put_back()


@final
class _TupleItems:
    """A tuple that is made anew, where it stands, when one of its items is exchanged."""

    def __init__(self, value: tuple[Any, ...], place: Place) -> None:
        # By its iterator: a tuple of other kinds may refuse to tell its length.
        self.value, self.place, self.items = value, place, list(iter(value))

    def put(self, index: int, item: Any) -> None:
        self.items[index] = item
        put, holder, key = self.place
        if all(a is b for a, b in zip(self.items, self.value, strict=True)):
            made: Any = self.value
        else:
            make: Callable[[Iterable[Any]], Any] = getattr(type(self.value), "_make", tuple)
            made = make(self.items)
        put(holder, key, made)


def _put_arguments(function: Any, key: Any, args: Any) -> None:
    function.__setstate__((function.func, args, function.keywords, vars(function)))


def _same_view(old: Tensor, new: Tensor) -> Tensor:
    """That view of a new tensor which the old one is of its parameter."""
    base = old._base
    assert base is not None
    return new.as_strided(old.shape, old.stride(), old.storage_offset() - base.storage_offset())


def _is_of_user(kind: type) -> bool:
    return kind.__module__.partition(".")[0] not in _FOREIGN


def _is_same(entries: Mapping[Any, Any], kept: Mapping[Any, Any]) -> bool:
    # By identity: what is kept may not be comparable, as tensors are not.
    return list(map(id, entries.values())) == list(map(id, kept.values())) and list(map(id, entries)) == list(
        map(id, kept)
    )


def _put_class_back(kind: type, kept: Mapping[str, Any]) -> None:
    now = vars(kind)
    if _is_same(now, kept):
        return
    for name in now.keys() - kept.keys():
        delattr(kind, name)
    for name, value in kept.items():
        if now.get(name) is not value:
            setattr(kind, name, value)


def _put_dict_back(entries: dict[Any, Any], kept: Mapping[Any, Any]) -> None:
    # Past the methods of classes that forbid changes; an OrderedDict has an order beside its entries.
    base: Any = OrderedDict if isinstance(entries, OrderedDict) else dict
    for key in entries.keys() - kept.keys():
        base.__delitem__(entries, key)
    for key, value in kept.items():
        base.__setitem__(entries, key, value)
    if list(entries) != list(kept):
        base.clear(entries)
        for key, value in kept.items():
            base.__setitem__(entries, key, value)
