"""The bundle, built for real from the project's own files; the image is tests/bundle/image.py."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import yaml

from klein.errors import BadSetting
from klein.request.schema import parse
from klein.settings import Settings
from tests.bundle import export
from tests.support import servers

ROOT = export.ROOT
BENTOFILE: dict[str, Any] = yaml.safe_load((ROOT / "bentofile.yaml").read_text())
NANO_AT_MOST = 40_000_000
CODE_AT_MOST = 1_300_000
LOCK_COPIES = 4
"""How often BentoML puts the requirements into a bento: as they are, and for its image."""
EACH = re.MULTILINE | re.DOTALL


@pytest.fixture(scope="module")
def bento(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built beside litter that must not get in."""
    project = export.export(tmp_path_factory.mktemp("project"))
    for name in ("klein/__pycache__/x.pyc", "klein/.DS_Store", "klein/.cache/x", "tests/x.py"):
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text("litter")
    return export.build(project, tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def dockerfile(bento: Path) -> str:
    return (bento / "env/docker/Dockerfile").read_text()


def _last_stage(dockerfile: str) -> str:
    """The instructions of the last stage, those of the stages that it is made from before them."""
    joined = dockerfile.replace("\\\n", " ")
    stages: dict[str, str] = {}
    text = ""
    for base, name, body in re.findall(
        r"^FROM (\S+)(?: AS (\S+))?\n(.*?)(?=^FROM |\Z)", joined, EACH
    ):
        text = stages.get(base, "") + body
        stages[name] = text
    return text


def _environment(dockerfile: str) -> dict[str, str]:
    """The last stage's ENV, with what it refers to put in; as in Docker, ENV wins over ARG."""
    stage = _last_stage(dockerfile)
    args, env = {"PATH": "/usr/bin"}, dict[str, str]()
    for kind, text in re.findall(r"^(ARG|ENV) (.+)$", stage, re.MULTILINE):
        for name, value in re.findall(r"(\w+)=(\S+)", text):
            known = args | env
            parts = re.split(r"\$\{?(\w+)\}?", value)
            full = "".join(known[x] if i % 2 else x for i, x in enumerate(parts))
            (args if kind == "ARG" else env)[name] = full
    return env


# -- what is in it ---------------------------------------------------------------------------------


def test_the_file_list(bento: Path) -> None:
    """klein, its service and what it is installed from; no tests, training, benchmarks, litter."""
    there = {str(x.relative_to(bento / "src")) for x in (bento / "src").rglob("*") if x.is_file()}
    wanted = {name for name in export.files() if name.startswith("klein/")} | {
        "service.py",
        "requirements.lock",
        "LICENSE",
        "README.md",
        "test_input.json",
        "bentofile.yaml",  # BentoML puts it there itself
    }
    assert there == wanted


def test_its_size(bento: Path) -> None:
    """Code and the built-in model; no other weights are ever in a bento, nor in an image."""
    nano = bento / "src/klein/nano"
    sizes = {x: x.stat().st_size for x in bento.rglob("*") if x.is_file()}
    model = sum(size for path, size in sizes.items() if path.is_relative_to(nano))
    locks = LOCK_COPIES * (ROOT / "requirements.lock").stat().st_size
    assert sum(sizes.values()) - model - locks < CODE_AT_MOST
    assert model < NANO_AT_MOST
    weights = {path for path in sizes if path.suffix in (".safetensors", ".bin", ".pt", ".ckpt")}
    assert all(path.is_relative_to(nano) for path in weights)


# -- nothing in bentofile.yaml is ignored ----------------------------------------------------------

Seen = Callable[[Any, Path, str, dict[str, Any]], bool]


BENTOML = "bentoml==1.4.39"
"""What BentoML adds to the requirements; its hash is in the lock."""


def _rows(requirements: Path) -> list[str]:
    """Each requirement with its hashes, on one line and in one spelling; comments aside."""
    text = requirements.read_text().replace("\\\n", " ").replace("'", '"').replace(" ;", ";")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def _requirements(_: Any, bento: Path, __: str, ___: dict[str, Any]) -> bool:
    (lock, made) = (_rows(ROOT / "requirements.lock"), _rows(bento / "env/python/requirements.txt"))
    return made == [*lock, BENTOML]


def _setup(value: str, bento: Path, dockerfile: str, _: dict[str, Any]) -> bool:
    (script,) = (bento / "env/docker").glob("script__*")
    same = script.read_bytes() == (ROOT / value).read_bytes()
    return same and f"&& ./env/docker/{script.name}" in dockerfile


ACTS: dict[str, Seen] = {
    "service": lambda value, *_: value == _[2]["service"],
    "name": lambda value, *_: value == _[2]["name"],
    "description": lambda _, bento, *__: (
        (bento / "README.md").read_text() == (ROOT / "README.md").read_text()
    ),
    "labels": lambda value, _, __, made: value == made["labels"],
    "include": lambda value, bento, *_: all((bento / "src" / name).exists() for name in value),
    "python.requirements_txt": _requirements,
    "python.lock_packages": lambda _, bento, *__: (
        not (bento / "env/python/requirements.lock.txt").exists()
    ),
    "docker.python_version": lambda value, _, dockerfile, __: (
        f"FROM python:{value}-slim" in dockerfile and f"uv venv --python {value} " in dockerfile
    ),
    "docker.setup_script": _setup,
    "envs": lambda value, _, dockerfile, __: (
        {x["name"]: x["value"] for x in value}.items() <= _environment(dockerfile).items()
    ),
}


def _keys() -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in BENTOFILE.items():
        if name in ("python", "docker"):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat


@pytest.mark.parametrize("key", _keys())
def test_every_key_of_the_bentofile_acts(key: str, bento: Path, dockerfile: str) -> None:
    """BentoML ignores some keys in silence, so each has to be seen in what was built."""
    made = yaml.safe_load((bento / "bento.yaml").read_text())
    assert ACTS[key](_keys()[key], bento, dockerfile, made)


def test_it_is_the_new_image_builder(bento: Path, dockerfile: str) -> None:
    """Some keys make BentoML fall back to its old one, which lacks half of the above."""
    assert yaml.safe_load((bento / "bento.yaml").read_text())["spec"] == 2
    assert "uv venv" in dockerfile


# -- the image -------------------------------------------------------------------------------------


def test_no_secret_gets_into_a_layer(bento: Path, dockerfile: str) -> None:
    """Not even as an empty variable, which would invite a --build-arg."""
    for text in (dockerfile, (ROOT / "Dockerfile").read_text()):
        assert not re.search(r"TOKEN|SECRET|PASSWORD|_KEY", text.upper())


def test_the_order_of_layers(dockerfile: str) -> None:
    """An edit of the source does not install torch again, and nothing runs as root in the end."""
    install, source = (
        dockerfile.index("pip install -r"),
        dockerfile.index("COPY --chown=bentoml:bentoml . ./"),
    )
    assert install < source < dockerfile.index("\nUSER bentoml")


def test_the_repositorys_dockerfile_makes_the_same_image(bento: Path, dockerfile: str) -> None:
    """Base, user, folders, environment and entrypoint; only KLEIN_MODE is its own."""
    own = (ROOT / "Dockerfile").read_text()
    (base,) = re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)
    assert set(re.findall(r"^FROM (\S+)", own, re.MULTILINE)) == {"$PYTHON_IMAGE", "packages"}
    assert re.findall(r"^ARG PYTHON_IMAGE=(\S+)", own, re.MULTILINE) == [base]
    assert _environment(own) == _environment(dockerfile) | {"KLEIN_MODE": "runpod"}
    uid = re.search(r"ARG BENTO_USER_UID=(\d+)", dockerfile)
    assert uid
    assert f"USER {uid[1]}:{uid[1]}" in own
    entry = re.search(r'ENTRYPOINT \[ ?"(.+?)" ?\]', dockerfile)
    assert entry
    assert f'ENTRYPOINT ["{entry[1]}"]' in own
    assert "uv pip install --no-cache -r /app/requirements.lock" in own


