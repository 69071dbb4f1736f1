"""The run-time type checks of the package, at a fraction of what jaxtyping's own decorator takes a call.

`--jaxtyping-packages` puts `jaxtyping.jaxtyped` on every function and class of saelab. That binds the arguments in
Python at each call and checks them twice, so that its message can print them: half the time of the suite. `install`
puts one in its place that checks the same: beartype reads arguments and results once, and a function with shapes has
names of axes of its own. What is never called is never read: thousands of functions in each process.
"""

import dataclasses
import functools
import inspect
from typing import Any, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping._storage import get_shape_memo, pop_shape_memo, push_shape_memo

JAXTYPED = jaxtyping.jaxtyped
ANNOTATION = type(jaxtyping.AbstractArray)
IS_ARRAY = ANNOTATION.__instancecheck__
KINDS: dict[Any, bool] = {}
"""whether arrays of a class and a dtype, of whatever shape, are as an annotation has it"""
CONF = BeartypeConf(violation_type=jaxtyping.TypeCheckError)  # a TypeError, as some callers of saelab catch it


def install() -> None:
    """Use `check` wherever the import hook of jaxtyping uses its decorator; before saelab is imported."""
    jaxtyping.jaxtyped = check
    ANNOTATION.__instancecheck__ = is_array


def check(fn: Any = None, **options: Any) -> Any:
    """A function that checks arguments and results, or a dataclass whose `__init__` does; generators by jaxtyping."""
    if fn is None:
        return functools.partial(check, **options)
    if inspect.isclass(fn):
        if dataclasses.is_dataclass(fn) and not hasattr(fn.__init__, "__wrapped__"):
            fn.__init__ = _check_function(fn.__init__)
        return fn
    if not inspect.isfunction(fn) or inspect.isgeneratorfunction(fn):
        return JAXTYPED(fn, **options)
    return _check_function(fn)


def is_array(annotation: Any, value: Any) -> bool:
    """Whether an array is as annotated. jaxtyping reads the name of its dtype from what it prints, at each call."""
    if annotation._skip_instancecheck:
        return True
    kind = annotation, type(value), getattr(value, "dtype", None)
    if kind not in KINDS:
        KINDS[kind] = IS_ARRAY(annotation.dtype[annotation.array_type, "..."], value)
    if not KINDS[kind]:
        return False
    sizes, shapes, _, arguments = get_shape_memo()
    before = sizes.copy(), shapes.copy()
    if not annotation._check_shape(value, sizes, shapes, arguments):
        return True
    for known, was in zip((sizes, shapes), before, strict=True):  # an array that does not fit names no axes
        known.clear()
        known.update(was)
    return False


def _check_function(fn: Any) -> Any:
    checked: Any = None
    shaped = False

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked, shaped
        if jaxtyping.config.jaxtyping_disable:
            return fn(*args, **kwargs)
        if checked is None:
            checked, shaped = _read_function(fn)
        if not shaped:
            return checked(*args, **kwargs)
        push_shape_memo({})
        try:
            return checked(*args, **kwargs)
        finally:
            pop_shape_memo()

    return call


def _read_function(fn: Any) -> tuple[Any, bool]:
    """The function with beartype's checks, and whether its annotations name axes."""
    own = fn.__annotations__
    read = {name: _read(hint, fn) for name, hint in own.items()}
    fn.__annotations__ = read
    checked = beartype(fn, conf=CONF)
    fn.__annotations__ = checked.__annotations__ = own
    return checked, any("jaxtyping." in repr(hint) for hint in read.values())


def _read(hint: Any, fn: Any) -> Any:
    """An annotation in quotes as what it names; anything where that is not known here, as jaxtyping has it."""
    try:
        holder = type("Holder", (), {"__annotations__": {"hint": hint}})
        return get_type_hints(holder, fn.__globals__, include_extras=True)["hint"]
    except Exception:
        return Any
