"""Pictures of a model before and after, with Graphviz."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from reparam.errors import MissingPackageError, ReparamError
from reparam.files import in_a_folder
from reparam.report import Node, Plan
from reparam.show.colours import colour
from reparam.show.fold import Drawn, fold, within

if TYPE_CHECKING:
    from pygraphviz import AGraph

FORMATS: Final = (".svg", ".png", ".html")
FONT: Final = "Helvetica"
HALO: Final = '<text paint-order="stroke" stroke="white" stroke-width="3" stroke-linejoin="round" '


def draw(plan: Plan, file: Path, module: str) -> Path:
    """Draw a plan into a file whose ending names the format."""
    if file.suffix not in FORMATS:
        raise ReparamError(f"expected a file that ends in {', '.join(FORMATS)}, found {file.name!r}: give it an ending")
    if module and not any(within(node.path, module) for node in plan.wiring.before.values()):
        raise ReparamError(
            f"expected the path of a module that the forward of {plan.model_type} uses, found {module!r}: take one from"
            " named_modules()"
        )
    in_a_folder(file)
    if not plan.wiring.before:
        raise ReparamError(f"expected a model with a forward that can be read, found {plan.model_type} without one")
    graph = graph_of(plan, module, linked=file.suffix == ".html")
    if file.suffix != ".html":
        file.write_bytes(_rendered(graph, file.suffix[1:]))
        return file
    from reparam.show.page import page

    svg = _rendered(graph, "svg").decode()
    file.write_text(page(plan, svg[svg.index("<svg") :], f"{plan.model_type} {module}".strip()), encoding="utf-8")
    return file


def graph_of(plan: Plan, module: str, *, linked: bool) -> "AGraph":
    """Both sides as clusters of one graph; ``linked``: regions link to the list of a page."""
    graph = _new_graph()
    graph.graph_attr.update(
        labeljust="l", fontname=FONT, compound="true", ranksep="0.25", nodesep="0.2", newrank="false"
    )
    graph.node_attr.update(fontname=FONT, fontsize="11", shape="box", style="rounded,filled", fillcolor="white")
    graph.node_attr.update(height="0.3", margin="0.12,0.05", color="#888888")
    graph.edge_attr.update(color="#555555", arrowsize="0.6")
    sides = fold(plan.wiring.before, plan.wiring.after, plan.regions, module)
    everywhere = {"before": plan.wiring.before, "after": plan.wiring.after}
    for when, side in zip(("before", "after"), sides, strict=True):
        title = f"{when}: {_text(module or plan.model_type)}"
        cluster = graph.add_subgraph(name=f"cluster_{when}", label=title, labelloc="t", color="#bbbbbb", fontsize="14")
        cluster.graph_attr["margin"] = "20"  # what goes around a region stays inside
        _draw_side(plan, cluster, side, when, linked)
        _draw_edges(graph, side, when, everywhere[when])
    return graph


def _draw_side(plan: Plan, cluster: "AGraph", side: Drawn, when: str, linked: bool) -> None:
    places: dict[str, AGraph] = {"": cluster}
    numbers = _numbers(plan, side)
    regions: dict[int, AGraph] = {}
    for key, node in side.nodes.items():
        home = _block(places, side, node.path, when)
        if node.region is not None:
            if node.region not in regions:
                regions[node.region] = _region(plan, home, node.region, numbers[node.region], when, linked)
            home = regions[node.region]
        attributes = {} if node.region is None else {"fillcolor": colour(node.region)}
        if node.region is None and not node.linear:
            attributes = {"fillcolor": "#eeeeee"}
        home.add_node(
            f"{when}{key}", label=_label(plan, node), tooltip=_text(node.path or plan.model_type), **attributes
        )


def _block(places: dict[str, Any], side: Drawn, path: str, when: str) -> "AGraph":
    """The cluster of the innermost folded block around a path."""
    inner = ""
    for first, same in sorted(side.blocks.items(), key=lambda block: len(block[0])):
        if not within(path, first):
            continue
        if first not in places:
            label = f"{_text(same[0])} \N{HORIZONTAL ELLIPSIS} {_text(same[-1])} (\N{MULTIPLICATION SIGN}{len(same)})"
            look = {"style": "dashed", "color": "#333333", "fontsize": "12", "margin": "8"}
            places[first] = places[inner].add_subgraph(name=f"cluster_{when}_block_{len(places)}", label=label, **look)
        inner = first
    cluster: AGraph = places[inner]
    return cluster


def _region(plan: Plan, home: "AGraph", number: int, numbers: list[int], when: str, linked: bool) -> "AGraph":
    region = plan.regions[number]
    attributes = {
        "id": f"region-{number}-{when}",
        "class": " ".join(f"region-{other}" for other in numbers),
        "label": _text(region.path or plan.model_type),
        "tooltip": _text(str(region)),
        "style": "rounded",
        "color": colour(number),
        "penwidth": "2",
        "fontsize": "10",
        "margin": "8",
    }
    if linked:
        attributes["URL"] = f"#list-{number}"
    cluster: AGraph = home.add_subgraph(name=f"cluster_{when}_region_{number}", **attributes)
    return cluster


def _numbers(plan: Plan, side: Drawn) -> dict[int, list[int]]:
    """For each region that is drawn, its number and those of the regions of folded blocks that it stands for."""
    by_place: dict[str, list[int]] = {}
    for number, region in enumerate(plan.regions):
        by_place.setdefault(region.path, []).append(number)
    found: dict[int, list[int]] = {}
    for number in {node.region for node in side.nodes.values() if node.region is not None}:
        path = plan.regions[number].path
        at = by_place[path].index(number)
        found[number] = [by_place[other][at] for other in _same_paths(path, side)]
    return found


def _same_paths(path: str, side: Drawn) -> Iterator[str]:
    """A path, and those that stand at the same place of the folded blocks around it."""
    paths = [path]
    for first, same in sorted(side.blocks.items(), key=lambda block: -len(block[0])):
        if within(path, first):
            paths = [f"{other}{inner[len(first) :]}" for other in same for inner in paths]
    yield from paths


def _draw_edges(graph: "AGraph", side: Drawn, when: str, everywhere: Any) -> None:
    """Edges; what is read from outside of the module that is drawn becomes a node of its own."""
    for key, node in side.nodes.items():
        for source in node.inputs:
            if source not in side.nodes:
                outside: Node | None = everywhere.get(source)
                label = "input" if outside is None else f"{outside.label}\n{outside.path}"
                graph.get_subgraph(f"cluster_{when}").add_node(
                    f"{when}{source}", label=_text(label), shape="plaintext", style="", tooltip="outside of the module"
                )
            graph.add_edge(f"{when}{source}", f"{when}{key}")


def _label(plan: Plan, node: Node) -> str:
    """What an operation is, and the name of its module; in a region with that of the module around it."""
    name = node.name
    if name and node.region is not None:
        home = plan.regions[node.region].path
        inner = node.path[len(home) :].strip(".") if within(node.path, home) else node.path
        name = ".".join(inner.split(".")[-2:]) or name
    return _text(f"{node.label}\n{name}" if name else node.label)


def _text(text: str) -> str:
    """Text that means nothing to Graphviz, with its lines."""
    escaped = text.replace("\\", "\\\\").replace("&", "&amp;").replace("\n", "\\n")
    return f" {escaped}" if escaped.startswith("<") else escaped


def _new_graph() -> "AGraph":
    try:
        import pygraphviz
    except ImportError as error:
        raise MissingPackageError.of("pygraphviz", "draws pictures", "draw") from error
    return pygraphviz.AGraph(directed=True, strict=True, encoding="UTF-8")


def _rendered(graph: "AGraph", format: str) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about fonts and label sizes
        image: bytes = graph.draw(format=format, prog="dot")
    return _frames_on_top(image.decode()).encode() if format == "svg" else image


def _frames_on_top(svg: str) -> str:
    """An SVG whose frames are drawn last and whose titles have a white edge: lines that cross them hide no letter."""
    start = svg.index("<g id=", svg.index('class="graph"'))
    end = svg.index("<!-- ", start)  # the first operation
    frames = svg[start:end].replace("<text ", HALO)
    last = svg.rindex("</g>")
    return f"{svg[:start]}{svg[end:last]}{frames}{svg[last:]}"
