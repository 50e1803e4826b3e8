"""Each finding from a report that calls for it, the inspection from answered questions, and the command itself."""

import dataclasses
import json
import subprocess
import sys

import pytest

from gdnjax import doctor
from gdnjax.doctor import Device, FileState, Probes, Report, Runtime, Severity

CPU = Device(platform="cpu", kind="cpu")
MI300X = Device(platform="gpu", kind="AMD Instinct MI300X", architecture="gfx942", memory_bytes=150 << 30)
MI355X = Device(platform="gpu", kind="AMD Instinct MI355X", architecture="gfx950", memory_bytes=200 << 30)
ON_CPU = Runtime(platform="cpu", devices=(CPU,), gpu_error="Unknown backend: 'gpu'")

ROCM = {"jax-rocm7-plugin": "0.10.2", "jax-rocm7-pjrt": "0.10.2"}
CUDA13 = {"jax-cuda13-plugin": "0.10.2", "jax-cuda13-pjrt": "0.10.2"}
CUDA12 = {"jax-cuda12-plugin": "0.10.2", "jax-cuda12-pjrt": "0.10.2"}
DRIVER = {"/dev/kfd": FileState.OPEN, "/dev/dri/renderD*": FileState.OPEN}


def report(packages=None, files=None, runtime=ON_CPU, **fields):
    """A machine without a GPU, where nothing is said otherwise."""
    names = ["jax", "jaxlib", "flax", *ROCM, *CUDA13, *CUDA12]
    known = dict.fromkeys(names) | {"jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8"}
    absent = dict.fromkeys(("/dev/kfd", "/dev/dri/renderD*", "/dev/nvidia0"), FileState.MISSING)
    values = {
        "python": "3.12.1",
        "packages": known | (packages or {}),
        "flax_error": None,
        "runtime": runtime,
        "kernels": "reference",
        "device_files": absent | (files or {}),
        "libraries": {},
        "groups": ("users",),
        "host_memory_bytes": 64 << 30,
    }
    return Report(**(values | fields))


def only_finding(seen):
    (finding,) = doctor.diagnose(seen)
    return finding.severity, finding.problem, finding.fix


def test_cpu_machine_is_told_which_extra_to_install():
    severity, problem, fix = only_finding(report())
    assert severity is Severity.WARNING
    assert "no GPU was seen" in problem
    assert 'pip install "jax[rocm7-local]"' in fix
    assert 'pip install "jax[cuda13]"' in fix


@pytest.mark.parametrize(("file", "extra"), [("/dev/kfd", "rocm7-local"), ("/dev/nvidia0", "cuda13")])
def test_gpu_without_plugin_is_an_error(file, extra):
    severity, problem, fix = only_finding(report(files={file: FileState.OPEN}))
    assert severity is Severity.ERROR
    assert f"this machine has a GPU ({file})" in problem
    assert fix == f'pip install "jax[{extra}]"'


def test_rocm_without_driver_names_the_missing_files():
    findings = doctor.diagnose(report(ROCM))
    assert [finding.severity for finding in findings] == [Severity.ERROR] * 2
    assert "/dev/kfd is missing" in findings[0].problem
    assert "/dev/dri/renderD* is missing" in findings[1].problem
    assert "--device=/dev/kfd --device=/dev/dri" in findings[0].fix


def test_rocm_without_permission_names_the_groups():
    files = DRIVER | {"/dev/kfd": FileState.FORBIDDEN}
    severity, problem, fix = only_finding(report(ROCM, files, groups=("users", "video")))
    assert severity is Severity.ERROR
    assert problem.endswith("may not read and write /dev/kfd: it is not in the group render")
    assert "usermod -aG render,video" in fix


def test_rocm_library_that_does_not_load_is_named():
    message = "libamdhip64.so.7: cannot open shared object file: No such file or directory"
    libraries = {"rocm7": {"xla_rocm_plugin.so": message}}
    severity, problem, fix = only_finding(report(ROCM, DRIVER, libraries=libraries))
    assert severity is Severity.ERROR
    assert message in problem
    assert "ldconfig" in fix