class Entrypoint:
    """The bento's entrypoint with its virtual environment moved, and programs that tell on it."""

    def __init__(self, bento: Path, folder: Path) -> None:
        venv = folder / "venv"
        (venv / "bin").mkdir(parents=True)
        for name in ("bentoml", "python"):
            program = venv / "bin" / name
            program.write_text(f'#!/bin/sh\necho {name} "$@" "port=$BENTOML_PORT"\n')
            program.chmod(0o755)
        (venv / "bin/activate").write_text(f'PATH="{venv}/bin:$PATH"\n')
        hook = re.search(r"<<'HOOK'\n(.*?)^HOOK$", _script(bento).read_text(), re.DOTALL | re.M)
        assert hook
        with (venv / "bin/activate").open("a") as activate:
            activate.write(hook[1])
        original = (bento / "env/docker/entrypoint.sh").read_text()
        assert "/app/.venv" in original
        self.path = folder / "entrypoint.sh"
        self.path.write_text(original.replace("/app/.venv", str(venv)))
        self.path.chmod(0o755)

    def __call__(self, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
        clean = {"PATH": os.environ["PATH"], "BENTO_PATH": "/bento", "BENTOML_PORT": "", **env}
        return subprocess.run(
            [str(self.path), *argv], env=clean, capture_output=True, text=True, check=False
        )


def _script(bento: Path) -> Path:
    (script,) = (bento / "env/docker").glob("script__*")
    return script


@pytest.fixture(scope="module")
def entrypoint(bento: Path, tmp_path_factory: pytest.TempPathFactory) -> Entrypoint:
    return Entrypoint(bento, tmp_path_factory.mktemp("image"))


@pytest.mark.parametrize(
    ("argv", "env", "runs"),
    [
        ((), {}, "bentoml serve /bento port="),
        ((), {"KLEIN_MODE": ""}, "bentoml serve /bento port="),
        ((), {"KLEIN_MODE": "serve", "PORT": "80"}, "bentoml serve /bento port=80"),
        ((), {"KLEIN_MODE": "runpod"}, "python -m klein.runpod port="),
        ((), {"KLEIN_MODE": " RunPod"}, "python -m klein.runpod port="),
        (("serve",), {"KLEIN_MODE": "runpod"}, "bentoml serve /bento port="),
        (("--port", "1"), {"KLEIN_MODE": "runpod"}, "bentoml serve --port 1 /bento port="),
        (("python", "-m", "klein.runpod"), {}, "python -m klein.runpod port="),
        (("python", "-m", "klein", "doctor"), {"KLEIN_MODE": "runpod"}, "python -m klein doctor"),
    ],
)
def test_the_entrypoint_chooses(
    entrypoint: Entrypoint, argv: tuple[str, ...], env: dict[str, str], runs: str
) -> None:
    """A command wins; without one KLEIN_MODE decides; without that it serves."""
    run = entrypoint(*argv, **env)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1].startswith(runs)


