"""Who may import whom: the layers of the package point one way, and some modules stay free of jax."""

import ast
import dataclasses
import functools
import graphlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "gdnjax"

LAYERS = (
    ("cache_kinds",),
    ("version", "config", "sampling_params", "shapes", "assets", "progress", "distributed"),
    ("memory", "backend", "sharding", "quantized"),
    ("cache",),
    ("state", "batch", "words"),
    ("pallas_kernels",),
    ("models",),
    ("sampling",),
    ("speculative",),
    ("step", "transfer"),
    ("generation",),
    ("routing",),
    ("checkpoint",),
    ("loading",),
    ("serving",),
    ("doctor",),
    ("cli",),
    ("__main__",),
)
"""Modules and packages, lowest first. A module imports from layers below its own, and from its own package."""

PROGRAMS = ("serving.server.__main__",)
"""Programs within a package: they stand above everything, and nobody imports them."""

ONLY = {
    "cache_kinds": set(),
    "config": {"cache_kinds"},
    "sampling_params": set(),
    "shapes": set(),
    "version": set(),
    "progress": set(),
    "distributed": set(),
    "assets": set(),
    "memory": {"cache_kinds", "config", "assets"},
    "backend": set(),
    "quantized": {"shapes"},
    "sharding": set(),
    "batch": {"shapes"},
    "words": {"shapes"},
    "pallas_kernels": {"shapes", "backend", "cache_kinds", "memory", "quantized"},
    "sampling": {"shapes", "sharding", "batch", "state", "backend", "pallas_kernels"},
    "speculative": {"shapes", "sharding", "batch", "state", "pallas_kernels", "sampling"},
    "checkpoint": {"config", "sharding", "shapes", "progress", "models", "quantized"},
    "doctor": {"version", "backend"},
}
"""Where the design allows less than the layers do: these and nothing else of the package."""

HOST_ONLY = ("assets", "cache_kinds", "config", "sampling_params", "memory", "version", "progress", "distributed")
HOST_ONLY += ("serving.outputs", "serving.channel")
HOST_ONLY += ("serving.tokenizer", "serving.detokenizer", "serving.request", "serving.allocator", "serving.scheduler")
HOST_ONLY += ("serving.plan", "serving.prefix_cache", "serving.metrics", "serving.submission", "serving.speculation")
HOST_ONLY += ("serving.radix_tree", "serving.host_tier", "serving.records", "serving.chat", "serving.frontend")
HOST_ONLY += ("serving.server.settings", "cli.serve", "serving.parsing", "serving.tool_calls")
HOST_ONLY += ("serving.structured", "serving.schemas", "serving.rehearsal")
HOST_ONLY += ("cli.command", "cli.generate", "cli.convert", "cli.main", "cli.bench.main")
HOST_ONLY += ("cli.bench.throughput", "cli.bench.latency", "cli.bench.serve", "cli.bench.engine")
"""Modules that plan and bookkeep without a device: no jax, not even through what they import."""

PLANNERS = (
    "serving.request",
    "serving.waiting",
    "serving.allocator",
    "serving.plan",
    "serving.scheduler",
    "serving.prefix_cache",
    "serving.radix_tree",
    "serving.host_tier",
    "serving.records",
    "serving.structured",
)
PLANNERS_SEE = {"config", "memory", "sampling_params", "serving.detokenizer", "serving.tokenizer", *PLANNERS}
PLANNERS_SEE |= {"serving.outputs", "serving.submission", "serving.parsing", "serving.schemas"}


@dataclasses.dataclass(frozen=True)
class Import:
    """One import statement of a module. `lazy`: inside a function. `typing_only`: under `if TYPE_CHECKING`."""

    importer: str
    imported: str
    lazy: bool
    typing_only: bool


def module_name(file):
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


@functools.cache
def modules():
    return {module_name(file): ast.parse(file.read_text()) for file in sorted(PACKAGE.rglob("*.py"))}