@pytest.mark.parametrize("family", ["cuda13", "cuda12"])
def test_cuda_without_driver_library_is_named(family):
    message = "libcuda.so.1: cannot open shared object file"
    packages = {"cuda13": CUDA13, "cuda12": CUDA12}[family]
    seen = report(packages, {"/dev/nvidia0": FileState.OPEN}, libraries={family: {"libcuda.so.1": message}})
    severity, problem, _ = only_finding(seen)
    assert severity is Severity.ERROR
    assert message in problem


@pytest.mark.parametrize(("state", "words"), [(FileState.MISSING, "missing"), (FileState.FORBIDDEN, "may not read")])
def test_cuda_without_device_file_is_an_error(state, words):
    severity, problem, _ = only_finding(report(CUDA13, {"/dev/nvidia0": state}))
    assert severity is Severity.ERROR
    assert words in problem
    assert "/dev/nvidia0" in problem


@pytest.mark.parametrize(("packages", "files"), [(ROCM, DRIVER), (CUDA13, {"/dev/nvidia0": FileState.OPEN})])
def test_unexplained_absence_passes_on_what_jax_says(packages, files):
    severity, problem, _ = only_finding(report(packages, files))
    assert severity is Severity.ERROR
    assert "Unknown backend: 'gpu'" in problem


def test_platform_chosen_by_the_user_is_no_error():
    runtime = dataclasses.replace(ON_CPU, requested_platforms="cpu")
    severity, problem, fix = only_finding(report(ROCM, runtime=runtime))
    assert severity is Severity.WARNING
    assert "told to use 'cpu' only" in problem
    assert "JAX_PLATFORMS" in fix


def test_platform_that_does_not_start_is_an_error():
    runtime = Runtime(platform=None, error="Unable to initialize backend 'rocm'", requested_platforms="rocm")
    severity, problem, _ = only_finding(report(runtime=runtime, kernels=None))
    assert severity is Severity.ERROR
    assert "Unable to initialize backend 'rocm'" in problem


def on(platform, device):
    return Runtime(platform=platform, devices=(device,))


def test_flax_that_does_not_fit_is_an_error():
    findings = doctor.diagnose(report({"jax": "0.11.2"}, flax_error="AttributeError: no 'HiPrimitive'"))
    assert findings[0].severity is Severity.ERROR
    assert findings[0].problem == "flax 0.12.8 does not import beside jax 0.11.2: AttributeError: no 'HiPrimitive'"
    assert findings[0].fix == "pip install --upgrade flax"


@pytest.mark.parametrize(("name", "other"), [(half, other) for half in ROCM for other in ROCM if half != other])
def test_half_a_plugin_is_an_error(name, other):
    severity, problem, fix = only_finding(report({name: "0.10.2"}, DRIVER, on("rocm", MI300X)))
    assert severity is Severity.ERROR
    assert f"{name} is installed without {other}" in problem
    assert f"{other}==0.10.2" in fix


def test_cuda_plugin_of_another_version_is_an_error():
    packages = CUDA13 | {"jax-cuda13-plugin": "0.10.1"}
    severity, problem, fix = only_finding(report(packages, runtime=on("cuda", MI300X)))
    assert severity is Severity.ERROR
    assert "jax-cuda13-plugin 0.10.1 does not match jaxlib 0.10.2" in problem
    assert "jax-cuda13-plugin==0.10.2" in fix


def test_rocm_plugin_of_another_version_is_a_warning():
    packages = ROCM | {"jax-rocm7-pjrt": "0.10.1"}
    severity, problem, _ = only_finding(report(packages, DRIVER, on("rocm", MI300X)))
    assert severity is Severity.WARNING
    assert "jax-rocm7-pjrt 0.10.1" in problem


def test_suffix_of_a_version_is_no_mismatch():
    packages = ROCM | {"jax-rocm7-plugin": "0.10.2.post1", "jax-rocm7-pjrt": "0.10.2+rocm7"}
    assert doctor.diagnose(report(packages, DRIVER, on("rocm", MI300X))) == []


