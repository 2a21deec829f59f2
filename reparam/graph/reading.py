"""What is patched while forwards are read: calls of modules, reads of their tensors, and a few built-in functions."""

import builtins
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FunctionType
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.utils._device import _device_constructors

from reparam.graph.beside import forget_state
from reparam.graph.callers import asked_by_user
from reparam.graph.code import forget_code
from reparam.graph.entry_methods import forget_classes
from reparam.graph.going_through import noting_all
from reparam.graph.proxy import PLAIN, Traced, has_traced, kind_of_plain
from reparam.graph.signatures import forget_signatures
from reparam.graph.splices import ITERATED, has_rest
from reparam.graph.tracer import Tracer

_TENSOR: Final = torch.empty(0, device="meta")
FACTORIES: Final = ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "tensor", "zeros")
RESIZING: Final = ("interpolate", "pad")
CHECKS: Final = tuple(name for name in vars(torch) if name == "_check" or name.startswith("_check_"))
MODES: Final = ("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "is_autocast_cpu_enabled")
RANK_CHECK: Final = "_check_input_dim"
SIZED: Final = ("expand", "new_empty", "new_full", "new_ones", "new_zeros", "repeat", "reshape", "tile", "view")
ACTIVE: Final[list[Tracer]] = []  # the last one is at work


@contextmanager
def traced_builtins(opens: bool, numbers: bool) -> Iterator[None]:
    """While it lasts, ``len``, ``max`` and ``min`` of a traced value are traced, and a traced tensor is a ``Tensor``.

    Args:
        opens: whether functions marked by ``torch.fx.wrap`` are looked into.
        numbers: whether numbers and tensors that are made of traced sizes are traced, too.
    """
    plain_len, plain_isinstance, plain_max, plain_min = builtins.len, builtins.isinstance, builtins.max, builtins.min
    plain_callable = builtins.callable

    def traced_len(value: Any) -> Any:
        if type(value) is not Traced:
            if ACTIVE[-1].splices and type(value) in (list, tuple) and has_rest(value):
                raise TraceError(ITERATED)
            return plain_len(value)
        count = value.tracer.known_length(value.node)  # type: ignore[attr-defined]
        return value.tracer.create_proxy("call_function", plain_len, (value,), {}) if count is None else count

    def traced_isinstance(value: Any, kinds: Any) -> bool:
        if type(value) is Traced and not value.node.meta.get(PLAIN):
            if value.node.op == "placeholder" and asked_by_user(2):
                ACTIVE[-1].on_question(value.node, kinds)
            if plain_isinstance(_TENSOR, kinds):
                return True
            if asked_by_user(2):
                return kinds is fx.Proxy or (type(kinds) is tuple and fx.Proxy in kinds)
        elif type(value) is Traced and asked_by_user(2):
            kind = kind_of_plain(value.node)
            return plain_isinstance(value, kinds) if kind is None else issubclass(kind, kinds)
        answer = plain_isinstance(value, kinds)
        if plain_isinstance(value, nn.Module):
            ACTIVE[-1].on_kind(value, kinds, answer)
        return answer

    def traced_callable(value: Any) -> bool:
        if type(value) is not Traced or not asked_by_user(2):
            return plain_callable(value)
        if value.node.op == "placeholder":
            ACTIVE[-1].on_question(value.node, None)
        return False

    wrapped = [
        (scope, name, scope[name])
        for (_, name), scope in torch.fx._symbolic_trace._wrapped_fns_to_patch.items()
        if not opens and plain_isinstance(scope.get(name), FunctionType)
    ]
    builtins.len, builtins.isinstance = traced_len, traced_isinstance
    builtins.callable = traced_callable  # type: ignore[assignment]
    builtins.max, builtins.min = _one_operation(plain_max), _one_operation(plain_min)
    for scope, name, function in wrapped:
        scope[name] = _one_operation(function)
    try:
        with _made_of_sizes() if numbers else nullcontext():
            yield
    finally:
        builtins.len, builtins.isinstance = plain_len, plain_isinstance
        builtins.callable = plain_callable
        builtins.max, builtins.min = plain_max, plain_min
        for scope, name, function in wrapped:
            scope[name] = function


@contextmanager
def _made_of_sizes() -> Iterator[None]:
    """While it lasts, numbers and tensors that are made of traced sizes are traced.

    It replaces classes and functions that code may compare, so it is for forwards that cannot be read otherwise.
    """
    _device_constructors()  # torch remembers these functions for good when it first asks for them
    homes = {torch: FACTORIES, nn.functional: RESIZING}
    replaced = [(home, name, getattr(home, name)) for home, names in homes.items() for name in names]
    plain_int, plain_float = builtins.int, builtins.float
    builtins.int, builtins.float = _number(plain_int), _number(plain_float)  # type: ignore[misc, assignment]
    for home, name, function in replaced:
        setattr(home, name, _one_operation(function))
    as_tensor = torch.as_tensor
    torch.as_tensor = _unless_tensor(as_tensor)
    try:
        yield
    finally:
        torch.as_tensor = as_tensor
        builtins.int, builtins.float = plain_int, plain_float  # type: ignore[misc]
        for home, name, function in replaced:
            setattr(home, name, function)


def _one_operation(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is not looked into where it is called on traced values."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if not has_traced((args, kwargs)):
            return function(*args, **kwargs)
        return ACTIVE[-1].create_proxy("call_function", function, args, kwargs)

    return call


def _unless_tensor(as_tensor: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.as_tensor``, which returns a tensor as it is."""
    traced = _one_operation(as_tensor)
    return lambda *args, **kwargs: args[0] if _is_one_tensor(args) and not kwargs else traced(*args, **kwargs)


def _is_one_tensor(args: tuple[Any, ...]) -> bool:
    return len(args) == 1 and type(args[0]) is Traced and not args[0].node.meta.get(PLAIN)


def _number(kind: type) -> type:
    """A stand-in for ``int`` or ``float`` that makes an operation of a call on a traced value."""

    class Kind(type):
        def __call__(cls, *args: Any) -> Any:
            return _one_operation(kind)(*args)

        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, kind)

        def __subclasscheck__(cls, other: type) -> bool:
            return issubclass(other, kind)

        def __eq__(cls, other: object) -> bool:
            return other is cls or other is kind

        def __hash__(cls) -> int:
            return hash(kind)

        def __getattr__(cls, name: str) -> Any:
            return getattr(kind, name)

    return Kind(kind.__name__, (), {})


def _sized(name: str) -> Callable[..., Any]:
    """A method of plain tensors some of whose sizes may be traced."""
    method = getattr(Tensor, name)

    def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not ACTIVE or not has_traced((args, kwargs)):
            return method(tensor, *args, **kwargs)
        return ACTIVE[-1].create_proxy("call_method", name, (tensor, *args), kwargs)

    return call


@contextmanager
def reading() -> Iterator[None]:
    """While it lasts, calls of modules and reads of their tensors are reported to the tracer that is at work."""
    forget_classes()
    forget_code()
    forget_state()
    forget_signatures()
    call, getattr_, setattr_ = nn.Module.__call__, nn.Module.__getattr__, nn.Module.__setattr__
    asked_modes = {name: getattr(torch, name) for name in MODES}
    functional_call = nn.utils.stateless._functional_call

    def traced_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not ACTIVE:
            return call(module, *args, **kwargs)
        return ACTIVE[-1].on_call(module, lambda *a, **k: call(module, *a, **k), args, kwargs)

    def traced_getattr(module: nn.Module, name: str) -> Any:
        if not ACTIVE:
            return getattr_(module, name)
        try:
            value: Any = getattr_(module, name)
        except AttributeError:
            ACTIVE[-1].on_lack(module, name)
            raise
        if value is None:
            ACTIVE[-1].on_lack(module, name)
        ACTIVE[-1].on_read(module, name, value)
        ACTIVE[-1].listed.discard(id(value))
        return value

    def traced_setattr(module: nn.Module, name: str, value: Any) -> None:
        if ACTIVE:
            ACTIVE[-1].on_write(module, name, value)
        setattr_(module, name, value)

    def traced_mode(function: Callable[..., bool]) -> Callable[..., Any]:
        def asked(*args: Any) -> Any:
            if not ACTIVE or not asked_by_user(2):
                return function(*args)
            return ACTIVE[-1].create_proxy("call_function", function, args, {})

        return asked

    def traced_functional_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if ACTIVE:
            raise TraceError(f"calls {type(module).__name__} with other weights")
        return functional_call(module, *args, **kwargs)

    rank_checks = {
        kind: kind.__dict__[RANK_CHECK]
        for kind in vars(nn.modules.batchnorm).values()
        if isinstance(kind, type) and RANK_CHECK in kind.__dict__
    }
    listing = {name: getattr(nn.Module, name) for name in ("named_parameters", "named_buffers")}

    def traced_listing(name: str) -> Callable[..., Iterator[tuple[str, Tensor]]]:
        def listed(module: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
            found: set[int] = set()
            for path, value in listing[name](module, *args, **kwargs):
                found.add(id(value))
                if ACTIVE and name == "named_parameters":
                    ACTIVE[-1].on_listed(module, path, value)
                elif ACTIVE:  # a module that is fused may have no buffer left
                    ACTIVE[-1].on_read(module, path, value)
                yield path, value
            if ACTIVE and name == "named_parameters":
                ACTIVE[-1].going_through.note_parameters(module, found)

        return listed

    for name in listing:
        setattr(nn.Module, name, traced_listing(name))
    nn.Module.__call__, nn.Module.__getattr__ = traced_call, traced_getattr  # type: ignore[method-assign]
    nn.Module.__setattr__ = traced_setattr  # type: ignore[method-assign,assignment]
    for name, function in asked_modes.items():
        setattr(torch, name, traced_mode(function))
    nn.utils.stateless._functional_call = traced_functional_call
    for kind, check in rank_checks.items():
        setattr(kind, RANK_CHECK, _unless_traced(check))
    for name in SIZED:
        setattr(Tensor, name, _sized(name))
    checks = {name: getattr(torch, name) for name in CHECKS}
    for name, assertion in checks.items():
        setattr(torch, name, _unless_asserted(assertion))
    try:
        with warnings.catch_warnings(), noting_all(ACTIVE):
            warnings.simplefilter("ignore")  # what a user's forward warns about was said when it first ran
            yield
    finally:
        nn.Module.__call__, nn.Module.__getattr__ = call, getattr_  # type: ignore[method-assign]
        nn.Module.__setattr__ = setattr_  # type: ignore[method-assign]
        for name, function in asked_modes.items():
            setattr(torch, name, function)
        nn.utils.stateless._functional_call = functional_call
        for name, function in listing.items():
            setattr(nn.Module, name, function)
        for kind, check in rank_checks.items():
            setattr(kind, RANK_CHECK, check)
        for name in SIZED:
            delattr(Tensor, name)
        for name, assertion in checks.items():
            setattr(torch, name, assertion)


def _unless_asserted(function: Callable[..., Any]) -> Callable[..., Any]:
    """An assertion of torch; one about a traced value is left out, as all other assertions are."""
    return lambda *args, **kwargs: None if ACTIVE and has_traced((args, kwargs)) else function(*args, **kwargs)


def _unless_traced(check: Callable[[nn.Module, Any], None]) -> Callable[[nn.Module, Any], None]:
    """A norm's check of the rank of its input: a traced value has none to look at."""
    return lambda module, value: None if type(value) is Traced else check(module, value)
