"""`gdnjax doctor`, also `python -m gdnjax.doctor`: what this machine offers, what is missing, and what to do about it.

inspect() looks and draws no conclusions, diagnose() draws conclusions and looks at nothing.
"""

import argparse
import ctypes
import dataclasses
import enum
import glob
import grp
import importlib
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import psutil

from gdnjax.version import __version__

PLUGINS = {"rocm7": "rocm", "cuda13": "cuda", "cuda12": "cuda"}
"""Families of JAX's GPU plugins, and the GPUs that they are for."""

EXTRAS = {"rocm": 'pip install "jax[rocm7-local]"', "cuda": 'pip install "jax[cuda13]"'}
"""What installs one that fits the installed jax. It is what the extras of gdnjax name, which is on no package index."""

KFD, RENDER_NODES, NVIDIA = "/dev/kfd", "/dev/dri/renderD*", "/dev/nvidia0"
"""Device files that the GPU drivers make: the first two on ROCm, the last on CUDA."""

LOOP_CRASH_CHIP = "gfx950"
"""Where the replay of a command buffer with a loop in it crashes: openxla/xla#46952."""


class FileState(enum.Enum):
    """Whether a device file is there and may be opened."""

    MISSING = "missing"
    FORBIDDEN = "not readable and writable"
    OPEN = "ok"


