"""A type checker that knows shapes alone: it checks annotations of jaxtyping and nothing else.

``Self``, protocols and NumPy unions are mypy's business; checked again at run time they cost time and, in
beartype 0.22, forbid ``Self`` in a function that is decorated by itself.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

from jaxtyping import AbstractArray


def _shapes_in(annotation: Any) -> tuple[type, ...]:
    """List the alternatives of an annotation, if all of them are jaxtyping's (or None)."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    alternatives = typing.get_args(annotation) if is_union else (annotation,)
    arrays = tuple(a for a in alternatives if inspect.isclass(a) and issubclass(a, AbstractArray))
    others = [a for a in alternatives if a not in arrays and a is not type(None)]
    return () if others else arrays


def check_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check the arrays that go into a function and come out of it, within one assignment of sizes to names."""
    signature = inspect.signature(function)
    expected = {name: _shapes_in(p.annotation) for name, p in signature.parameters.items()}
    expected = {name: shapes for name, shapes in expected.items() if shapes}
    returned = _shapes_in(signature.return_annotation)
    if not expected and not returned:
        return function

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        for name, shapes in expected.items():
            value = arguments.get(name)
            if value is not None and not isinstance(value, shapes):
                raise TypeError(f"{name} has shape {tuple(getattr(value, 'shape', ()))}, which is not {shapes}")
        result = function(*args, **kwargs)
        if returned and result is not None and not isinstance(result, returned):
            raise TypeError(f"the result has shape {tuple(getattr(result, 'shape', ()))}, which is not {returned}")
        return result

    return checked
