"""The containers and the Kubernetes manifest: what they name is there, and the steps for CPUs lead to a server."""

import json
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib

import httpx
import pytest
import yaml

from gdnjax.cli import serve
from gdnjax.serving.server.app import make_app
from gdnjax.serving.server.settings import ServerConfig

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
DOCKERFILES = ("Dockerfile.cpu", "Dockerfile.rocm")


def instructions(name):
    """(instruction, its arguments) of a Dockerfile, lines joined, comments left out."""
    lines = [line for line in (EXAMPLES / name).read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def arguments_of(name, instruction):
    return [arguments for kind, arguments in instructions(name) if kind == instruction]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_dockerfile_names_what_there_is(name):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for copied in arguments_of(name, "COPY"):
        *sources, _ = copied.split()
        assert all((ROOT / source).exists() for source in sources)
    # What pip builds the package of is copied before.
    copied = " ".join(arguments_of(name, "COPY"))
    for needed in ("pyproject.toml", project["project"]["readme"], "LICENSE", "gdnjax gdnjax"):
        assert needed in copied
    (extras,) = re.findall(r'"\.\[(.*?)\]"', " ".join(arguments_of(name, "RUN")))
    assert set(extras.split(",")) <= set(project["project"]["optional-dependencies"])
    (entry,) = arguments_of(name, "ENTRYPOINT")
    program, command, *flags = json.loads(entry)
    assert (program, command) == ("gdnjax", "serve")
    assert serve.build_parser().parse_args(flags).host == "0.0.0.0"
    assert arguments_of(name, "EXPOSE") == [str(serve.build_parser().parse_args([]).port)]
    # Not root, and from an image of some version.
    assert [kind for kind, _ in instructions(name)].index("USER") > 0
    base = arguments_of(name, "FROM")[0]
    if base == "${ROCM_IMAGE}":
        (argument,) = arguments_of(name, "ARG")
        base = argument.removeprefix("ROCM_IMAGE=")
    assert re.fullmatch(r"[a-z0-9./-]+:[\w.-]*\d[\w.-]*", base)


@pytest.fixture(scope="module")
def manifest():
    return {item["kind"]: item for item in yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())}


def test_probes_ask_for_what_the_server_has(manifest):
    pod = manifest["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    paths = set(make_app(None, ServerConfig(served_model_names=("m",))).openapi()["paths"])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    given = serve.build_parser().parse_args(container["args"])
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[name]["httpGet"]["path"] in paths
        assert ports[container[name]["httpGet"]["port"]] == given.port
    assert manifest["Service"]["spec"]["ports"][0]["targetPort"] in ports
    labels = manifest["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert manifest["Service"]["spec"]["selector"].items() <= labels.items()
    wait = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > given.shutdown_timeout + wait
    # The model and the compilation cache are where the arguments and the images say.
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert given.model in mounts
    set_to = dict(line.split("=", 1) for line in arguments_of("Dockerfile.rocm", "ENV"))
    assert any(set_to["JAX_COMPILATION_CACHE_DIR"].startswith(f"{mount}/") for mount in mounts)


@pytest.mark.optional
def test_steps_of_the_dockerfile_lead_to_a_server(tmp_path):
    """All but the image and the user: COPY and RUN in an empty environment, then the entry point."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    source = tmp_path / "src"
    source.mkdir()
    environment = {"PATH": f"{tmp_path / 'venv' / 'bin'}:/usr/bin:/bin", "HOME": str(tmp_path)}
    for kind, arguments in instructions("Dockerfile.cpu"):
        if kind == "COPY":
            *sources, target = arguments.split()
            for name in sources:
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, source / target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / name, source / target)
        elif kind == "RUN" and arguments.startswith("pip "):
            subprocess.run(["sh", "-c", arguments], cwd=source, env=environment, check=True)
    (entry,) = arguments_of("Dockerfile.cpu", "ENTRYPOINT")
    command = [*json.loads(entry), *shlex.split("--port 0 --max-num-seqs 2 --max-model-len 256 --no-warmup")]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        url = None
        for line in process.stderr:
            if line.startswith("ready: "):
                url = line.split()[-1].replace("0.0.0.0", "127.0.0.1")
                break
        assert url, process.wait()
        assert httpx.get(f"{url}/health").status_code == 200
        body = {"messages": [{"role": "user", "content": "What is 31 + 46?"}], "temperature": 0}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120).json()
        assert "77" in answer["choices"][0]["message"]["content"]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
