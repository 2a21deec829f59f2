"""The recorder of one forward: every child is a leaf, and parameters stay concrete.

Generated weights therefore become constants, and ``if self.alpha:`` works.
"""

import dataclasses
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.proxy import Scope, TraceError

from reparam.graph.code import CATCHES, NOTHING, Code, inside, writes_arguments
from reparam.graph.contents import put_out_of_reach, same
from reparam.graph.examples import Examples
from reparam.graph.going_through import GoingThrough
from reparam.graph.leaves import hooks
from reparam.graph.lengths import length_in_code
from reparam.graph.method_calls import MethodCalls
from reparam.graph.modes import current_mode
from reparam.graph.proxy import EXAMPLE, PLAIN, Traced, has_traced, is_plain, made_of_its_fields, meta
from reparam.graph.sequences import Ranks
from reparam.graph.snapshot import Snapshot
from reparam.graph.splices import has_rest, joined, with_joined
from reparam.graph.unread import calling_line
from reparam.graph.watch import Watch

MOST_CONDITIONS: Final = 32
Kinds = tuple[str, Any, bool]  # path of a descendant, classes, and whether it is one of these
Lacking = tuple[str, str]  # path of a descendant, and the name of what it does not have
# structures that a graph holds as they are
EXACT: Final = (list, tuple, dict, torch.Size, immutable_list, immutable_dict)


