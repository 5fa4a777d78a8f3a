"""The house keeps its floors: includes and imports go down, never up and never sideways."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
CUDA = ROOT / "cuda"
PACKAGE = ROOT / "jax_flash2"

# Room -> the rooms below it, which it may include; its own files it may include too.
CPP_FLOORS = {
    "core": [],
    "device": ["core"],
    "kernels/any": ["core", "device"],
    "kernels/sm80": ["core", "device", "kernels/any"],
    "kernels/sm90": ["core", "device", "kernels/any"],
    "launch": ["core", "device", "kernels/any", "kernels/sm80", "kernels/sm90"],
    "cpu": ["core"],
    "ffi": ["core", "cpu", "launch"],
}
# From outside the house: written by CMake, and XLA's headers.
GENERATED = "jax_flash2_config.h"
XLA = "xla/ffi/api/"
ROOMS_THAT_KNOW_XLA = ["ffi"]

# From the bottom up; a module imports from the floors below its own.
PYTHON_FLOORS = [
    ["_cpu", "_cuda"],
    ["_ffi", "_checks", "_spec", "_reference"],
    ["_partition"],
    ["_derivative", "_partition_decode", "_sequence"],
    ["_attention", "_decode"],
    ["_which", "_cache", "_ring"],
    ["_module", "_context"],
    ["nnx", "linen", "__init__"],
    ["__main__"],
]
STANDS_ALONE = "_reference"
FLAX_MODULES = ["nnx", "linen"]

cpp_files = sorted(p for p in CUDA.rglob("*") if p.suffix in (".h", ".cuh", ".cc", ".cu"))
python_files = sorted(PACKAGE.glob("*.py"))


def cpp_id(path):
    return str(path.relative_to(CUDA))


def room_of(path):
    return next((room for room in CPP_FLOORS if path.startswith(f"{room}/")), None)


def code_of(path):
    """The file without its comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("path", cpp_files, ids=cpp_id)
def test_includes_go_down(path):
    room = room_of(cpp_id(path))
    assert room, f"{cpp_id(path)} is in no room of CPP_FLOORS"
    for included in re.findall(r'#include\s+"([^"]+)"', path.read_text()):
        if included == GENERATED:
            continue
        if included.startswith(XLA):
            assert room in ROOMS_THAT_KNOW_XLA, f"{included}: only {ROOMS_THAT_KNOW_XLA} know XLA"
            continue
        assert (CUDA / included).is_file(), f"{included}: includes are written from cuda/ on"
        assert room_of(included) in [room, *CPP_FLOORS[room]], f"{room} must not see {included}"


@pytest.mark.parametrize("path", cpp_files, ids=cpp_id)
def test_instructions_and_launches_have_one_room(path):
    code = code_of(path)
    if not (path.parent.name == "device" and path.name.startswith("ptx_")):
        assert not re.search(r"\basm\b", code), "inline assembly belongs in device/ptx_*.cuh"
    if room_of(cpp_id(path)) != "launch":
        assert "<<<" not in code, "launches belong in launch/"


@pytest.mark.parametrize("path", cpp_files, ids=cpp_id)
def test_nothing_allocates_or_waits_on_the_device(path):
    forbidden = r"\bcuda(Malloc|Free|MemcpyAsync|Memcpy|\w*Synchronize)\w*\b"
    found = re.search(forbidden, code_of(path))
    assert not found, f"{found[0]}: XLA plans the memory, and may capture the call in a CUDA graph"


def imports_of(path):
    """The package's own modules that the file imports, and the other top-level packages."""
    own, other = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, *rest = name.split(".")
            if top == "jax_flash2":
                own.add(rest[0] if rest else "__init__")
            else:
                other.add(top)
    return own, other


def floor_of(module):
    return next((i for i, modules in enumerate(PYTHON_FLOORS) if module in modules), None)


@pytest.mark.parametrize("path", python_files, ids=lambda p: p.name)
def test_imports_go_down(path):
    floor = floor_of(path.stem)
    assert floor is not None, f"{path.name} is on no floor of PYTHON_FLOORS"
    own, other = imports_of(path)
    if path.stem == STANDS_ALONE:
        assert not own, "the definition shares no code with what it is compared with"
    for module in own:
        # `from jax_flash2 import name`: a module, or what __init__ exports.
        below = floor_of(module if floor_of(module) is not None else "__init__")
        assert below < floor, f"{path.stem} must not see {module}"
    if path.stem not in FLAX_MODULES:
        assert "flax" not in other, f"only {FLAX_MODULES} import flax"


@pytest.mark.parametrize("path", python_files, ids=lambda p: p.name)
def test_targets_are_named_in_one_file(path):
    if path.stem != "_ffi":
        assert not re.search(r"jax_flash2_(forward|backward|decode)|ffi_call", path.read_text())


def test_the_rooms_are_there():
    assert {room_of(cpp_id(p)) for p in cpp_files} >= {"core", "cpu", "ffi", "launch", "device"}
    assert {"_attention", "_ffi", "_reference"} <= {p.stem for p in python_files}