def imports_of(name, tree):
    found = []

    def visit(node, lazy, typing_only):
        match node:
            case ast.Import(names=names):
                found.extend(Import(name, alias.name, lazy, typing_only) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                assert level == 0, f"{name}: a relative import"
                for alias in names:
                    # `from gdnjax.serving import packing` imports a module, `from gdnjax.state import X` does not.
                    full = f"{module}.{alias.name}"
                    is_module = full.removeprefix("gdnjax.") in modules() and full.startswith("gdnjax.")
                    found.append(Import(name, full if is_module else module, lazy, typing_only))
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        guarded = typing_only or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.iter_child_nodes(node):
            visit(child, inside, guarded)

    visit(tree, False, False)
    return found


@functools.cache
def imports():
    return [found for name, tree in modules().items() for found in imports_of(name, tree)]


def own():
    """Imports of the package by itself. Its own __init__ re-exports by name, at first use, and has no layer."""
    return [found for found in imports() if found.imported.split(".")[0] == "gdnjax" and found.importer]


def part_of(name):
    return name.removeprefix("gdnjax.").split(".")[0]


def rank_of(name):
    if name in PROGRAMS:
        name = "__main__"
    for rank, layer in enumerate(LAYERS):
        if part_of(name) in layer:
            return rank
    raise AssertionError(f"gdnjax.{name} stands in no layer; add it to the table")


def test_every_module_stands_in_a_layer():
    assert len(modules()) > 30
    assert {rank_of(name) for name in modules() if name} <= set(range(len(LAYERS)))


def test_imports_point_down_the_layers():
    wrong = [
        f"{found.importer} imports {found.imported}"
        for found in own()
        if part_of(found.importer) != part_of(found.imported)
        and rank_of(found.importer) <= rank_of(found.imported.removeprefix("gdnjax."))
    ]
    assert not wrong


def test_no_modules_import_one_another_in_a_circle():
    """Not for types alone either. What a function imports when it is called is not counted."""
    above = {}
    for found in own():
        if not found.lazy:
            above.setdefault(found.importer, set()).add(found.imported.removeprefix("gdnjax."))
    try:
        graphlib.TopologicalSorter(above).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_narrow_modules_see_only_what_the_design_names():
    wrong = [
        f"{found.importer} imports {found.imported}"
        for found in own()
        if part_of(found.importer) in ONLY
        and part_of(found.imported) not in {*ONLY[part_of(found.importer)], part_of(found.importer)}
    ]
    assert not wrong


BLIND = ("step", "batch", "state", "cache", "cache_kinds", "sharding", "serving", "memory")
"""What does not know what a model keeps of its requests, nor which model it is: that is in specs, and in `models`."""

POOLS = {"gdn", "kv", "ssm", "conv", "pending_ab", "k_blocks", "v_blocks", "delta", "attention", "latent"}
WIRE = ("serving.server.", "serving.parsing")
"""Where a delta is what OpenAI calls so: what a chunk adds to an answer."""

FAMILIES = ("qwen", "kimi", "deepseek", "olmo", "deltanet")


def test_engine_does_not_know_which_model_it_serves():
    """Neither pools nor kinds nor families by name, as identifiers or as keys; presets are names of files."""
    found = []
    for name, tree in modules().items():
        if part_of(name) not in BLIND or name == "memory.__main__":
            continue
        pools = POOLS - {"delta"} if name.startswith(WIRE) else POOLS
        for node in ast.walk(tree):
            match node:
                case ast.Name(id=word) | ast.Attribute(attr=word) | ast.arg(arg=word) | ast.keyword(arg=str(word)):
                    pass
                case ast.Constant(value=str(word)) if word != "kv" and "\n" not in word and " " not in word:
                    # Which is the name of a layout, too.
                    pass
                case _:
                    continue
            if word.lower() in pools or any(family in word.lower() for family in FAMILIES):
                found.append(f"gdnjax.{name}, line {node.lineno}: {word}")
    assert not found


def test_planners_see_only_configuration_and_host_modules():
    wrong = [
        f"{found.importer} imports {found.imported}"
        for found in own()
        if found.importer in PLANNERS and found.imported.removeprefix("gdnjax.") not in PLANNERS_SEE
    ]
    assert not wrong


def test_flax_is_imported_in_models_only():
    importers = {found.importer for found in imports() if part_of(found.imported) == "flax"}
    assert importers
    assert {part_of(importer) for importer in importers} == {"models"}


def test_slow_libraries_are_imported_at_first_use():
    wrong = [
        f"{found.importer} imports {found.imported}"
        for found in imports()
        if part_of(found.imported) in ("transformers", "jinja2", "torch", "llguidance") and not found.lazy
    ]
    assert not wrong
    assert not [found for found in imports() if part_of(found.imported) == "torch"]


def test_package_itself_imports_nothing_heavy():
    heavy = [f.imported for f in imports() if not f.importer and not f.typing_only and not f.lazy]
    assert set(heavy) == {"importlib", "gdnjax.version"}


def test_environment_is_never_read():
    found = []
    for name, tree in modules().items():
        # Commands set variables for jax, in a process that is theirs.
        if name == "cli.command":
            continue
        for node in ast.walk(tree):
            match node:
                case ast.Attribute(value=ast.Name(id="os"), attr="environ" | "environb" | "getenv" | "getenvb"):
                    found.append(f"{name}: {ast.unparse(node)}")
                case ast.ImportFrom(module="os", names=names) if {"environ", "getenv"} & {n.name for n in names}:
                    found.append(f"{name}: {ast.unparse(node)}")
    assert not found


@pytest.mark.parametrize(
    "modules", [("gdnjax",), tuple(f"gdnjax.{name}" for name in HOST_ONLY)], ids=["gdnjax", "host"]
)
def test_host_modules_import_no_jax(modules):
    """In an interpreter of its own: what is loaded afterwards is what the imports loaded."""
    program = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        "print(*sorted({'jax', 'jaxlib', 'flax', 'transformers', 'torch', 'llguidance'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_type_checkers_see_every_public_name():
    """The file is pyright's, in strict mode: see pyproject.toml."""
    import gdnjax

    text = (pathlib.Path(__file__).parent / "public_types.py").read_text()
    assert text.startswith("# pyright: strict\n")
    used = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    assert set(gdnjax.__all__) - {"__version__"} <= used


def test_every_public_name_can_be_imported():
    import gdnjax

    for name in gdnjax.__all__:
        assert getattr(gdnjax, name) is not None
    with pytest.raises(AttributeError, match=r"has no attribute 'nothing'; it has .*LLM"):
        gdnjax.nothing  # noqa: B018
