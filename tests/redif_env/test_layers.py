"""The layers, by parsing imports: who may know whom."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From the ground up: a module imports only modules above it in this list.
LAYERS = (
    "errors",
    "files",
    "untrusted",
    "parallel",
    "noise",
    "transition",
    "conditions",
    "codec",
    "code_key",
    "denoiser",
    "adapters",
    "onnx_graph",
    "families",
    "teacher",
    "prompts",
    "schedules",
    "solvers",
    "loading",
    "rewards.maps",
    "rewards.base",
    "rewards.pixel",
    "rewards.online",
    "rewards.blind",
    "rendering",
    "rewards.distributional",
    "rewards.discriminator",
    "rewards.likelihood",
    "rewards.images",
    "rewards.pretrained",
    "rewards.scorers",
    "rewards.remote",
    "rewards.features",
    "rewards.perceptual",
    "rewards.checker",
    "rewards.decoded",
    "rewards",
    "memory",
    "doctor",
    "mdp",
    "vector_env",
    "env",
    "schedule_env",
    "wrappers",
    "checker",
)


def modules(package):
    """Paths of a package's modules by dotted name without the package's own."""
    folder = ROOT / package
    paths = {path.relative_to(folder).with_suffix(""): path for path in folder.rglob("*.py")}
    return {".".join(p for p in name.parts if p != "__init__"): paths[name] for name in paths}


def imports(path):
    """(level, module, name) of every import of a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, node.module or "", alias.name) for alias in node.names)


def inner(package):
    """For each module of a package, the modules of the package that it imports."""
    paths = modules(package)
    graph = {}
    for name, path in paths.items():
        parts = name.split(".") if name else []
        base = parts if path.name == "__init__.py" else parts[:-1]
        targets = set()
        for level, module, imported in imports(path):
            if level:
                start = base[: len(base) - (level - 1)]
            elif module.split(".")[0] == package:
                start, module = [], module.partition(".")[2]
            else:
                continue
            prefix = ".".join([*start, *filter(None, [module])])
            full = f"{prefix}.{imported}".lstrip(".")
            targets.add(full if full in paths else prefix)
        graph[name] = targets - {name}
    return graph


def outer(package):
    """For each module of a package, the other top-level packages that it imports."""
    return {
        name: {module.split(".")[0] for level, module, _ in imports(path) if not level}
        for name, path in modules(package).items()
    }


def test_the_list_is_complete():
    assert set(modules("redif_env")) == {*LAYERS, ""}


@pytest.mark.parametrize("name", LAYERS)
def test_a_module_imports_only_what_is_above_it(name):
    above = LAYERS[: LAYERS.index(name)]
    assert inner("redif_env")[name] <= set(above)


@pytest.mark.parametrize("package", ["redif_env", "agents"])
def test_there_are_no_circles(package):
    order = tuple(graphlib.TopologicalSorter(inner(package)).static_order())
    assert set(order) == set(modules(package))


def test_a_circle_would_be_noticed():
    """The parser sees this package's imports at all, and a made-up one closes a circle."""
    graph = inner("redif_env")
    assert "noise" in graph["transition"]
    assert {"rewards", "schedules", "transition"} <= graph["mdp"]
    assert "errors" in graph["rewards.base"]
    graph["noise"].add("vector_env")
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph).prepare()


def test_the_environment_knows_nothing_of_agents():
    for name, packages in outer("redif_env").items():
        assert not packages & {"agents", "stable_baselines3", "sb3_contrib"}, name


def test_only_loading_and_its_neighbours_import_diffusers():
    users = {name for name, packages in outer("redif_env").items() if "diffusers" in packages}
    assert users == {"families", "prompts", "loading"}
    # Nothing but loading knows the neighbours: all else is handed what they make.
    graph = inner("redif_env")
    assert {name for name in graph if {"families", "prompts"} & graph[name]} == {"loading"}


@pytest.mark.parametrize("package", ["redif_env", "agents"])
def test_inside_a_package_imports_are_relative(package):
    """`agents` above all: other distributions use that name too."""
    for name, packages in outer(package).items():
        assert package not in packages, name


def test_the_package_itself_is_light():
    assert outer("redif_env")[""] <= {"__future__", "importlib", "typing", "gymnasium"}
