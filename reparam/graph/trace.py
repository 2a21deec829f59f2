"""Read one module: its forward as a small ``torch.fx`` graph with every child a leaf.

Parameters stay concrete while tracing, so that generated weights become constants and ``if self.alpha:`` works. In-place
arithmetic and slice assignment become nodes that return their target, and the Python object that held the target goes on
holding the result, as it does in eager mode.
"""

import inspect
import operator
import random
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, final

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Scope, TraceError
from torch.nn.modules.lazy import LazyModuleMixin


@final
@dataclass(frozen=True, slots=True)
class Unread:
    """Why a module's forward could not be read, and the line of code that stopped it."""

    reason: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.reason} ({self.where})" if self.where else self.reason


@final
class Hole:
    """Stands for one tensor (or an unknown object) in the arguments of a call."""

    def __repr__(self) -> str:
        return "<tensor>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hole)

    def __hash__(self) -> int:
        return hash(Hole)


HOLE: Final = Hole()
ArgumentSpec = Mapping[str, Any]  # parameter name -> HOLE, a constant, or a list/tuple/dict of them


@final
@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """The forward of one module.

    Args:
        module: the module.
        arguments: with what it was read.
        graph: its operations; children are ``call_module`` nodes.
        inputs: placeholder nodes by parameter name.
        holes: per parameter, what the forward received: nodes in the place of tensors.
        tensors: of every ``get_attr`` node, the tensor; names that start with ``_constant`` were computed while tracing.
        result: the returned structure, with nodes in the place of tensors.
        read: qualified names of the parameters and buffers that were read.
        touched: dotted paths of modules below the children that were looked at.
        changes_mode: whether autocast or gradient mode is changed inside.
    """

    module: nn.Module
    arguments: ArgumentSpec
    graph: fx.Graph
    inputs: Mapping[str, fx.Node]
    holes: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    result: Any
    read: Mapping[int, str]
    touched: frozenset[str]
    changes_mode: bool


def assign(target: Tensor, index: Any, value: Any) -> Tensor:
    """``target[index] = value``; returns ``target``."""
    target[index] = value
    return target


INPLACE: Final[Mapping[str, Callable[..., Any]]] = MappingProxyType(
    {
        "__iadd__": operator.iadd,
        "__isub__": operator.isub,
        "__imul__": operator.imul,
        "__itruediv__": operator.itruediv,
    }
)
METHODS_IN_PLACE: Final[Mapping[str, Callable[..., Any]]] = MappingProxyType(
    {"add_": operator.iadd, "sub_": operator.isub, "mul_": operator.imul, "div_": operator.itruediv}
)


class _Proxy(fx.Proxy):
    """A traced value whose in-place changes are seen through every name it goes by."""

    def __setitem__(self, index: Any, value: Any) -> None:
        self.node = self.tracer.create_proxy("call_function", assign, (self, index, value), {}).node

    def __iter__(self) -> Iterator[Any]:
        count = self.tracer.known_length(self.node)  # type: ignore[attr-defined]
        if count is not None:
            return iter([self[i] for i in range(count)])
        frame = inspect.currentframe()
        assert frame is not None and frame.f_back is not None
        return _unpacked(self, frame.f_back)

    def __len__(self) -> int:
        count: int | None = self.tracer.known_length(self.node)  # type: ignore[attr-defined]
        if count is None:
            raise TraceError("the length of a value is asked for, and depends on the input")
        return count

    def __getattr__(self, name: str) -> Any:
        if name in METHODS_IN_PLACE:
            return lambda other: self._in_place(METHODS_IN_PLACE[name], other)
        attribute = super().__getattr__(name)
        if name.endswith("_") and not name.endswith("__"):
            return lambda *args, **kwargs: self._write(attribute(*args, **kwargs))
        return attribute

    def _in_place(self, function: Callable[..., Any], other: Any) -> "_Proxy":
        return self._write(self.tracer.create_proxy("call_function", function, (self, other), {}))

    def _write(self, result: fx.Proxy) -> "_Proxy":
        self.node = result.node
        return self


for _name, _function in INPLACE.items():
    setattr(_Proxy, _name, lambda self, other, _f=_function: self._in_place(_f, other))