def test_an_unknown_mode_stops_the_start(entrypoint: Entrypoint) -> None:
    """In the words of the settings, which refuse it too."""
    run = entrypoint(KLEIN_MODE="queue")
    assert run.returncode == 1
    assert "KLEIN_MODE: 'queue' must be one of serve, runpod" in run.stderr
    with pytest.raises(BadSetting, match="KLEIN_MODE: 'queue' must be one of serve, runpod"):
        Settings.from_env({"KLEIN_MODE": "queue"})


def test_the_setup_script_is_a_script() -> None:
    """Executable also in a clone, and bash reads it to its end."""
    script = ROOT / BENTOFILE["docker"]["setup_script"]
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_every_cache_lies_where_everybody_may_write(dockerfile: str) -> None:
    """/cache, which docker/setup.sh makes: what the environment names is below it."""
    values = _environment(dockerfile)
    assert values["HF_HOME"] == "/cache/huggingface"
    script = (ROOT / "docker/setup.sh").read_text()
    assert "chmod 1777 /cache" in script
    for name, value in values.items():
        if "CACHE" in name and not name.startswith("BENTOML_"):
            assert value.startswith("/cache"), name


# -- RunPod's files --------------------------------------------------------------------------------

HUB = json.loads((ROOT / ".runpod/hub.json").read_text())
TESTS = json.loads((ROOT / ".runpod/tests.json").read_text())
PLATFORMS = {"RUNPOD_INIT_TIMEOUT", "RUNPOD_LOG_LEVEL"}
"""Read by RunPod or its SDK, not by klein."""