class Severity(enum.Enum):
    """ERROR: gdnjax does not run, or not on the GPU it was installed for. WARNING: it runs. NOTE: good to know."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """A device as JAX shows it. `memory_bytes` is what JAX may use of it; None where JAX does not say."""

    platform: str
    kind: str
    architecture: str | None = None
    memory_bytes: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runtime:
    """JAX as it started.

    platform               "cpu", "rocm" or "cuda"; None where no backend starts.
    error                  why none does.
    requested_platforms    jax_platforms, where the user set it (JAX_PLATFORMS).
    gpu_error              what JAX says when asked for a GPU; None where it has one.
    compilation_cache_dir  JAX's persistent compilation cache; None: the engine chooses.
    """

    platform: str | None
    devices: tuple[Device, ...] = ()
    error: str | None = None
    requested_platforms: str | None = None
    gpu_error: str | None = None
    compilation_cache_dir: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What was seen.

    packages      installed version of each package that matters, None where absent.
    flax_error    why flax.nnx does not import, None where it does.
    kernels       the implementation that kernels="auto" means here; None where no backend starts.
    device_files  state of the GPU drivers' files, by path or pattern.
    libraries     by plugin family, the shared libraries it needs: why each does not load, None where it does.
    groups        the user's groups.
    """

    python: str
    packages: dict[str, str | None]
    flax_error: str | None
    runtime: Runtime
    kernels: str | None
    device_files: dict[str, FileState]
    libraries: dict[str, dict[str, str | None]]
    groups: tuple[str, ...]
    host_memory_bytes: int

    def plugins(self) -> list[str]:
        """Plugin families of which the plugin or its pjrt half is installed."""
        return [family for family in PLUGINS if any(self.packages.get(name) for name in _package_names(family))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """Something the user should know, and what to do about it."""

    severity: Severity
    problem: str
    fix: str


def _package_names(family: str) -> tuple[str, str]:
    return f"jax-{family}-plugin", f"jax-{family}-pjrt"


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _file_state(pattern: str) -> FileState:
    paths = glob.glob(pattern)
    if not paths:
        return FileState.MISSING
    return FileState.OPEN if any(os.access(path, os.R_OK | os.W_OK) for path in paths) else FileState.FORBIDDEN


def _user_groups() -> tuple[str, ...]:
    names = {group.gr_gid: group.gr_name for group in grp.getgrall()}
    return tuple(names.get(group, str(group)) for group in sorted({os.getgid(), *os.getgroups()}))


def _plugin_libraries(family: str) -> list[str]:
    """What must load for a plugin to work: on ROCm its own library, which links to ROCm's; on CUDA the driver's."""
    if PLUGINS[family] == "cuda":
        return ["libcuda.so.1"]
    files = importlib.metadata.files(f"jax-{family}-pjrt") or []
    return [str(file.locate()) for file in files if file.name.endswith(".so")]


def _load_error(library: str) -> str | None:
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return str(error)
    return None


def _import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # Packages that do not fit each other raise whatever they trip over.
        return f"{type(error).__name__}: {error}"
    return None


def _start_jax() -> Runtime:
    # jax raises RuntimeError when it is imported beside a jaxlib that does not fit it.
    try:
        import jax

        from gdnjax import backend
    except (ImportError, RuntimeError) as error:
        return Runtime(platform=None, error=str(error))
    # Any: its attributes are made at run time, and a type checker knows none of them.
    config: Any = jax.config
    settings: dict[str, Any] = {
        "requested_platforms": config.jax_platforms or None,
        "compilation_cache_dir": config.jax_compilation_cache_dir or None,
    }
    try:
        devices = jax.devices()
    except RuntimeError as error:
        return Runtime(platform=None, error=str(error), **settings)
    gpu_error = None
    if devices[0].platform == "cpu":
        try:
            jax.devices("gpu")
        except RuntimeError as error:
            gpu_error = str(error)
    return Runtime(
        platform=backend.platform_of(devices[0]),
        devices=tuple(
            Device(
                platform=device.platform,
                kind=device.device_kind,
                architecture=getattr(device, "compute_capability", None),
                memory_bytes=(device.memory_stats() or {}).get("bytes_limit"),
            )
            for device in devices
        ),
        gpu_error=gpu_error,
        **settings,
    )


def _choose_kernels(platform_name: str) -> str:
    from gdnjax import backend

    return backend.resolve("auto", platform_name).kernels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probes:
    """The questions that inspect() asks the machine. Tests answer them instead."""

    installed_version: Callable[[str], str | None] = _installed_version
    file_state: Callable[[str], FileState] = _file_state
    user_groups: Callable[[], tuple[str, ...]] = _user_groups
    plugin_libraries: Callable[[str], list[str]] = _plugin_libraries
    load_error: Callable[[str], str | None] = _load_error
    import_error: Callable[[str], str | None] = _import_error
    start_jax: Callable[[], Runtime] = _start_jax
    choose_kernels: Callable[[str], str] = _choose_kernels


def inspect(probes: Probes | None = None) -> Report:
    """Looks at packages, devices, drivers and libraries. Starts JAX, which takes its share of a GPU's memory."""
    probes = probes or Probes()
    names = ["jax", "jaxlib", "flax", *(name for family in PLUGINS for name in _package_names(family))]
    packages = {name: probes.installed_version(name) for name in names}
    runtime = probes.start_jax()
    return Report(
        python=platform.python_version(),
        packages={"gdnjax": __version__, **packages},
        flax_error=None if runtime.platform is None else probes.import_error("flax.nnx"),
        runtime=runtime,
        kernels=None if runtime.platform is None else probes.choose_kernels(runtime.platform),
        device_files={path: probes.file_state(path) for path in (KFD, RENDER_NODES, NVIDIA)},
        libraries={
            family: {library: probes.load_error(library) for library in probes.plugin_libraries(family)}
            for family in PLUGINS
            if packages[f"jax-{family}-pjrt"]
        },
        groups=probes.user_groups(),
        host_memory_bytes=psutil.virtual_memory().total,
    )


def diagnose(report: Report) -> list[Finding]:
    """What is wrong or worth knowing, errors first. Pure: the same report gives the same findings."""
    runtime = report.runtime
    findings = _package_findings(report)
    if runtime.platform is None:
        findings.append(
            _error(f"JAX starts on no platform: {runtime.error}", "fix what the message names, or unset JAX_PLATFORMS")
        )
    if runtime.platform == "rocm":
        findings += _rocm_notes(runtime)
    elif runtime.platform != "cuda":
        findings += _missing_gpu_findings(report)
    order = list(Severity)
    return sorted(findings, key=lambda finding: order.index(finding.severity))


def _error(problem: str, fix: str) -> Finding:
    return Finding(severity=Severity.ERROR, problem=problem, fix=fix)


def _warning(problem: str, fix: str) -> Finding:
    return Finding(severity=Severity.WARNING, problem=problem, fix=fix)


def _package_findings(report: Report) -> list[Finding]:
    """A flax that does not fit jax; plugins half installed, made for another jaxlib, or several at once."""
    findings = []
    if report.flax_error is not None:
        flax, jax = report.packages["flax"], report.packages["jax"]
        findings.append(
            _error(f"flax {flax} does not import beside jax {jax}: {report.flax_error}", "pip install --upgrade flax")
        )
    for family in report.plugins():
        installed = [name for name in _package_names(family) if report.packages[name]]
        missing = [name for name in _package_names(family) if not report.packages[name]]
        for name in missing:
            findings.append(
                _error(
                    f"{installed[0]} is installed without {name}; JAX needs both",
                    f"{EXTRAS[PLUGINS[family]]}, or pip install {name}=={report.packages[installed[0]]}",
                )
            )
        findings += [
            _mismatch_finding(family, name, report)
            for name in installed
            if _release(report.packages[name]) != _release(report.packages["jaxlib"])
        ]
    if len(report.plugins()) > 1:
        findings.append(
            _warning(
                f"GPU plugins of several families are installed: {', '.join(report.plugins())}; "
                "JAX may start the wrong one",
                "pip uninstall the plugin and pjrt packages that are not for this machine's GPU",
            )
        )
    return findings


def _mismatch_finding(family: str, package: str, report: Report) -> Finding:
    jaxlib = report.packages["jaxlib"]
    problem = f"{package} {report.packages[package]} does not match jaxlib {jaxlib}"
    fix = f"pip install {package}=={jaxlib}, or all of them again: {EXTRAS[PLUGINS[family]]}"
    # JAX refuses a CUDA plugin of another version, and leaves ROCm's to pip's own checks.
    if PLUGINS[family] == "cuda":
        return _error(f"{problem}: JAX will not use it", fix)
    return _warning(f"{problem}: JAX does not check this, and may crash", fix)


def _release(version: str | None) -> str | None:
    """The numbers of a version without suffixes, which is what JAX compares."""
    match = re.match(r"\d+(\.\d+)*", version or "")
    return match.group(0) if match else version


def _rocm_notes(runtime: Runtime) -> list[Finding]:
    others = [device.architecture and not device.architecture.startswith(LOOP_CRASH_CHIP) for device in runtime.devices]
    if all(others):
        return []
    return [
        Finding(
            severity=Severity.NOTE,
            problem=f"on {LOOP_CRASH_CHIP}, replaying a command buffer (HIP graph) can crash: openxla/xla#46952",
            fix="if a step crashes, set XLA_FLAGS=--xla_gpu_enable_command_buffer= before JAX is imported",
        )
    ]


def _missing_gpu_findings(report: Report) -> list[Finding]:
    """Why JAX has no GPU."""
    requested = report.runtime.requested_platforms
    if requested and not {"gpu", "cuda", "rocm"} & set(requested.split(",")):
        return [
            _warning(
                f"JAX was told to use {requested!r} only, and did not look for a GPU",
                "unset JAX_PLATFORMS, or set it to rocm or cuda",
            )
        ]
    installed = {PLUGINS[family] for family in report.plugins()}
    findings = []
    if "rocm" in installed:
        findings += _rocm_findings(report)
    if "cuda" in installed:
        findings += _cuda_findings(report)
    for extra, file in (("rocm", KFD), ("cuda", NVIDIA)):
        if extra not in installed and report.device_files[file] is not FileState.MISSING:
            findings.append(_error(f"this machine has a GPU ({file}), but JAX has no plugin for it", EXTRAS[extra]))
    if not findings and report.runtime.platform is not None:
        findings.append(
            _warning(
                "no GPU was seen: everything runs on the CPU, slowly",
                f"on a machine with an AMD GPU: {EXTRAS['rocm']}; with an NVIDIA GPU: {EXTRAS['cuda']}",
            )
        )
    return findings


def _rocm_findings(report: Report) -> list[Finding]:
    """Why an installed ROCm plugin gives no device."""
    findings = []
    for file in (KFD, RENDER_NODES):
        match report.device_files[file]:
            case FileState.MISSING:
                findings.append(
                    _error(
                        f"the ROCm plugin is installed, but {file} is missing",
                        "load the amdgpu driver (sudo modprobe amdgpu); in a container, start it with "
                        "--device=/dev/kfd --device=/dev/dri",
                    )
                )
            case FileState.FORBIDDEN:
                absent = [group for group in ("render", "video") if group not in report.groups]
                reason = f": it is not in the group {' nor '.join(absent)}" if absent else ""
                findings.append(
                    _error(
                        f"the ROCm plugin is installed, but this user may not read and write {file}{reason}",
                        "sudo usermod -aG render,video $USER, then log in again; in a container, start it with "
                        "--group-add render --group-add video",
                    )
                )
    for error in _load_errors(report, "rocm7"):
        findings.append(
            _error(
                f"the ROCm plugin is installed, but a library that it needs does not load: {error}",
                "install ROCm 7 (the plugin brings none of it) and let the loader find it: "
                "echo /opt/rocm/lib | sudo tee /etc/ld.so.conf.d/rocm.conf && sudo ldconfig",
            )
        )
    return findings or [_unexplained("ROCm", "rocminfo", report.runtime)]


def _cuda_findings(report: Report) -> list[Finding]:
    """Why an installed CUDA plugin gives no device."""
    findings = []
    for error in _load_errors(report, "cuda13") or _load_errors(report, "cuda12"):
        findings.append(
            _error(
                f"the CUDA plugin is installed, but the driver's library does not load: {error}",
                "install the NVIDIA driver; in a container, start it with --gpus all",
            )
        )
    match report.device_files[NVIDIA]:
        case FileState.MISSING:
            findings.append(
                _error(
                    f"the CUDA plugin is installed, but {NVIDIA} is missing",
                    "load the NVIDIA driver (sudo modprobe nvidia); in a container, start it with --gpus all",
                )
            )
        case FileState.FORBIDDEN:
            findings.append(
                _error(
                    f"the CUDA plugin is installed, but this user may not read and write {NVIDIA}",
                    "give this user access to /dev/nvidia*",
                )
            )
    return findings or [_unexplained("CUDA", "nvidia-smi", report.runtime)]


def _load_errors(report: Report, family: str) -> list[str]:
    return [error for error in report.libraries.get(family, {}).values() if error is not None]


def _unexplained(name: str, tool: str, runtime: Runtime) -> Finding:
    return _error(
        f"the {name} plugin is installed, and driver and libraries look right, but JAX has no GPU: "
        f"{runtime.gpu_error or runtime.error}",
        f"see whether {tool} lists the GPU, and what JAX logs with JAX_DEBUG_LOG_MODULES=jax._src.xla_bridge",
    )


def render(report: Report, findings: Sequence[Finding]) -> str:
    """The report and its findings as text for a person."""
    runtime = report.runtime
    lines = [f"python               {report.python}"]
    lines += [f"{name:<20} {version or '-'}" for name, version in report.packages.items()]
    lines.append(f"backend              {runtime.platform or 'none'}")
    for index, device in enumerate(runtime.devices):
        architecture = f" ({device.architecture})" if device.architecture else ""
        memory = "memory as of the host" if device.memory_bytes is None else _gib(device.memory_bytes)
        lines.append(f"device {index:<13} {device.kind}{architecture}, {memory}")
    lines.append(f"host memory          {_gib(report.host_memory_bytes)}")
    lines.append(f"kernels (auto)       {report.kernels or '-'}")
    fraction = "applies: set it before JAX is imported; the devices' memory above is what it leaves"
    if runtime.platform not in ("rocm", "cuda"):
        fraction = "does not apply: it is for GPUs"
    lines.append(f"XLA_PYTHON_CLIENT_MEM_FRACTION {fraction}")
    lines.append(f"compilation cache    {runtime.compilation_cache_dir or 'not configured in JAX; the engine chooses'}")
    for finding in findings:
        lines += ["", f"{finding.severity.value}: {finding.problem}", f"  fix: {finding.fix}"]
    return "\n".join(lines)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


def _plain(value: object) -> object:
    """Enumerations by value, for json.dumps."""
    if isinstance(value, enum.Enum):
        return value.value
    raise TypeError(f"a report holds a {type(value).__name__}, which JSON cannot show")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report; returns 0 where gdnjax is usable and 1 where a finding is an error."""
    parser = argparse.ArgumentParser(prog="gdnjax doctor", description="What this machine offers and lacks.")
    parser.add_argument("--json", action="store_true", help="print the report and its findings as JSON")
    arguments = parser.parse_args(argv)
    report = inspect()
    findings = diagnose(report)
    if arguments.json:
        data = {"report": dataclasses.asdict(report), "findings": [dataclasses.asdict(finding) for finding in findings]}
        print(json.dumps(data, indent=2, default=_plain))
    else:
        print(render(report, findings))
    return int(any(finding.severity is Severity.ERROR for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