def _unpacked(proxy: fx.Proxy, frame: Any) -> Iterator[Any]:
    """Elements for ``a, b = proxy``: their number stands in the byte code of the caller."""
    import dis

    for instruction in dis.get_instructions(frame.f_code):
        if instruction.offset == frame.f_lasti and instruction.opname == "UNPACK_SEQUENCE":
            assert isinstance(instruction.argval, int)
            return iter([proxy[i] for i in range(instruction.argval)])
    raise TraceError("a value is iterated over, and its length depends on the input")


class _Tracer(fx.Tracer):
    """Records one forward; see the module's docstring."""

    def __init__(self, module: nn.Module, on_node: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.root = module
        self.on_node = on_node
        self.graph = fx.Graph(tracer_cls=_Tracer)
        self.scope = Scope("", None)
        self.module_stack = OrderedDict()
        self.node_name_to_scope = {}
        self.tensors: dict[str, Tensor] = {}
        self.read: dict[int, str] = {}
        self.reads: dict[str, fx.Node] = {}
        self.kept: list[Any] = []  # keeps the ids of what was read valid
        self.before: dict[str, Tensor] = {}
        self.paths: dict[int, str] = {id(module): ""}
        self.frontier: list[tuple[str, nn.Module]] = [("", module)]
        self.mode = _mode()
        self.changes_mode = False
        self.touched: set[str] = set()

    def path(self, module: nn.Module) -> str | None:
        """Dotted path of a descendant, searched level by level; None for a stranger."""
        while id(module) not in self.paths and self.frontier:
            level, self.frontier = self.frontier, []
            for path, parent in level:
                for name, child in parent._modules.items():
                    if child is not None and id(child) not in self.paths:
                        below = f"{path}.{name}" if path else name
                        self.paths[id(child)] = below
                        self.frontier.append((below, child))
        return self.paths.get(id(module))

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if not self.changes_mode and _mode() != self.mode:
            self.changes_mode = True
        node: fx.Node = super().create_node(*args, **kwargs)
        if self.on_node is not None:
            self.on_node()
        return node

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            return self.tensor(a)
        if isinstance(a, nn.Module):
            raise TraceError(f"a module ({type(a).__name__}) is passed as an argument")
        return super().create_arg(a)

    def tensor(self, value: Tensor) -> fx.Node:
        """A node that reads a parameter, a buffer, or a tensor computed while tracing."""
        name = self.read.get(id(value))
        if name is None:
            name = f"_constant{sum(key.startswith('_constant') for key in self.tensors)}"
            self.kept.append(value)
            self.read[id(value)] = name
        if name not in self.tensors:
            self.tensors[name] = value
        if name not in self.reads:
            self.reads[name] = self.create_node("get_attr", name, (), {})
        return self.reads[name]

    def on_read(self, module: nn.Module, name: str, value: Any) -> None:
        """Remember which parameters and buffers are read, and what they hold; and which grandchildren are looked at."""
        if isinstance(value, nn.Module):
            if module is not self.root and self.path(module):
                self.touched.add(f"{self.path(module)}.{name}")
            return
        if isinstance(value, Tensor) and id(value) not in self.read:
            path = self.path(module)
            if path is not None:
                qualified = f"{path}.{name}" if path else name
                self.read[id(value)] = qualified
                self.kept.append(value)
                if value.device.type != "meta":
                    self.before[qualified] = value.detach().clone()

    def on_call(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A child on traced values is a node; on concrete ones it just runs."""
        if not _has_proxy((args, kwargs)):
            return forward(*args, **kwargs)
        path = self.path(module)
        if path is None:
            raise TraceError(f"calls {type(module).__name__}, which is not registered as one of its children")
        if path == "":
            raise TraceError("calls itself")
        return self.create_proxy("call_module", path, args, kwargs)

    def known_length(self, node: fx.Node) -> int | None:
        """Number of elements of a value if the code alone fixes it."""
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        rest = node.args[1:]
        size = rest[0] if rest else node.kwargs.get("split_size_or_sections", node.kwargs.get("split_size"))
        if name in ("split", "split_with_sizes") and isinstance(size, list | tuple):
            return len(size)
        chunks = rest[0] if rest else node.kwargs.get("chunks")
        if name in ("chunk", "tensor_split") and isinstance(chunks, int):
            return chunks
        return None


def _mode() -> tuple[bool, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


def _has_proxy(value: Any) -> bool:
    if isinstance(value, fx.Proxy):
        return True
    if isinstance(value, Mapping):
        return any(_has_proxy(v) for v in value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return any(_has_proxy(v) for v in value)
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        return any(_has_proxy(getattr(value, name)) for name in value.__dataclass_fields__)
    return False


_active: list[_Tracer] = []


@contextmanager
def reading() -> Iterator[None]:
    """While it lasts, calls of modules and reads of their tensors are reported to the tracer that is at work."""
    call, getattr_ = nn.Module.__call__, nn.Module.__getattr__

    def traced_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not _active:
            return call(module, *args, **kwargs)
        return _active[-1].on_call(module, lambda *a, **k: call(module, *a, **k), args, kwargs)

    def traced_getattr(module: nn.Module, name: str) -> Any:
        value = getattr_(module, name)
        if _active:
            _active[-1].on_read(module, name, value)
        return value

    rank_checks = {
        kind: kind.__dict__["_check_input_dim"]
        for kind in vars(nn.modules.batchnorm).values()
        if isinstance(kind, type) and "_check_input_dim" in kind.__dict__
    }
    nn.Module.__call__, nn.Module.__getattr__ = traced_call, traced_getattr  # type: ignore[method-assign, assignment]
    for kind, check in rank_checks.items():
        kind._check_input_dim = _unless_traced(check)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a user's forward warns about was said when it first ran
            yield
    finally:
        nn.Module.__call__, nn.Module.__getattr__ = call, getattr_  # type: ignore[method-assign]
        for kind, check in rank_checks.items():
            kind._check_input_dim = check


def _unless_traced(check: Callable[[nn.Module, Any], None]) -> Callable[[nn.Module, Any], None]:
    """A norm's check of the rank of its input: a traced value has none to look at."""
    return lambda module, value: None if isinstance(value, fx.Proxy) else check(module, value)


def default_arguments(module: nn.Module) -> dict[str, Any] | Unread:
    """Holes for the parameters without a default, and the defaults of the others."""
    spec: dict[str, Any] = {}
    for name, parameter in inspect.signature(module.forward).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        spec[name] = HOLE if parameter.default is parameter.empty else parameter.default
    return spec


def trace(
    module: nn.Module, arguments: ArgumentSpec, on_node: Callable[[], None] | None = None
) -> Trace | Unread:
    """Read ``module.forward``; must run inside ``reading()``; ``on_node`` is called after each new node.

    The module is left as it was, also if its forward writes to itself (which is then a reason not to trust the reading).
    """
    refused = _not_python(module)
    if refused is not None:
        return refused
    tracer = _Tracer(module, on_node)
    snapshot = _Snapshot(module)
    inputs: dict[str, fx.Node] = {}
    holes: dict[str, Any] = {}
    try:
        with torch.enable_grad():
            values = {}
            for name, spec in arguments.items():
                values[name] = spec
                if _has_hole(spec):
                    placeholder = tracer.create_proxy("placeholder", name, (), {})
                    inputs[name] = placeholder.node
                    values[name] = _filled(spec, placeholder)
                holes[name] = fx.node.map_aggregate(values[name], _node_of)
            tracer.mode = _mode()
            _active.append(tracer)
            try:
                result = _call(module, values)
                output = tracer.create_arg(result)
            finally:
                _active.pop()
            tracer.graph.output(output)
    except Exception as error:  # user code under symbolic values can raise anything
        snapshot.restore(tracer)
        return Unread(_first_line(error), _place(error))
    changed = snapshot.restore(tracer)
    if changed:
        return Unread(changed)
    return Trace(
        module,
        arguments,
        tracer.graph,
        inputs,
        holes,
        tracer.tensors,
        output,
        dict(tracer.read),
        frozenset(tracer.touched),
        tracer.changes_mode,
    )


def _call(module: nn.Module, values: Mapping[str, Any]) -> Any:
    positional, keyword = [], {}
    for name, parameter in inspect.signature(module.forward).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional.extend(values.get(name, ()))
        elif parameter.kind is parameter.VAR_KEYWORD:
            keyword.update(values.get(name, {}))
        elif name in values:
            if parameter.kind is parameter.KEYWORD_ONLY:
                keyword[name] = values[name]
            else:
                positional.append(values[name])
    return module.forward(*positional, **keyword)


def _not_python(module: nn.Module) -> Unread | None:
    if isinstance(module, torch.jit.ScriptModule):
        return Unread("the module is scripted")
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return Unread("the module is lazy and has no weights yet; run it once")
    if type(module).__call__ is not nn.Module.__call__:
        return Unread(f"{type(module).__name__} overrides __call__")
    return None


def _has_hole(spec: Any) -> bool:
    if isinstance(spec, Hole):
        return True
    if isinstance(spec, Mapping):
        return any(_has_hole(v) for v in spec.values())
    return isinstance(spec, list | tuple) and any(_has_hole(v) for v in spec)


def _filled(spec: Any, proxy: fx.Proxy) -> Any:
    """``spec`` with the elements of ``proxy`` in its holes."""
    if isinstance(spec, Hole):
        return proxy
    if isinstance(spec, dict):
        return {k: _filled(v, proxy[k]) if _has_hole(v) else v for k, v in spec.items()}
    if isinstance(spec, list | tuple):
        items = [_filled(v, proxy[i]) if _has_hole(v) else v for i, v in enumerate(spec)]
        return type(spec)(*items) if hasattr(spec, "_fields") else type(spec)(items)
    return spec


def _node_of(value: Any) -> Any:
    return value.node if isinstance(value, fx.Proxy) else value


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def _place(error: Exception) -> str:
    """The innermost line of code outside torch and this library that led to the error."""
    here = (torch.__path__[0], __file__.rsplit("/", 1)[0])
    for entry in reversed(traceback.extract_tb(error.__traceback__)):
        if not entry.filename.startswith(here):
            return f"{entry.filename}:{entry.lineno}: {entry.line}"
    return ""


@dataclass
class _Snapshot:
    """What a forward may change: attributes of the module and its children, tensors that it reads, random state."""

    module: nn.Module
    attributes: list[tuple[nn.Module, dict[str, Any], list[dict[str, Any]]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for module in (self.module, *(c for c in self.module._modules.values() if c is not None)):
            registered = [dict(module._parameters), dict(module._buffers), dict(module._modules)]
            self.attributes.append((module, dict(module.__dict__), registered))
        self.torch_random = torch.get_rng_state()
        self.python_random = random.getstate()

    def restore(self, tracer: _Tracer) -> str:
        """Undo every change; returns what was changed, or an empty string."""
        changed = ""
        for module, attributes, registered in self.attributes:
            now = module.__dict__
            if now.keys() != attributes.keys() or any(now[k] is not v for k, v in attributes.items()):
                names = [k for k in {**now, **attributes} if now.get(k, self) is not attributes.get(k, self)]
                changed = f"forward sets attributes of the module ({', '.join(sorted(names)[:3])})"
                now.clear()
                now.update(attributes)
            for current, before in zip(
                (module._parameters, module._buffers, module._modules), registered, strict=True
            ):
                if any(current.get(k) is not v for k, v in before.items()) or len(current) != len(before):
                    changed = "forward replaces parameters, buffers or children of the module"
                    current.clear()
                    current.update(before)
        for value in tracer.kept:
            name = tracer.read.get(id(value), "")
            old = tracer.before.get(name)
            if old is not None and not _unchanged(value, old):
                changed = f"forward changes {name}"
                value.data = old
        if not torch.equal(torch.get_rng_state(), self.torch_random):
            torch.set_rng_state(self.torch_random)
            changed = changed or "forward draws random numbers"
        if random.getstate() != self.python_random:
            random.setstate(self.python_random)
            changed = changed or "forward draws random numbers"
        return changed


def _unchanged(value: Tensor, old: Tensor) -> bool:
    if value.shape != old.shape or value.dtype != old.dtype:
        return False
    return bool(torch.equal(value.nan_to_num() if value.is_floating_point() else value, old.nan_to_num() if old.is_floating_point() else old))
