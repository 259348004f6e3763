"""The launch scripts, and several real processes against one."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import kubernetes_validate
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from dinalrm_jax.cli.configs import load_run
from dinalrm_jax.cli.flags import parse
from dinalrm_jax.cli.options import ServeOptions, TrainOptions
from dinalrm_jax.data.config import PreparationConfig
from dinalrm_jax.data.sources.datasets import preprocess
from dinalrm_jax.model.encoding import EncodersConfig
from tests.conftest import ROOT
from tests.data.test_preparation import same_files

SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
FLAGS = [
    "--config=tests/sharded_run.py",
    "--config.mesh.data=2",
    "--config.mesh.fsdp=2",
    "--config.mesh.tensor=2",
]


@pytest.fixture(scope="module")
def data(rehearsal_source, tiny_pipeline, tmp_path_factory):
    output = tmp_path_factory.mktemp("sharded") / "data"
    config = PreparationConfig(
        "hpdv3", EncodersConfig("sd3", 8), buckets=("64x64",), fit="crop", min_area=1024, images_per_shard=4
    )
    preprocess(rehearsal_source, output, config, tiny_pipeline)
    return output


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def environment(tmp_path, processes=2, devices=4):
    return {
        **os.environ,
        "PYTHON": sys.executable,
        "PROCESSES": str(processes),
        "DEVICES": str(devices),
        "PORT": str(free_port()),
        "LOGS": str(tmp_path / "logs"),
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }


def train(tmp_path, name, data, pipeline, flags, script=None, **popen):
    arguments = ["dinalrm_jax.train", f"--workdir={tmp_path / name}", *flags]
    arguments += [f"--config.data={data}", f"--config.base_model={pipeline}"]
    command = [script, *arguments] if script else [sys.executable, "-m", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **popen
    )  # fmt: skip


def finish(process, limit=300):
    out, _ = process.communicate(timeout=limit)
    return process.returncode, out


def losses(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def together(data, tiny_pipeline, tmp_path_factory):
    """Two processes of four devices, data x fsdp x tensor: stopped by SIGTERM to one of them, then finished."""
    directory = tmp_path_factory.mktemp("together")
    script = str(ROOT / "launch" / "local_processes.sh")
    env = environment(directory)
    process = train(directory, "run", data, tiny_pipeline, FLAGS, script, env=env, start_new_session=True)
    while not (directory / "run" / "metrics.jsonl").exists() or len(losses(directory / "run")) < 2:
        assert process.poll() is None, finish(process)
        time.sleep(0.01)
    # The second process is told; the first has to learn of it.
    found = subprocess.run(
        ["pgrep", "-f", f"dinalrm_jax.train --workdir={directory / 'run'}"], capture_output=True, text=True
    )  # fmt: skip
    told = [pid for pid in map(int, found.stdout.split()) if process_id(pid) == "1"]
    os.kill(told[0], signal.SIGTERM)
    stopped = finish(process)
    steps = len(losses(directory / "run"))
    env["PORT"] = str(free_port())
    code, out = finish(train(directory, "run", data, tiny_pipeline, FLAGS, script, env=env))
    assert code == 0, out + (directory / "logs" / "process-1.log").read_text()
    return directory / "run", stopped, steps, out


def process_id(pid):
    try:
        with open(f"/proc/{pid}/environ") as file:
            return dict(entry.partition("=")[::2] for entry in file.read().split("\0")).get("JAX_PROCESS_ID")
    except OSError:
        return None


def test_sigterm_to_one_process_stops_all_after_the_same_step(together):
    workdir, (code, out), steps, continued = together
    assert code == 128 + signal.SIGTERM, out
    assert "stopped by SIGTERM after reward step" in out
    assert steps < 10
    assert "continuing from the checkpoint of step" in continued
    assert len(losses(workdir)) == 10


def test_two_processes_of_four_devices_train_as_one_device(together, data, tiny_pipeline, tmp_path):
    """data x fsdp x tensor, interrupted on the way, against one device; float32."""
    workdir = together[0]
    env = {**environment(tmp_path), "JAX_NUM_CPU_DEVICES": "1"}
    flags = [FLAGS[0], "--config.mesh.data=1"]
    code, out = finish(train(tmp_path, "run", data, tiny_pipeline, flags, env=env))
    assert code == 0, out
    alone, shared = losses(tmp_path / "run"), losses(workdir)
    np.testing.assert_allclose(shared, alone, rtol=1e-5)
    assert len(set(alone)) == 10, "every step has its own batch and noise"
    ours, expected = (load_file(path / "model" / "trained.safetensors") for path in (workdir, tmp_path / "run"))
    # Adam turns rounding into steps where the true gradient is zero: of a key's bias, which moves all
    # logits of a query alike, and of the last biases, which move both scores of a pair alike.
    names = [
        name
        for name in ours
        if name not in ("head.head.bias", "head.ff.2.bias") and not (".to_k" in name and name.endswith("bias"))
    ]
    deviation = {name: np.linalg.norm(ours[name] - expected[name]) for name in names}
    size = {name: np.linalg.norm(expected[name]) for name in names}
    total = np.linalg.norm(list(deviation.values())) / np.linalg.norm(list(size.values()))
    worst = max(names, key=lambda name: deviation[name] / size[name])
    print(f"relative deviation of all parameters {total:.1e}, of {worst} {deviation[worst] / size[worst]:.1e}")
    assert total < 1e-5
    assert deviation[worst] / size[worst] < 1e-4, worst  # gates start at zero: small, and steps of Adam's size


def test_processes_share_the_preprocessing(rehearsal_source, tiny_pipeline, data, tmp_path):
    command = [str(ROOT / "launch" / "local_processes.sh"), "dinalrm_jax.preprocess", "--dataset=hpdv3"]
    command += [f"--source={rehearsal_source}", f"--output={tmp_path / 'out'}", f"--base-model={tiny_pipeline}"]
    command += ["--buckets=64x64", "--fit=crop", "--min-area=1024", "--text-length=8", "--images-per-shard=4"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(tmp_path), timeout=300)
    assert result.returncode == 0, result.stderr + (tmp_path / "logs" / "process-1.log").read_text()
    assert same_files(data, tmp_path / "out"), "the bytes do not depend on the number of processes"


def test_no_processes_to_join(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "dinalrm_jax.train", "--config=tests/tiny_run.py", "--distributed"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert "--distributed found no processes to join" in result.stderr
    assert "JAX_COORDINATOR_ADDRESS" in result.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    shellcheck = shutil.which("shellcheck", path=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
    result = subprocess.run([shellcheck, str(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def dry(script, tmp_path, tool, *arguments, **variables):
    """Runs a script with `tool` replaced by one that prints its arguments, one a line."""
    (tmp_path / tool).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / tool).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": "/root", **variables}
    return subprocess.run([ROOT / "launch" / script, *arguments], env=env, capture_output=True, text=True, cwd=tmp_path)


def test_slurm_command(tmp_path):
    submitted = {"CONFIG": "configs/hpdv3.py", "WORKDIR": "/shared/a b", "SLURM_SUBMIT_DIR": str(ROOT)}
    result = dry("slurm.sh", tmp_path, "srun", "--config.seed=1", **submitted)
    assert result.stdout.splitlines()[1:] == [
        "python", "-m", "dinalrm_jax.train", "--config", "configs/hpdv3.py", "--workdir", "/shared/a b",
        "--distributed", "--config.seed=1",
    ]  # fmt: skip
    result = dry("slurm.sh", tmp_path, "srun", "--dataset", "hpdv3", MODULE="dinalrm_jax.preprocess")
    assert result.stdout.splitlines()[1:] == [
        "python",
        "-m",
        "dinalrm_jax.preprocess",
        "--distributed",
        "--dataset",
        "hpdv3",
    ]
    result = dry("slurm.sh", tmp_path, "srun")
    assert result.returncode != 0
    assert "set CONFIG to a file under configs/" in result.stderr


def test_tpu_pod_command(tmp_path):
    variables = {"TPU": "slice", "ZONE": "us-x", "CONFIG": "configs/hpdv3.py", "WORKDIR": "/mnt/a b"}
    result = dry("tpu_pod.sh", tmp_path, "gcloud", "--config.data=/mnt/d", **variables)
    *_, command = result.stdout.splitlines()
    assert "slice" in result.stdout.splitlines()
    assert "--worker=all" in result.stdout.splitlines()
    assert command == (
        r"cd ~/dinalrm_jax && python3 -m dinalrm_jax.train --config configs/hpdv3.py --workdir /mnt/a\ b "
        r"--distributed --config.data=/mnt/d"
    )
    assert dry("tpu_pod.sh", tmp_path, "gcloud", **{**variables, "TPU": ""}).returncode != 0


SKEWED = """
import sys, time, jax
from dinalrm_jax.devices import processes
processes.initialize(True)
time.sleep(75 * jax.process_index())
processes.barrier("late")
"""


@pytest.mark.heavy
def test_a_process_that_comes_late_to_the_first_exchange_does_not_end_the_job():
    """By 75 s, as one that compiles or reads alone may; gloo gives up on connecting after 30."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SKEWED], cwd=ROOT, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                 "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(number)},
        )
        for number in range(2)
    ]  # fmt: skip
    for process in processes:
        _, stderr = process.communicate(timeout=150)
        assert process.returncode == 0, stderr