def test_several_plugins_are_a_warning():
    severity, problem, fix = only_finding(report(CUDA12 | ROCM, DRIVER, on("rocm", MI300X)))
    assert severity is Severity.WARNING
    assert "rocm7, cuda12" in problem
    assert "uninstall" in fix


@pytest.mark.parametrize("device", [MI355X, dataclasses.replace(MI300X, architecture=None)])
def test_gfx950_is_told_of_the_command_buffer_fault(device):
    severity, problem, fix = only_finding(report(ROCM, DRIVER, on("rocm", device)))
    assert severity is Severity.NOTE
    assert "openxla/xla#46952" in problem
    assert "XLA_FLAGS=--xla_gpu_enable_command_buffer=" in fix


@pytest.mark.parametrize(("packages", "platform"), [(ROCM, "rocm"), (CUDA13, "cuda")])
def test_working_gpu_has_no_findings(packages, platform):
    assert doctor.diagnose(report(packages, runtime=on(platform, MI300X))) == []


def test_errors_come_first():
    findings = doctor.diagnose(report({"jax-rocm7-plugin": "0.10.2"} | CUDA13, DRIVER, on("rocm", MI355X)))
    assert [finding.severity for finding in findings] == [Severity.ERROR, Severity.WARNING, Severity.NOTE]


def test_inspect_reports_what_the_probes_answer():
    installed = {"jax": "0.10.2", "jaxlib": "0.10.2"} | ROCM
    probes = Probes(
        installed_version=installed.get,
        file_state=lambda path: FileState.OPEN if path == "/dev/kfd" else FileState.MISSING,
        user_groups=lambda: ("render",),
        plugin_libraries=lambda family: [f"{family}.so"],
        load_error=lambda library: f"{library}: broken",
        import_error=lambda module: f"no {module}",
        start_jax=lambda: on("rocm", MI300X),
        choose_kernels=lambda platform: f"kernels of {platform}",
    )
    seen = doctor.inspect(probes)
    assert seen.packages["jax-rocm7-pjrt"] == "0.10.2"
    assert seen.packages["jax-cuda13-pjrt"] is None
    assert seen.plugins() == ["rocm7"]
    assert seen.libraries == {"rocm7": {"rocm7.so": "rocm7.so: broken"}}
    assert seen.device_files["/dev/kfd"] is FileState.OPEN
    assert seen.device_files["/dev/nvidia0"] is FileState.MISSING
    assert seen.kernels == "kernels of rocm"
    assert seen.flax_error == "no flax.nnx"
    assert seen.groups == ("render",)


def test_library_that_does_not_exist_is_named():
    error = Probes().load_error("libdoesnotexist.so.9")
    assert error is not None
    assert "libdoesnotexist.so.9" in error


def test_rendered_report_shows_devices_memory_and_findings():
    seen = report(ROCM, DRIVER, on("rocm", MI355X))
    text = doctor.render(seen, doctor.diagnose(seen))
    assert "AMD Instinct MI355X (gfx950), 200.0 GiB" in text
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION applies" in text
    assert "note: on gfx950" in text
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION does not apply" in doctor.render(report(), [])


@pytest.mark.parametrize(("packages", "status"), [({}, 0), (ROCM, 1)])
def test_exit_status_says_whether_it_is_usable(monkeypatch, capsys, packages, status):
    monkeypatch.setattr(doctor, "inspect", lambda: report(packages))
    assert doctor.main(["--json"]) == status
    printed = json.loads(capsys.readouterr().out)
    assert printed["report"]["device_files"]["/dev/kfd"] == "missing"
    assert printed["findings"][0]["severity"] == ("error" if status else "warning")


def test_module_runs_as_a_command():
    run = subprocess.run([sys.executable, "-m", "gdnjax.doctor"], capture_output=True, text=True, timeout=120)
    assert run.returncode == int("\nerror: " in run.stdout), run.stderr
    assert "backend" in run.stdout
    assert "kernels (auto)" in run.stdout
