"""The images, the Kubernetes manifest and the SkyPilot task: valid by their schemas, and true of this checkout."""

import os
import re
import shlex
import stat
import subprocess
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
JOB = ROOT / "launch" / "kubernetes" / "trainjob.yaml"
TASK = ROOT / "launch" / "skypilot" / "task.yaml"
DOCKERFILES = sorted((ROOT / "launch" / "docker").iterdir())


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_copies_what_is_there(dockerfile: Path) -> None:
    lines = dockerfile.read_text().replace("\\\n", " ").splitlines()
    copied = {source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]}
    assert {"pyproject.toml", "constraints.txt", "lopt_pp", "launch"} <= copied
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for source in copied:
        assert (ROOT / source).exists()
        assert f"!{source}" in ignored, f"{source} is not sent to the builder"
    # What the build of the package needs is there when it is built.
    build = (ROOT / "pyproject.toml").read_text()
    assert all(name in copied for name in re.findall(r'^(?:readme = |license-files = \[)"(\w[\w.]+)"', build, re.M))
    (extra,) = {extra for line in lines for extra in re.findall(r'"\.\[(\w+)\]"', line)}
    assert re.search(rf"^{extra} = \[", build, re.M)


def test_nothing_else_is_sent_to_the_builder() -> None:
    first, *rest = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert first == "*" and fnmatch("out", first)
    assert all(line.startswith("!") or line == "**/__pycache__" for line in rest)


def test_the_manifest_is_a_train_job() -> None:
    """By the types that Kubeflow Trainer generates from its CRD."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    job = models.TrainerV1alpha1TrainJob
    quantity = models.IoK8sApimachineryPkgApiResourceQuantity

    def typed(value: Any, name: str = "") -> Any:
        """With quantities as those types have them; in a manifest they are words."""
        if isinstance(value, dict):
            is_amounts = name in ("limits", "requests")
            return {
                key: quantity(entry) if is_amounts or key == "sizeLimit" else typed(entry, key)
                for key, entry in value.items()
            }
        return [typed(entry) for entry in value] if isinstance(value, list) else value

    manifest = read(JOB)
    assert job.model_validate(typed(manifest), extra="forbid").spec.trainer.num_nodes == 2
    manifest["spec"]["trainer"]["nodes"] = 2
    with pytest.raises(ValueError, match="nodes"):
        job.model_validate(typed(manifest), extra="forbid")


def test_the_task_is_one_of_skypilot() -> None:
    schemas = pytest.importorskip("sky.utils.schemas")
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(read(TASK), schemas.get_task_schema())
    with pytest.raises(jsonschema.ValidationError, match="nodes"):
        jsonschema.validate(read(TASK) | {"nodes": 2}, schemas.get_task_schema())


def started_by(script: str, environment: dict[str, str], home: Path) -> list[str]:
    """The command line that a script starts torchrun with."""
    (home / "bin").mkdir()
    torchrun = home / "bin" / "torchrun"
    torchrun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    torchrun.chmod(torchrun.stat().st_mode | stat.S_IXUSR)
    path = f"{torchrun.parent}:{os.environ['PATH']}"
    ran = subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        env={"HOME": str(home), "PATH": path} | environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_a_pod_starts_its_processes(tmp_path: Path) -> None:
    """With the variables that Kubeflow Trainer gives, in the image's own folders."""
    trainer = read(JOB)["spec"]["trainer"]
    assert trainer["command"] == ["bash", "-c"]
    (script,) = trainer["args"]
    assert "WORKDIR /opt/lopt-pp" in DOCKERFILES[0].read_text()
    nodes, processes = trainer["numNodes"], trainer["numProcPerNode"]
    given = {"PET_MASTER_ADDR": "lopt-pp-node-0-0.lopt-pp", "PET_MASTER_PORT": "29400"}
    given |= {"PET_NNODES": str(nodes), "PET_NPROC_PER_NODE": str(processes), "PET_NODE_RANK": "1"}
    words = started_by(script.replace("/opt/lopt-pp", str(ROOT)), given, tmp_path)
    assert after(words, "--rdzv-endpoint") == "lopt-pp-node-0-0.lopt-pp:29400"
    assert (after(words, "--nnodes"), after(words, "--nproc-per-node")) == (str(nodes), str(processes))
    assert int(trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]) == processes
    spec = read(JOB)["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
    pod = spec["template"]["spec"]["template"]["spec"]
    folders = {mount["mountPath"] for container in pod["containers"] for mount in container["volumeMounts"]}
    assert str(Path(after(words, "--config")).parent) in folders
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {one["name"] for one in pod["volumes"]}


def test_a_machine_of_skypilot_starts_its_processes(tmp_path: Path) -> None:
    task = read(TASK)
    activate = tmp_path / "venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.touch()
    given = {"SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_TASK_ID": "sky-1"}
    words = started_by(task["run"], given | {"SKYPILOT_NUM_GPUS_PER_NODE": "1"}, tmp_path)
    assert after(words, "--rdzv-endpoint") == "10.0.0.4:29500"
    assert (after(words, "--nnodes"), after(words, "--nproc-per-node")) == ("2", "1")
    assert after(words, "--rdzv-id") == "sky-1"
    extra = re.search(r'"\.\[(\w+)\]"', task["setup"])
    assert extra and shlex.split(task["setup"].splitlines()[0])[-1] == "~/venv"