class Tracer(fx.Tracer):
    """Records one forward."""

    def __init__(
        self,
        module: nn.Module,
        examples: Examples | None = None,
        answers: Sequence[bool] = (),
        method: str = "forward",
    ) -> None:
        super().__init__(autowrap_modules=())  # type: ignore[arg-type]  # it is used by trace() alone
        self.root = module
        self.examples = examples
        self.answers = list(answers)
        self.asked: list[tuple[fx.Node, str]] = []
        self.methods = MethodCalls(type(module), self.path) if method == "forward" else None
        self.within: dict[fx.Node, tuple[tuple[str, int], ...]] = {}
        self.watch = Watch(self.keep)
        self.graph = fx.Graph(tracer_cls=Tracer)
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
        self.mode = current_mode()
        self.modes: dict[fx.Node, tuple[bool, ...]] = {}
        self.touched: set[str] = set()
        self.kinds: list[Kinds] = []
        self.lacking: list[Lacking] = []
        self.going_through = GoingThrough(self.path, self.on_read)
        self.specialised = False
        self.opens = True  # functions marked by torch.fx.wrap
        self.numbers = False  # what is made of traced sizes
        self.splices = False  # sequences of unknown length
        self.ranks: Ranks | None = None  # that are assumed
        self.recast = ""
        self.written: set[str] = set()
        self.listed: set[int] = set()
        self.made: list[weakref.ref[Traced]] = []
        self.beside: dict[str, Any] = getattr(type(module).forward, "__globals__", {})
        self.returning = False
        self.code: Code = NOTHING
        self.doubtful = ""
        self.typed: dict[str, list[Any]] = {}
        self.snapshot: Snapshot | None = None

    def release(self) -> None:
        """Let go of the module: other code may keep the traced values that it got, as ``functools.cache`` does."""
        self.root = nn.Identity()
        self.examples = None
        self.tensors, self.before, self.paths = {}, {}, {}
        self.kept, self.frontier, self.snapshot = [], [], None
        if self.methods is not None:
            self.methods.forget()

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
        """The value that a forward handles in place of a tensor."""
        made = Traced(node, self)
        self.made.append(weakref.ref(made))
        return made

    def left_behind(self) -> bool:
        """Whether a dictionary beside the forward's class holds traced values, as a cache; they are taken out of it."""
        if all(made() is None for made in self.made):
            return False
        found = False
        for cache in [value for value in self.beside.values() if type(value) is dict]:
            for key in [key for key, held in cache.items() if type(held) is Traced]:
                del cache[key]
                found = True
        return found

    def create_proxy(self, kind: str, target: Any, args: tuple[Any, ...], *rest: Any, **options: Any) -> fx.Proxy:
        """A new value; sizes of unknown number become one sequence."""
        args = with_joined(self, target, args) if self.splices else args
        return super().create_proxy(kind, target, args, *rest, **options)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node, with what is known about its value and the modes under which it runs."""
        node: fx.Node = super().create_node(*args, **kwargs)
        if is_plain(node.op, node.target, node.args):
            node.meta[PLAIN] = True
        mode = current_mode()
        if mode != self.mode:
            self.modes[node] = mode
        if self.examples is not None and node.op not in ("placeholder", "output"):
            example = self._example(node)
            if example is not None:
                node.meta[EXAMPLE] = example
        if self.code.catching and not self.returning and inside(sys._getframe(1), self.code.catching):
            self.doubtful = CATCHES
        calls = () if self.methods is None else self.methods.now()
        if calls:
            self.within[node] = calls
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
        """An argument of a node: nodes in the place of values and tensors."""
        if type(a) is Traced:
            return a.node
        if isinstance(a, Tensor):
            return self.tensor(a)
        if self.splices and type(a) in (list, tuple) and has_rest(a):
            return joined(self, a).node
        if isinstance(a, nn.Module):
            raise TraceError(f"a module ({type(a).__name__}) is passed as an argument")
        if (
            dataclasses.is_dataclass(a)
            and not isinstance(a, type)
            and has_traced(a)
            and not made_of_its_fields(type(a))
        ):
            raise TraceError(f"makes a {type(a).__name__}, which is more than its fields")
        if type(a) is torch.Size and self.returning:  # nodes hold it as a plain tuple
            return self.create_node("call_function", torch.Size, (tuple(a),), {})
        if isinstance(a, list | tuple | dict) and type(a) not in EXACT and not hasattr(a, "_fields"):
            self.recast = type(a).__name__
        return super().create_arg(a)

    def tensor(self, value: Tensor) -> fx.Node:
        """A node that reads a parameter, a buffer, or a tensor computed while tracing."""
        self.watch.looked_at.add(id(value))
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

    def on_listed(self, module: nn.Module, name: str, value: Any) -> None:
        """Remember a parameter or buffer that the forward came upon while it went through all of a module."""
        if id(value) not in self.read:
            self.listed.add(id(value))
        self.on_read(module, name, value)

    def types_read(self) -> frozenset[str]:
        """Names of those of which nothing but the type or device was asked."""
        return frozenset(self.read[key] for key in self.listed - self.watch.looked_at if key in self.read)

    def on_read(self, module: nn.Module, name: str, value: Any) -> None:
        """Remember which parameters and buffers are read, and what they hold; and which grandchildren are looked at."""
        if isinstance(value, nn.Module):
            if module is not self.root and self.path(module):
                self.touched.add(f"{self.path(module)}.{name}")
                if self.methods is not None:
                    self.methods.note(module)
            return
        if isinstance(value, Tensor) and id(value) not in self.read:
            path = self.path(module)
            if path is not None:
                qualified = f"{path}.{name}" if path else name
                self.read[id(value)] = qualified
                self.kept.append(value)
                if self.watch.computed:
                    self._keep(value)

    def keep(self) -> None:
        """Remember what the tensors hold that were read so far: from now on the forward may write to them."""
        for value in self.kept:
            self._keep(value)

    def _keep(self, value: Tensor) -> None:
        name = self.read[id(value)]
        if not name.startswith("_constant") and not value.is_meta:
            self.before[name] = (value, value.detach().clone())

    def on_write(self, module: nn.Module, name: str, value: Any) -> None:
        """Stop where the forward changes a module below, if only for a while: that then does something else."""
        path = self.path(module)
        if not path:  # its own, of which a snapshot is kept, or one that it makes
            return
        if not same(getattr(module, name, self), value):
            self.written.add(path)
            raise TraceError(f"sets {name} of {path}")

    def on_kind(self, module: nn.Module, kinds: Any, answer: bool) -> None:
        """Remember that the forward asked for the class of a descendant, and what it was told."""
        path = self.path(module)
        if path:
            self.kinds.append((path, kinds, answer))

    def on_question(self, node: fx.Node, kinds: Any) -> None:
        """Remember that the forward asked what an argument is; it may do something else for another one."""
        if node.op == "placeholder":
            self.typed.setdefault(str(node.target), []).append(kinds)

    def on_lack(self, module: nn.Module, name: str) -> None:
        """Remember that the forward asked a descendant for something that it does not have."""
        path = self.path(module)
        if path:
            self.lacking.append((path, name))

    def on_call(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A child on traced values is a node; on concrete ones it just runs."""
        if not has_traced((args, kwargs)):
            if self.snapshot is not None:
                self.snapshot.add(module)
            return forward(*args, **kwargs)
        path = self.path(module)
        if path is None and type(module) is nn.Sequential and not hooks(module):  # a slice of one
            return forward(*args, **kwargs)
        if path is None:
            raise TraceError(f"calls {type(module).__name__}, which is not registered as one of its children")
        if path == "":
            raise TraceError("calls itself")
        if type(module).__call__ is not nn.Module.__call__ and not type(module).__call__.__module__.startswith(
            "torch."
        ):
            raise TraceError(f"calls {type(module).__name__}, which overrides __call__")
        result = self.create_proxy("call_module", path, args, kwargs)
        collections = [a for a in (*args, *kwargs.values()) if isinstance(a, list | dict)]
        if collections and writes_arguments(module):
            for collection in collections:
                put_out_of_reach(f"a collection that {path} changes", collection)
        return result

    def known_length(self, node: fx.Node) -> int | None:
        """Number of elements of a value if the code alone, or an example, fixes it."""
        example = node.meta.get(EXAMPLE)
        if example is not None and (isinstance(example, list | tuple) or example.dim()):
            self.specialised = True
            return len(example)
        assumed = None if self.ranks is None else self.ranks.length(node)
        return length_in_code(node, self.root) if assumed is None else assumed

    def decide(self, node: fx.Node) -> bool:
        """The outcome of a condition on a traced value: each is tried, and all but one must raise."""
        if len(self.asked) >= MOST_CONDITIONS:
            raise TraceError("its forward has too many conditions on its input")
        self.asked.append((node, calling_line()))
        if len(self.asked) > len(self.answers):
            self.answers.append(True)
        return self.answers[len(self.asked) - 1]
