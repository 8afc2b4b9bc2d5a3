"""Draw docs/house.svg: every module of the laptop and the packages of the node, and who imports whom (`make house`).

The arrows are read from the source. An import that another one implies is not drawn (transitive reduction); the tiers are those that
tests/deploy/test_imports.py holds. The same source gives the same bytes.
"""

from __future__ import annotations

import ast
import runpy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "house.svg"
LAPTOP = ("mistralctl", ROOT / "deploy" / "mistralctl")
COLOURS = {
    "contract": "#6b7280",
    "facts": "#0f766e",
    "pure": "#1d4ed8",
    "outside": "#b45309",
    "commands": "#7e22ce",
    "cli": "#be123c",
}
NODE_COLOUR = "#374151"
WIDTH, LEFT, BOX, GAP, ROW, BAND = 1320, 130, 22, 10, 46, 26

Graph = dict[str, set[str]]


def packages() -> dict[str, Path]:
    """Return the import name and folder of every package: the laptop's, then those under model/."""
    found = {path.parent.name: path.parent for path in sorted((ROOT / "model").glob("*/*/__init__.py"))}
    return dict([LAPTOP]) | found


def modules(package: str, folder: Path) -> dict[str, Path]:
    """Return the dotted names of a package's modules and their files; a package's own __init__ has the package's name."""
    names = {".".join((package, *path.relative_to(folder).with_suffix("").parts)): path for path in sorted(folder.rglob("*.py"))}
    return {name.removesuffix(".__init__"): path for name, path in names.items() if not name.endswith("__main__")}


def imports(name: str, path: Path) -> Iterator[str]:
    """Yield every dotted name that a file imports, wherever in it; relative ones made absolute."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - (node.level - 1)] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def graph() -> Graph:
    """Return which module imports which, over all packages; an empty package file that only holds others is left out."""
    files = {name: path for package, folder in packages().items() for name, path in modules(package, folder).items()}
    found: Graph = {}
    for name, path in files.items():
        targets = (
            max((known for known in files if f"{target}.".startswith(f"{known}.")), key=len, default="")
            for target in imports(name, path)
        )
        found[name] = {target for target in targets if target} - {name}
    used = {target for targets in found.values() for target in targets}
    empty = {name for name, path in files.items() if path.name == "__init__.py" and not found[name] and name not in used}
    holders = {name for name in files if name in dict([LAPTOP]) or name in empty}
    return {name: targets - holders for name, targets in found.items() if name not in holders}


def tiers() -> dict[str, str]:
    """Return the tier of each of the laptop's modules, by the table of tests/deploy/test_imports.py."""
    table = runpy.run_path(str(ROOT / "tests" / "deploy" / "test_imports.py"))["TIERS"]
    return {f"mistralctl.{module}": tier for tier, names in table.items() for module in names}


def reachable(edges: Graph, start: str) -> set[str]:
    """Return what can be reached from a module over one import or more."""
    seen: set[str] = set()
    todo = list(edges[start])
    while todo:
        if (name := todo.pop()) not in seen:
            seen.add(name)
            todo += edges[name]
    return seen


def reduced(edges: Graph) -> Graph:
    """Return the graph without the imports that others imply."""
    beyond = {name: reachable(edges, name) for name in edges}
    return {
        name: {
            target
            for target in targets
            if not any(target in beyond[via] and name not in beyond[via] for via in targets - {target})
        }
        for name, targets in edges.items()
    }


@dataclass(frozen=True)
class Band:
    """A row of the house: its title, colour and modules, and what their names are shown without."""

    title: str
    colour: str
    names: tuple[str, ...]
    prefix: str

    def shown(self, name: str) -> str:
        return name.removeprefix(self.prefix) or name


def bands(names: Iterable[str]) -> list[Band]:
    """Return the house from top to bottom: the contract, the tools of both machines, the laptop's tiers, the rest of the node."""
    tier = tiers()
    shared = ("contract", "mistral_weights", "mistral_chats")
    members: dict[str, list[str]] = {place: [] for place in (*shared, *dict.fromkeys(tier.values()))}
    for name in sorted(names):
        package = name.split(".")[0]
        place = tier[name] if package == "mistralctl" else "contract" if package == "mistral_contract" else package
        members.setdefault(place, []).append(name)
    titles = {"contract": "mistral_contract"}
    prefixes = {"contract": "mistral_contract.", "commands": "mistralctl.commands."}
    return [
        Band(
            titles.get(place, place),
            COLOURS.get(place, NODE_COLOUR),
            tuple(found),
            prefixes.get(place, "mistralctl." if place in COLOURS else f"{place}."),
        )
        for place, found in members.items()
        if found
    ]