def manifests(name):
    return list(yaml.safe_load_all((ROOT / "launch" / name).read_text()))


def commands(pod):
    return [" ".join([*container["command"], *container["args"]]) for container in pod["containers"]]


def test_the_manifests_are_what_kubernetes_takes():
    """Every key by Kubernetes' own schemas; a JobSet's, which is no kind of its own there, by those of its Job."""
    (jobset,) = manifests("gke_tpu.yaml")
    (job,) = jobset["spec"]["replicatedJobs"]
    wrapped = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, **job["template"]}
    for manifest in (wrapped, *manifests("serve.yaml")):
        kubernetes_validate.validate(manifest, "1.34", strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**wrapped, "spec": {**wrapped["spec"], "paralelism": 4}}, "1.34", strict=True)


def test_the_manifests_start_what_there_is():
    """Flags that the commands take, probes that the server answers, more time to end than it drains."""
    job = manifests("gke_tpu.yaml")[0]["spec"]["replicatedJobs"][0]["template"]["spec"]
    (train,) = commands(job["template"]["spec"])
    trained = parse(TrainOptions, train.split()[3:])
    assert trained.distributed
    load_run(trained.config, trained.overrides)
    assert job["parallelism"] == job["completions"]
    deployment, service = manifests("serve.yaml")
    pod = deployment["spec"]["template"]["spec"]
    (serve,) = commands(pod)
    served = parse(ServeOptions, serve.split()[3:])
    assert pod["terminationGracePeriodSeconds"] > served.server.drain_s
    container = pod["containers"][0]
    assert served.server.port == container["ports"][0]["containerPort"] == service["spec"]["ports"][0]["port"]
    answered = (ROOT / "dinalrm_jax" / "server" / "app.py").read_text()
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert f'web.get("{container[probe]["httpGet"]["path"]}"' in answered
    assert served.api_key_env == container["env"][0]["name"]