def _defaults(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {x["key"]: str(x.get("value", x.get("input", {}).get("default", ""))) for x in rows}


@pytest.mark.parametrize(
    "values",
    [
        _defaults(HUB["config"]["env"]),
        _defaults(TESTS["config"]["env"]),
        *(
            _defaults(HUB["config"]["env"]) | preset["defaults"]
            for preset in HUB["config"]["presets"]
        ),
    ],
)
def test_runpods_variables_are_settings(values: dict[str, str]) -> None:
    """klein knows every one that the Hub offers, and takes every default and preset."""
    known = {"MODEL_ID", "MODEL_REVISION", "HF_TOKEN"} | PLATFORMS
    assert all(name in known or name.startswith("KLEIN_") for name in values)
    Settings.from_env({name: str(value) for name, value in values.items()})


def test_runpods_options_are_settings() -> None:
    """Each choice of each menu."""
    for row in HUB["config"]["env"]:
        for option in row.get("input", {}).get("options", ()):
            Settings.from_env({row["key"]: option["value"]})


def test_runpods_tests_are_requests() -> None:
    """On the built-in model, which needs no token; the same CUDA as the Hub's listing."""
    assert _defaults(TESTS["config"]["env"])["MODEL_ID"] == "nano"
    for test in TESTS["tests"]:
        parse(test["input"])
    assert TESTS["config"]["allowedCudaVersions"] == HUB["config"]["allowedCudaVersions"]
    assert HUB["type"] == "serverless"
    assert HUB["category"] == "image"


# -- the pages -------------------------------------------------------------------------------------

PAGES = sorted((ROOT / "docs").glob("deploy-*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_name_settings_that_exist(page: Path) -> None:
    """A KLEIN_ variable on a page is one that klein reads."""
    from dataclasses import fields

    known = {field.metadata["env"] for field in fields(Settings)}
    named = set(re.findall(r"\bKLEIN_[A-Z0-9_]+\b", page.read_text()))
    assert named <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_shell_lines_are_shell(page: Path) -> None:
    """bash parses every block, and every YAML and JSON block loads."""
    for language, block in re.findall(r"```(\w+)\n(.*?)```", page.read_text(), re.DOTALL):
        match language:
            case "bash":
                subprocess.run(["bash", "-n"], input=block.encode(), check=True)
            case "yaml":
                list(yaml.safe_load_all(block))
            case "json":
                json.loads(block)


def test_runpods_page_calls_the_sdk_as_it_is(tmp_path: Path) -> None:
    """Its Python block, run against RunPod's API on this machine: one template, one endpoint."""
    page = (ROOT / "docs/deploy-runpod.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)

    def answer(seen: servers.Seen) -> servers.Answer:
        name = "saveTemplate" if b"saveTemplate" in seen.body else "saveEndpoint"
        body = json.dumps({"data": {name: {"id": name[4:]}}}).encode()
        return 200, {"content-type": "application/json"}, body

    with servers.serve(answer) as server:
        env = {**os.environ, "RUNPOD_API_BASE_URL": server.url, "RUNPOD_API_KEY": "k"}
        env["HOME"] = str(tmp_path)
        argv = [sys.executable, "-c", block]
        run = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
        sent = [json.loads(seen.body)["query"] for seen in server.seen]
    assert run.stdout.strip() == "Endpoint", run.stderr
    assert 'dockerArgs: "python -m klein.runpod"' in sent[0]
    assert 'templateId: "Template"' in sent[1]
    assert f'gpuIds: "{HUB["config"]["gpuIds"]}"' in sent[1]
    assert 'allowedCudaVersions: "13.0"' in sent[1]


def test_bentoclouds_file_is_one(tmp_path: Path) -> None:
    """Every key of it is one that BentoML's own classes have."""
    from bentoml._internal.cloud.schemas.modelschemas import DeploymentServiceConfig
    from bentoml.deployment import DeploymentConfigParameters

    page = (ROOT / "docs/deploy-bentocloud.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    values = yaml.safe_load(block)
    parameters = {field.name for field in attrs.fields(DeploymentConfigParameters)}
    assert set(values) - {"services"} <= parameters
    for service in values["services"].values():
        assert set(service) <= {field.name for field in attrs.fields(DeploymentServiceConfig)}


def test_workflows_load() -> None:
    """And call what exists in the Makefile."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        text = path.read_text()
        yaml.safe_load(text)
        assert set(re.findall(r"run: make ([\w-]+)", text)) <= targets