def rows(band: Band, edges: Graph, across: Mapping[str, float]) -> list[list[str]]:
    """Return a band's modules in rows, each below what it imports of its own band, ordered by where their imports stand."""
    depth: dict[str, int] = {}

    def level(name: str, trail: tuple[str, ...] = ()) -> int:
        if name not in depth:
            inside = sorted(target for target in edges[name] if target in band.names and target not in trail)
            found = max((level(target, (*trail, name)) + 1 for target in inside), default=0)
            if trail:
                return found
            depth[name] = found
        return depth[name]

    for name in band.names:
        level(name)
    found: list[list[str]] = []
    for at in range(max(depth.values()) + 1):
        row: list[str] = []
        for name in sorted((name for name in band.names if depth[name] == at), key=lambda name: (across.get(name, 0.0), name)):
            if row and sum(width(band, other) + GAP for other in [*row, name]) > WIDTH - LEFT - 20:
                found.append(row)
                row = []
            row.append(name)
        if row:  # in a circle of imports a depth may stay empty
            found.append(row)
    return found


def width(band: Band, name: str) -> int:
    return 7 * len(band.shown(name)) + 14


@dataclass(frozen=True)
class Box:
    x: float
    y: float
    width: float
    band: Band

    @property
    def middle(self) -> float:
        return self.x + self.width / 2


def layout(house: list[Band], edges: Graph) -> tuple[dict[str, Box], list[tuple[Band, float, float]]]:
    """Return where every module stands, and where each band begins and ends."""
    boxes: dict[str, Box] = {}
    spans: list[tuple[Band, float, float]] = []
    y = 40.0
    for band in house:
        across: dict[str, float] = {}
        for name in band.names:
            above = [boxes[target].middle for target in sorted(edges[name]) if target in boxes]
            across[name] = sum(above) / len(above) if above else WIDTH / 2
        top = y
        y += 16
        for row in rows(band, edges, across):
            free = WIDTH - LEFT - 20 - sum(width(band, name) for name in row)
            gap = min(60.0, free / len(row))
            x = LEFT + (free - gap * (len(row) - 1)) / 2
            for name in row:
                boxes[name] = Box(x, y, width(band, name), band)
                x += width(band, name) + gap
            y += ROW
        y += 16 + BOX - ROW
        spans.append((band, top, y))
        y += BAND
    return boxes, spans


def draw() -> str:
    """Return the picture as SVG text."""
    everything = graph()
    edges = reduced(everything)
    house = bands(everything)
    boxes, spans = layout(house, edges)
    drawn = sum(len(targets) for targets in edges.values())
    total = sum(len(targets) for targets in everything.values())
    height = spans[-1][2] + 20
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" font-family="ui-monospace, Menlo, Consolas, monospace" '
        'font-size="11">',
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="#ffffff"/>',
        f'<text x="20" y="22" fill="#111827">{len(everything)} modules, {total} imports; an arrow leads up to what is imported; '
        f"{drawn} drawn, the others follow from them</text>",
    ]
    for band, top, bottom in spans:
        out.append(
            f'<rect x="10" y="{top:.0f}" width="{WIDTH - 20}" height="{bottom - top:.0f}" rx="6" fill="{band.colour}" fill-opacity="0.06"/>'
            f'<text x="20" y="{top + 18:.0f}" fill="{band.colour}" font-weight="bold">{escape(band.title)}</text>'
        )
    for name in sorted(edges):
        start = boxes[name]
        for target in sorted(edges[name]):
            end = boxes[target]
            level = start.y <= end.y
            y0, y1 = start.y + (BOX if level else 0), end.y + BOX
            bend = 30.0 if level else -max(20.0, (y0 - y1) / 2)
            out.append(
                f'<path d="M{start.middle:.1f} {y0:.1f}C{start.middle:.1f} {y0 + bend:.1f} {end.middle:.1f} '
                f'{y1 + abs(bend):.1f} {end.middle:.1f} {y1:.1f}" fill="none" stroke="{start.band.colour}" stroke-opacity="0.35">'
                f"<title>{escape(name)} imports {escape(target)}</title></path>"
            )
    for name in sorted(boxes):
        box = boxes[name]
        out.append(
            f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.0f}" height="{BOX}" rx="4" fill="#ffffff" stroke="{box.band.colour}"/>'
            f'<text x="{box.middle:.1f}" y="{box.y + 15:.1f}" text-anchor="middle" fill="#111827">{escape(box.band.shown(name))}</text>'
        )
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw(), "utf-8")
