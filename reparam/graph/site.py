"""What of a model may be changed, and where."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter
from typing import final

from torch import fx, nn

from reparam.graph.asked import TAKEN, Asked
from reparam.graph.edit import STOCK
from reparam.graph.entries import EntryPoints
from reparam.graph.entry_methods import method_with_data
from reparam.graph.generated import SOURCE, has_generated_methods
from reparam.graph.held import held_modules
from reparam.graph.leaves import EXCLUDED, OUTSIDE, hooks
from reparam.graph.net import Frame, Net, Reading, Value
from reparam.graph.options import Options, within
from reparam.graph.placing import Mode, Place, Site
from reparam.graph.signatures import parameters_of
from reparam.graph.source import fixed_signature
from reparam.graph.spelling import unspoken
from reparam.graph.surveys import Surveys
from reparam.graph.swap import carried
from reparam.graph.trace import Trace
from reparam.graph.uncalled import Uncalled
from reparam.graph.variants import variants


@final
class Limits:
    """What may be changed in a model that was read; must be asked inside ``reading()``."""

    def __init__(self, model: nn.Module, reading: Reading, options: Options) -> None:
        self.options = options
        self._only = options.only_paths(model)
        self.entries = EntryPoints()
        self._uncalled = Uncalled(frame for net in reading.nets for frame in net.frames)
        self._editable: dict[Frame, str] = {}
        kinds = {(p.dtype, p.device) for p in model.parameters() if p.is_floating_point()}
        uniform = len(kinds) == 1  # then all parameters of a module answer alike
        self._exposed = _exposed(reading, lambda t: {*t.read.values()} - (t.types_read if uniform else set()))
        self._asked_for_type = _exposed(reading, lambda t: t.types_read if uniform else ())
        self._held = held_modules(model)
        norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase))
        self._changing = {id(buffer) for norm in norms if norm.training for buffer in norm.buffers()}
        self._asked = Asked(model, reading)
        self._hooked = reading.hooked.weights
        self._surveys = Surveys(reading, model)
        self._read_by_unread = {
            f"{path}.{name.rpartition('.')[0]}" if path else name.rpartition(".")[0]: path or "the model"
            for path, unread in reading.unread.items()
            for name in unread.read
            if "." in name
        }

    def site(self, net: Net) -> Site:
        """What may be changed in one net."""
        calls = net.calls()
        return Site(
            self._passable,
            self._crossing,
            self._is_exposed,
            lambda value: self._replaceable(value, calls),
            lambda frame: self._container(frame, calls),
            self._asked.mistaken,
        )

    def movable(self, value: Value) -> str:
        """Why an operation must stay as it is; empty if it need not."""
        module = value.module
        if module is not None and self.options.excludes(value.path, module):
            return EXCLUDED
        if module is not None and value.path in self._read_by_unread:
            return f"its parameters are read by the forward of {self._read_by_unread[value.path]}"
        if self._hooked:
            hooked = self._hooked.get(id(module), self._hooked.get(id(value.frame.module)))
            if hooked is not None:
                return f"a hook of {hooked or 'the model'} uses its weights or settings"
        if self._changing and any(id(tensor) in self._changing for tensor in value.tensors()):
            return "a norm in training mode changes its statistics"
        if self.options.exclude and self._excluded(value.frame):
            return EXCLUDED
        if self._only is not None and not within(value.path, self._only):
            return OUTSIDE
        return ""

    def _excluded(self, frame: Frame | None) -> bool:
        """Whether a frame or one around it is excluded."""
        while frame is not None:
            if self.options.excludes(frame.path, frame.module):
                return True
            frame = frame.parent
        return False

    def _replaceable(self, value: Value, calls: Counter[int]) -> str:
        if value.module is None or value.shared or value.frame.repeated or calls[id(value.module)] > 1:
            return "the module is called in several places"
        if id(value.module) in self._held.modules:
            return f"the attribute {self._held.modules[id(value.module)]} holds the module, too"
        return self.movable(value)

    def _container(self, frame: Frame, calls: Counter[int]) -> str:
        if hooks(frame.module) or frame.repeated or calls[id(frame.module)] > 1:
            return "the module has hooks or is called in several places"
        if id(frame.module) in self._held.modules:
            return f"the attribute {self._held.modules[id(frame.module)]} holds the module, too"
        if frame.trace.modes:
            return "its forward changes the autocast or gradient mode"
        if frame.trace.typed and self._depends_on_options(frame):
            return self._depends_on_options(frame)
        parameters = list(parameters_of(frame.module).values())
        if len(parameters) != 1 or parameters[0].kind is not parameters[0].POSITIONAL_OR_KEYWORD:
            return "its forward takes more than one argument"
        if _entangled(frame.path, self._exposed):
            return "its parameters are read elsewhere"
        known = self._surveys.of_replaced(frame)
        if known:
            return known
        if not isinstance(frame.module, STOCK) and TAKEN & carried(frame.module).keys():
            return "the module has attributes of the same names as a convolution"
        method = method_with_data(type(frame.module))
        return f"its method {method} would be gone" if method else self._asked.of_class(frame)

    def _passable(self, value: Value, frame: Frame) -> str:
        node = value.node if frame is value.frame else frame.local(value)
        reason = self._why_not_editable(frame)
        entry = self.entries.fixed(frame, node) if node is not None and not reason else ""
        return f"it stands in {entry}, which can be called by itself" if entry else reason

    def _crossing(self, values: Iterable[Value]) -> str:
        """An entry point of a module that some of the values are computed in, and others are not."""
        values = list(values)
        found: dict[Frame, tuple[str, ...]] = {}
        steps: dict[Frame, dict[fx.Node, None]] = {}
        for value in values:
            around: Frame | None = value.frame
            node: fx.Node | None = value.node
            while around is not None and node is not None:
                entries = self.entries.of(around, node)
                other = set(found.setdefault(around, entries)) ^ set(entries)
                if other:
                    return f"{min(other)} of {around.path or 'the model'} can be called by itself"
                steps.setdefault(around, {})[node] = None
                node, around = around.call, around.parent
        in_part = self._uncalled.using_a_part(values, steps)
        if in_part:
            return in_part
        for frame, nodes in steps.items():
            if len(nodes) < 2:
                guessed = _guessed(frame) or (self._depends_on_options(frame) if frame.trace.typed else "")
                if guessed and len(next(iter(nodes)).users) and frame not in _common(values):
                    return guessed
                continue
            if guessed := _guessed(frame):
                return guessed
            first = next(iter(nodes))
            apart = self.entries.apart(frame, (*found[frame], *self.entries.private(frame, first)), list(nodes))
            if apart:
                return apart
        return ""

    def _is_exposed(self, values: Iterable[Value], covered: Iterable[Value], where: Place) -> str:
        """A forward that reads parameters of what vanishes, and that goes on doing so."""
        values = list(values)
        members = {*values, *covered}
        edited = where.frame if where.mode is Mode.EDIT else None

        def vanishes(reader: Frame) -> bool:
            below = reader is where.container or _is_below(reader, where.container or edited)
            return where.mode is not Mode.SWAP and below and all(v in members or not v.users for v in reader.below())

        for value in members:
            reason = self._surveys.missing(value, where, lambda r: r is not edited and not vanishes(r))
            if reason:
                return reason
        for value in values:
            if value.module is not None and value not in where.passed:
                reason = self._uncalled.missing(value, where)
                if reason:
                    return reason
            for reader in self._exposed.get(value.path, ()) if value.module is not None else ():
                gone = reader is not edited and vanishes(reader)
                if not gone and (reader is not edited or _still_reads(reader, members)):
                    return f"the parameters of {value.path} are read by the forward of {reader.path or 'the model'}"
            around = set(where.frame.upwards())
            for reader in self._asked_for_type.get(value.path, ()) if value.module is not None else ():
                if reader not in around:  # it might find no parameter there
                    return f"the type of {value.path} is asked for by the forward of {reader.path or 'the model'}"
        return ""

    def _why_not_editable(self, frame: Frame) -> str:
        if frame not in self._editable:
            self._editable[frame] = self._fixed(frame)
        return self._editable[frame]

    def _fixed(self, frame: Frame) -> str:
        if frame.repeated:
            return "its module is called in several places"
        if id(frame.module) in self._held.bound:
            return f"the attribute {self._held.bound[id(frame.module)]} holds a method of its module"
        if frame.trace.modes:
            return "its forward changes the autocast or gradient mode"
        if frame.trace.specialised:
            return "its forward was read for the sizes of the example inputs only"
        if frame.trace.doubtful:
            return frame.trace.doubtful
        if frame.trace.otherwise:
            return "its forward branches on its input"
        if frame.trace.fixed_type:
            return "its forward asks a tensor for its type or device, which would be fixed"
        if frame.trace.cache:
            return f"its forward fills {frame.trace.cache}"
        if frame.trace.recast:
            return f"its forward makes a {frame.trace.recast}, which would become a plain list or dict"
        if isinstance(frame.module, fx.GraphModule):
            return ""
        if has_generated_methods(type(frame.module)):
            return "its methods were generated together with its forward"
        reason = fixed_signature(frame.module) or unspoken(frame.trace.graph)
        if reason:
            return reason
        kind = type(frame.module)
        if ({"__reduce__", "__reduce_ex__"} & vars(kind).keys()) and not hasattr(kind, SOURCE):
            return "its class has its own way to be pickled"
        return self._asked.exactly(frame) or self._depends_on_options(frame)

    def _depends_on_options(self, frame: Frame) -> str:
        """Whether the forward does something else for other values of its arguments."""
        for name, _ in variants(frame):
            required = parameters_of(frame.module)[name].default is Parameter.empty
            return f"its forward depends on the {'' if required else 'optional '}argument {name}"
        return ""


def _guessed(frame: Frame) -> str:
    """Why the forward of a frame may do something else than what was read."""
    where = f"the forward of {frame.path or 'the model'}"
    if frame.trace.specialised:
        return f"{where} was read for the sizes of the example inputs only"
    return f"of {frame.path or 'the model'}: {frame.trace.doubtful}" if frame.trace.doubtful else ""


def _exposed(reading: Reading, names: Callable[[Trace], Iterable[str]]) -> Mapping[str, list[Frame]]:
    """Modules of whose parameters a forward that is not their own reads some of these names, with the readers."""
    found: dict[str, list[Frame]] = {}
    for net in reading.nets:
        for frame in net.frames:
            for name in {name.rpartition(".")[0] for name in names(frame.trace) if "." in name}:
                found.setdefault(f"{frame.path}.{name}" if frame.path else name, []).append(frame)
    return found


def _common(values: Iterable[Value]) -> set[Frame]:
    """Frames that all values stand in or below."""
    common: set[Frame] | None = None
    for value in values:
        chain: set[Frame] = set()
        frame: Frame | None = value.frame
        while frame is not None:
            chain.add(frame)
            frame = frame.parent
        common = chain if common is None else common & chain
    return common or set()


def _is_below(frame: Frame | None, other: Frame | None) -> bool:
    """Whether ``frame`` is a call within ``other``."""
    while frame is not None and frame is not other:
        frame = frame.parent
    return frame is not None


def _still_reads(reader: Frame, members: set[Value]) -> bool:
    """Whether operations outside of a region use parameters of children, or tensors computed from parameters."""
    nodes = {value.node for value in members if value.frame is reader}
    found: list[fx.Node] = []
    for node in reader.trace.graph.nodes:
        if node.op == "get_attr" and (str(node.target).startswith("_constant") or "." in str(node.target)):
            found += [user for user in node.users if user not in nodes]
    return bool(found)


def _entangled(path: str, exposed: Mapping[str, list[Frame]]) -> bool:
    """Whether something below ``path`` is read from outside of it."""
    inside = path + "."
    return any(
        (name == path or name.startswith(inside)) and any(not (f.path + ".").startswith(inside) for f in frames)
        for name, frames in exposed.items()
    )
