"""Read one module: its forward as a small ``torch.fx`` graph with every child a leaf.

Parameters stay concrete while tracing, so that generated weights become constants and ``if self.alpha:`` works.
"""

import builtins
import inspect
import operator
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Scope, TraceError
from torch.nn.modules.lazy import LazyModuleMixin

from reparam.graph.examples import Examples
from reparam.graph.proxy import EXAMPLE, PLAIN, Traced, has_traced, is_plain, meta
from reparam.graph.snapshot import Snapshot

MOST_CONDITIONS: Final = 4


@final
@dataclass(frozen=True, slots=True)
class Unread:
    """Why a module's forward could not be read, the line of code that stopped it, and the tensors that it read so far."""

    reason: str
    where: str = ""
    read: frozenset[str] = frozenset()

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
        modes: nodes under another autocast or gradient mode than the caller's.
        chunks: calls of ``chunk`` that were taken to give as many parts as asked for.
        specialised: whether sizes of the example input went into the graph.
        cache: a collection of the module that the forward fills; empty if none.
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
    modes: Mapping[fx.Node, tuple[bool, ...]]
    chunks: tuple[tuple[fx.Node, int], ...] = ()
    specialised: bool = False
    cache: str = ""


class _Tracer(fx.Tracer):
    """Records one forward; see the module's docstring."""

    def __init__(
        self,
        module: nn.Module,
        examples: Examples | None = None,
        answers: Sequence[bool] = (),
        on_node: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        self.root = module
        self.examples = examples
        self.answers = list(answers)
        self.asked: list[tuple[fx.Node, str]] = []
        self.on_node = on_node
        self.graph = fx.Graph(tracer_cls=_Tracer)
        self.scope = Scope("", None)
        self.module_stack = OrderedDict()
        self.node_name_to_scope = {}
        self.tensors: dict[str, Tensor] = {}
        self.read: dict[int, str] = {}
        self.reads: dict[str, fx.Node] = {}
        self.kept: list[Any] = []  # keeps the ids of what was read valid
        self.before: dict[str, tuple[Tensor, Tensor]] = {}
        self.paths: dict[int, str] = {id(module): ""}
        self.frontier: list[tuple[str, nn.Module]] = [("", module)]
        self.mode = _mode()
        self.modes: dict[fx.Node, tuple[bool, ...]] = {}
        self.touched: set[str] = set()
        self.chunks: list[tuple[fx.Node, int]] = []
        self.specialised = False

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
        return Traced(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node: fx.Node = super().create_node(*args, **kwargs)
        if is_plain(node.op, node.target, node.args):
            node.meta[PLAIN] = True
        mode = _mode()
        if mode != self.mode:
            self.modes[node] = mode
        if self.examples is not None and node.op not in ("placeholder", "output"):
            example = self._example(node)
            if example is not None:
                node.meta[EXAMPLE] = example
        if self.on_node is not None:
            self.on_node()
        return node

    def _example(self, node: fx.Node) -> Any:
        """Sizes of a result, from those of the arguments."""
        assert self.examples is not None
        if node.op == "get_attr":
            return meta(self.tensors[str(node.target)])
        if node.op == "call_module":
            return self.examples.result(str(node.target))
        try:
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta[EXAMPLE])
            with torch.no_grad():
                if node.op == "call_method":
                    return getattr(args[0], str(node.target))(*args[1:], **kwargs)
                function: Any = node.target
                return function(*args, **kwargs)
        except Exception:  # an operation without a meta kernel: its sizes stay unknown
            return None

    def create_arg(self, a: Any) -> Any:
        if type(a) is Traced:
            return a.node
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
                    self.before[qualified] = (value, value.detach().clone())

    def on_call(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A child on traced values is a node; on concrete ones it just runs."""
        if not has_traced((args, kwargs)):
            return forward(*args, **kwargs)
        path = self.path(module)
        if path is None:
            raise TraceError(f"calls {type(module).__name__}, which is not registered as one of its children")
        if path == "":
            raise TraceError("calls itself")
        return self.create_proxy("call_module", path, args, kwargs)

    def known_length(self, node: fx.Node) -> int | None:
        """Number of elements of a value if the code alone, or an example, fixes it."""
        example = node.meta.get(EXAMPLE)
        if example is not None and (isinstance(example, list | tuple) or example.dim()):
            self.specialised = True
            return len(example)
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        rest = node.args[1:]
        size = rest[0] if rest else node.kwargs.get("split_size_or_sections", node.kwargs.get("split_size"))
        if name in ("split", "split_with_sizes") and isinstance(size, list | tuple):
            return len(size)
        if name == "split" and isinstance(size, int):
            dim = rest[1] if len(rest) > 1 else node.kwargs.get("dim", 0)
            total = self._channels(node.args[0])
            return -(-total // size) if total and dim == 1 else None
        chunks = rest[0] if rest else node.kwargs.get("chunks")
        if name in ("chunk", "tensor_split") and isinstance(chunks, int):
            self.chunks.append((node, chunks))
            return chunks
        return None

    def _channels(self, value: Any) -> int:
        """Channels of a value that a convolution or norm gives, possibly through operations on single elements; 0: unknown."""
        while isinstance(value, fx.Node):
            if value.op == "call_module":
                for module in reversed(list(self.root.get_submodule(str(value.target)).modules())):
                    found = getattr(module, "out_channels", getattr(module, "num_features", None))
                    if isinstance(found, int):
                        return found if _keeps_channels(self.root.get_submodule(str(value.target))) else 0
            if value.op == "call_function" and value.target is operator.getitem:
                return _part(value)
            value = value.args[0] if value.args and _elementwise(value) else None
        return 0

    def decide(self, node: fx.Node) -> bool:
        """The outcome of a condition on a traced value: each is tried, and all but one must raise."""
        if len(self.asked) >= MOST_CONDITIONS:
            raise TraceError("its forward has too many conditions on its input")
        self.asked.append((node, _calling_line()))
        if len(self.asked) > len(self.answers):
            self.answers.append(True)
        return self.answers[len(self.asked) - 1]


def _keeps_channels(module: nn.Module) -> bool:
    """Whether the last convolution or norm of a module fixes the channels of its result."""
    if isinstance(module, nn.Sequential):
        return all(_keeps_channels(child) for child in module)
    simple = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, nn.Identity)
    return isinstance(module, simple) or type(module).__module__ == "torch.nn.modules.activation"


def _part(node: fx.Node) -> int:
    """Size of one part of a ``split`` by sizes along the channels; 0: unknown."""
    source, index = node.args
    name = getattr(source, "target", "") if isinstance(getattr(source, "target", ""), str) else source.target.__name__
    if not isinstance(source, fx.Node) or name not in ("split", "split_with_sizes") or not isinstance(index, int):
        return 0
    sizes = source.args[1] if len(source.args) > 1 else ()
    dim = source.args[2] if len(source.args) > 2 else source.kwargs.get("dim", 0)
    return int(sizes[index]) if isinstance(sizes, list | tuple) and dim == 1 else 0


def _elementwise(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in ("relu", "relu_", "add", "iadd", "sub", "mul", "sigmoid", "silu", "gelu", "contiguous")


def _mode() -> tuple[bool, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


@contextmanager
def _builtins() -> Iterator[None]:
    """While it lasts, ``len`` of a traced value is a traced value, and a traced tensor is an instance of ``Tensor``."""
    plain_len, plain_isinstance = builtins.len, builtins.isinstance

    def traced_len(value: Any) -> Any:
        if type(value) is not Traced:
            return plain_len(value)
        count = value.tracer.known_length(value.node)  # type: ignore[attr-defined]
        return value.tracer.create_proxy("call_function", plain_len, (value,), {}) if count is None else count

    def traced_isinstance(value: Any, kinds: Any) -> bool:
        if type(value) is Traced and not value.node.meta.get(PLAIN) and plain_isinstance(_TENSOR, kinds):
            return True
        return plain_isinstance(value, kinds)

    builtins.len, builtins.isinstance = traced_len, traced_isinstance  # type: ignore[assignment]
    try:
        yield
    finally:
        builtins.len, builtins.isinstance = plain_len, plain_isinstance


_TENSOR: Final = torch.empty(0, device="meta")


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
    listing = {name: getattr(nn.Module, name) for name in ("named_parameters", "named_buffers")}

    def traced_listing(name: str) -> Callable[..., Iterator[tuple[str, Tensor]]]:
        def listed(module: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
            for path, value in listing[name](module, *args, **kwargs):
                if _active:
                    _active[-1].on_read(module, path, value)
                yield path, value

        return listed

    for name in listing:
        setattr(nn.Module, name, traced_listing(name))
    nn.Module.__call__, nn.Module.__getattr__ = traced_call, traced_getattr  # type: ignore[method-assign, assignment]
    for kind, check in rank_checks.items():
        kind._check_input_dim = _unless_traced(check)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a user's forward warns about was said when it first ran
            yield
    finally:
        nn.Module.__call__, nn.Module.__getattr__ = call, getattr_  # type: ignore[method-assign]
        for name, function in listing.items():
            setattr(nn.Module, name, function)
        for kind, check in rank_checks.items():
            kind._check_input_dim = check


def _unless_traced(check: Callable[[nn.Module, Any], None]) -> Callable[[nn.Module, Any], None]:
    """A norm's check of the rank of its input: a traced value has none to look at."""
    return lambda module, value: None if type(value) is Traced else check(module, value)


def default_arguments(module: nn.Module, method: str = "forward") -> dict[str, Any] | Unread:
    """Holes for the parameters without a default, and the defaults of the others."""
    spec: dict[str, Any] = {}
    try:
        parameters = inspect.signature(getattr(module, method)).parameters
    except (TypeError, ValueError) as error:
        return Unread(_first_line(error))
    for name, parameter in parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        spec[name] = HOLE if parameter.default is parameter.empty else parameter.default
    return spec


def trace(
    module: nn.Module,
    arguments: ArgumentSpec,
    examples: Examples | None = None,
    on_node: Callable[[], None] | None = None,
    method: str = "forward",
) -> Trace | Unread:
    """Read ``module.forward``; must run inside ``reading()``.

    A condition on the input is followed if every other outcome raises an error. The module is left as it was, also if its
    forward writes to itself (which is then a reason not to trust the reading).

    Args:
        module: the module.
        arguments: for each parameter of its forward a constant, a hole, or a structure of them.
        examples: sizes of its inputs and of the results of its children.
        on_node: called after each new node.
        method: what is read instead of the forward.
    """
    refused = _not_python(module)
    if refused is not None:
        return refused
    answers: list[bool] = []
    for _ in range(2 ** (MOST_CONDITIONS + 1)):
        tracer = _Tracer(module, examples, answers, on_node)
        result = _attempt(tracer, arguments, method)
        answers = tracer.answers[: len(tracer.asked)]
        if not isinstance(result, _Raised):
            break
        while answers and not answers[-1]:
            answers.pop()
        if not answers:
            return result.unread
        answers[-1] = False
    if isinstance(result, _Raised):
        return result.unread
    if isinstance(result, Unread) or not tracer.asked:
        return result
    for at, answer in enumerate(answers):
        other = _attempt(_Tracer(module, examples, [*answers[:at], not answer]), arguments, method)
        if not isinstance(other, _Raised):
            return Unread("TraceError: the forward branches on its input", tracer.asked[at][1], frozenset(tracer.read.values()))
    return result


@final
@dataclass(frozen=True, slots=True)
class _Raised:
    """The forward raised an error of its own."""

    unread: Unread


def _calling_line() -> str:
    """The innermost line of code outside torch and this library that is being run."""
    return _innermost(traceback.extract_stack())


def _attempt(tracer: _Tracer, arguments: ArgumentSpec, method: str) -> "Trace | Unread | _Raised":
    module = tracer.root
    snapshot = Snapshot(module)
    inputs: dict[str, fx.Node] = {}
    holes: dict[str, Any] = {}
    try:
        with torch.enable_grad():
            tracer.mode = _mode()
            values = {}
            for name, spec in arguments.items():
                values[name] = spec
                if has_hole(spec):
                    placeholder = tracer.create_proxy("placeholder", name, (), {})
                    inputs[name] = placeholder.node
                    if tracer.examples is not None and tracer.examples.argument(name) is not None:
                        placeholder.node.meta[EXAMPLE] = tracer.examples.argument(name)
                    values[name] = _filled(spec, placeholder)
                holes[name] = fx.node.map_aggregate(values[name], _node_of)
            _active.append(tracer)
            try:
                with _builtins():
                    result = _call(getattr(module, method), values)
                output = tracer.create_arg(result)
            finally:
                _active.pop()
            tracer.graph.output(output)
    except Exception as error:  # user code under symbolic values can raise anything
        snapshot.restore(tracer.before)
        unread = Unread(_first_line(error), _place(error), frozenset(tracer.read.values()))
        return _Raised(unread) if _raised_by_user(error) else unread
    changed = snapshot.restore(tracer.before)
    if changed:
        return Unread(changed, read=frozenset(tracer.read.values()))
    return Trace(
        module=module,
        arguments=arguments,
        graph=tracer.graph,
        inputs=inputs,
        holes=holes,
        tensors=tracer.tensors,
        result=output,
        read=dict(tracer.read),
        touched=frozenset(tracer.touched),
        modes=tracer.modes,
        chunks=tuple(tracer.chunks),
        specialised=tracer.specialised,
        cache=snapshot.cached,
    )


def _call(function: Callable[..., Any], values: Mapping[str, Any]) -> Any:
    positional, keyword = [], {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional.extend(values.get(name, ()))
        elif parameter.kind is parameter.VAR_KEYWORD:
            keyword.update(values.get(name, {}))
        elif name in values:
            if parameter.kind is parameter.KEYWORD_ONLY:
                keyword[name] = values[name]
            else:
                positional.append(values[name])
    return function(*positional, **keyword)


def _not_python(module: nn.Module) -> Unread | None:
    if isinstance(module, torch.jit.ScriptModule):
        return Unread("the module is scripted")
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return Unread("the module is lazy and has no weights yet; run it once")
    if type(module).__call__ is not nn.Module.__call__ and not isinstance(module, fx.GraphModule):
        return Unread(f"{type(module).__name__} overrides __call__")
    return None


def has_hole(spec: Any) -> bool:
    """Whether an argument stands for a tensor, or holds one that does."""
    if isinstance(spec, Hole):
        return True
    if isinstance(spec, Mapping):
        return any(has_hole(v) for v in spec.values())
    return isinstance(spec, list | tuple) and any(has_hole(v) for v in spec)


def _filled(spec: Any, proxy: fx.Proxy) -> Any:
    """``spec`` with the elements of ``proxy`` in its holes."""
    if isinstance(spec, Hole):
        return proxy
    if isinstance(spec, dict):
        return {k: _filled(v, proxy[k]) if has_hole(v) else v for k, v in spec.items()}
    if isinstance(spec, list | tuple):
        items = [_filled(v, proxy[i]) if has_hole(v) else v for i, v in enumerate(spec)]
        return type(spec)(*items) if hasattr(spec, "_fields") else type(spec)(items)
    return spec


def _node_of(value: Any) -> Any:
    return value.node if type(value) is Traced else value


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def _raised_by_user(error: Exception) -> bool:
    """Whether the forward itself raised, or asserted: not torch, and not the tracing."""
    if isinstance(error, TraceError):
        return False
    last = traceback.extract_tb(error.__traceback__)[-1]
    inside = last.filename.startswith((torch.__path__[0], __file__.rpartition("/")[0]))
    return not inside and (last.line or "").lstrip().startswith(("raise", "assert"))


def _place(error: Exception) -> str:
    """The innermost line of code outside torch and this library that led to the error."""
    return _innermost(traceback.extract_tb(error.__traceback__))


def _innermost(stack: traceback.StackSummary) -> str:
    here = (torch.__path__[0], __file__.rpartition("/")[0])
    for entry in reversed(stack):
        if not entry.filename.startswith(here):
            return f"{entry.filename}:{entry.lineno}: {entry.line}"
    return ""
