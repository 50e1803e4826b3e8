"""Stand-ins for ROCm's shared libraries, so that the jax-rocm7 wheels load where ROCm is not installed.

They are made of the wheels' own undefined symbols. Nearly all functions return an error code; a stand-in is enough to
load the compiler, and can never fake a run: there are no devices.
"""

import collections
import ctypes
import pathlib
import re
import subprocess

NO_DEVICE = 100  # hipErrorNoDevice

LIBRARIES = {
    "libamdhip64.so.7": r"hip(?!blas|fft|sparse|solver)|__hip",
    "libMIOpen.so.1": r"miopen",
    "librccl.so.1": r"p?nccl",
    "librocblas.so.5": r"rocblas",
    "librocm_smi64.so.1": r"rsmi",
    "libhipblaslt.so.1": r"hipblasLt|hipblaslt|_ZN?K?13hipblaslt_ext",
    "libhipfft.so.0": r"hipfft",
    "librocprofiler-sdk.so.1": r"rocprofiler",
    "libhsa-runtime64.so.1": r"hsa",
    "librocm_sysdeps_drm_amdgpu.so.1": r"amdgpu_",
    "librocm_sysdeps_drm.so.2": r"drm",
    "librocm_sysdeps_numa.so.1": r"numa_|mbind",
    "libamd_smi.so.26": r"amdsmi",
    "libhipsolver.so.1": r"hipsolver",
    "librocsolver.so.0": r"rocsolver",
    "libhipblas.so.3": r"hipblas",
    "libhipsparse.so.4": r"hipsparse",
}
"""Library -> how the names of its functions begin. The first that fits is the one."""

SPECIAL = {
    "hipGetDeviceCount": f"int hipGetDeviceCount(int *n) {{ if (n) *n = 0; return {NO_DEVICE}; }}",
    "hipGetErrorString": 'const char *hipGetErrorString(int e) { return "no ROCm device: a stand-in"; }',
    "hipGetErrorName": 'const char *hipGetErrorName(int e) { return "hipErrorNoDevice"; }',
    "hipDriverGetVersion": "int hipDriverGetVersion(int *v) { if (v) *v = 70253211; return 0; }",
    "hipRuntimeGetVersion": "int hipRuntimeGetVersion(int *v) { if (v) *v = 70253211; return 0; }",
    "__hipRegisterFatBinary": "static void *h[64]; void *__hipRegisterFatBinary(void *d) { return h; }",
    "__hipRegisterFunction": "void __hipRegisterFunction() {}",
    "__hipRegisterVar": "void __hipRegisterVar() {}",
    "__hipUnregisterFatBinary": "void __hipUnregisterFatBinary() {}",
    "rocprofiler_force_configure": "int rocprofiler_force_configure(void *f) { return 0; }",
}
"""What is called while the wheels load."""


def build(wheels: list[pathlib.Path], directory: pathlib.Path) -> list[pathlib.Path]:
    """The stand-ins that the wheels' shared objects need, compiled into `directory`. Needs readelf and gcc."""
    needed: set[str] = set()
    symbols: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for wheel in wheels:
        needed |= set(re.findall(r"\(NEEDED\).*\[(.*)\]", _output("readelf", "-dW", wheel)))
        for line in _output("readelf", "--dyn-syms", "-W", wheel).splitlines():
            columns = line.split()
            if len(columns) < 8 or columns[6] != "UND":
                continue
            name, _, version = columns[7].partition("@")
            library = next((library for library, names in LIBRARIES.items() if re.match(names, name)), None)
            if library and not re.match("GLIBC|CXXABI|GCC", version.strip("@")):
                symbols[library][name] = version.strip("@")
    return [_compile(library, symbols[library], directory) for library in sorted(needed & set(LIBRARIES))]


def load(libraries: list[pathlib.Path]) -> None:
    for library in libraries:
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _compile(library: str, symbols: dict[str, str], directory: pathlib.Path) -> pathlib.Path:
    source, target = directory / f"{library}.c", directory / library
    lines = [SPECIAL.get(name) or f"long {name}() {{ return {NO_DEVICE}; }}" for name in symbols]
    source.write_text("\n".join(lines) + "\n")
    command = ["gcc", "-w", "-shared", "-fPIC", "-O1", "-o", target, source, f"-Wl,-soname,{library}"]
    versions = collections.defaultdict(list)
    for name, version in symbols.items():
        if version:
            versions[version].append(name)
    if versions:
        script = directory / f"{library}.map"
        script.write_text("".join(f"{v} {{ global: {'; '.join(names)}; }};\n" for v, names in versions.items()))
        command.append(f"-Wl,--version-script={script}")
    subprocess.run(command, check=True)
    return target


def _output(*command) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
