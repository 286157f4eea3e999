"""The files of examples/cluster: what they start, and when they start it again."""

import copy
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.schema import faults

FOLDER = Path(__file__).parents[2] / "examples" / "cluster"
sys.path.insert(0, str(FOLDER.parent / "cifar10"))

import options  # noqa: E402 - it is no package


def test_what_a_schema_says_is_asked():
    schema = {"a": int, "b?": [str], "c?": {"x"}}
    assert faults({"a": 1, "b": ["s"], "c": "x"}, schema) == []
    assert faults({"a": 1}, schema) == []
    assert faults({"a": True, "b": [], "c": "y", "d": 0}, schema) == [
        ": 'd' is unknown",
        ".a: True, expected int",
        ".b: [], expected a list with something in it",
        ".c: 'y', expected {'x'}",
    ]
    assert faults({"b": [0]}, schema) == [": 'a' is missing", ".b[0]: 0, expected str"]
    assert faults([], schema) == [": [], expected keys and values"]


# --- SLURM ------------------------------------------------------------------------------------


def submit(folder, status, restarted=0, **environment):
    """Runs slurm.sh where srun ends with `status`: its exit status, stderr, and what it called."""
    for name, ends in (("srun", status), ("scontrol", 0)):
        (folder / name).write_text(
            f'#!/bin/bash\necho {name} "$@" >> {folder}/calls\nexit {ends}\n'
        )
        (folder / name).chmod(0o755)
    environment |= {"PATH": f"{folder}:{os.environ['PATH']}", "RUNS": str(folder / "runs")}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarted)}
    command = ["bash", str(FOLDER / "slurm.sh"), "--epochs", "60"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    return done.returncode, done.stderr, (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize("status", [0, 1, 2, 75, 137, 143])
def test_slurm_starts_again_what_another_start_can_help(tmp_path, status):
    ended, err, (_, *more) = submit(tmp_path, status)
    assert (ended, err) == (status, "")
    assert more == ([] if status in (0, 1, 2) else ["scontrol requeue 7"])


def test_slurm_gives_up_after_so_many_restarts(tmp_path):
    ended, err, calls = submit(tmp_path, 75, restarted=3, RESTARTS="3")
    assert (ended, len(calls)) == (75, 1)
    assert err == "slurm.sh: error: restarted 3 times, stopped; RESTARTS=N allows more\n"


@pytest.mark.parametrize("again", [False, True])
def test_slurm_resumes_a_run_that_is_there(tmp_path, again):
    if again:
        (tmp_path / "runs" / "slurm").mkdir(parents=True)
        (tmp_path / "runs" / "slurm" / "config.json").touch()
    _, _, (call,) = submit(tmp_path, 0)
    args = options.parser().parse_args(call.split("train.py ")[1].split())
    assert (args.cluster, args.resume, args.epochs) == (True, again, 60)
    assert (args.runs, args.name) == (tmp_path / "runs", "slurm")
    assert str(args.data_dir) == "/shared/cifar10"


def test_slurm_is_asked_for_what_the_script_needs():
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", (FOLDER / "slurm.sh").read_text(), re.M))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]  # a GPU a process
    assert asked.keys() >= {"requeue", "nodes", "time"}
    assert asked["open-mode"] == "append"  # a restart keeps what the log said before
    assert re.fullmatch(r"TERM@\d+", asked["signal"])  # no B: - the tasks get it, not this script


# --- Kubernetes -------------------------------------------------------------------------------

NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?").fullmatch  # of a DNS label
META = {"name": NAME}
CONTAINER = {
    "name": NAME,
    "image": str,
    "workingDir": str,
    "command": [str],
    "resources": {"limits": {"nvidia.com/gpu": int}},
    "volumeMounts": [{"name": NAME, "mountPath": str}],
}
POD = {
    "serviceAccountName": NAME,
    "restartPolicy": {"Never"},  # with a podFailurePolicy nothing else is allowed
    "terminationGracePeriodSeconds": int,
    "containers": [CONTAINER],
    "volumes": [{"name": NAME, "persistentVolumeClaim": {"claimName": NAME}}],
}
ON_EXIT = {"containerName": NAME, "operator": {"In", "NotIn"}, "values": [int]}
JOB = {
    "completionMode": {"Indexed"},
    "parallelism": int,
    "completions": int,
    "backoffLimit": int,
    "podFailurePolicy": {"rules": [{"action": {"FailJob"}, "onExitCodes": ON_EXIT}]},
    "template": {"spec": POD},
}
RULE = {
    "name": NAME,
    "action": {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"},
    "onJobFailureReasons": [{"BackoffLimitExceeded", "PodFailurePolicy"}.__contains__],
}
KINDS = {
    "JobSet": {
        "apiVersion": {"jobset.x-k8s.io/v1alpha2"},
        "kind": str,
        "metadata": META,
        "spec": {
            "failurePolicy": {"maxRestarts": int, "rules": [RULE]},
            "replicatedJobs": [{"name": NAME, "replicas": int, "template": {"spec": JOB}}],
        },
    },
    "ServiceAccount": {"apiVersion": {"v1"}, "kind": str, "metadata": META},
    "Role": {
        "apiVersion": {"rbac.authorization.k8s.io/v1"},
        "kind": str,
        "metadata": META,
        "rules": [{"apiGroups": [str], "resources": [str], "verbs": [str]}],
    },
    "RoleBinding": {
        "apiVersion": {"rbac.authorization.k8s.io/v1"},
        "kind": str,
        "metadata": META,
        "subjects": [{"kind": {"ServiceAccount"}, "name": NAME}],
        "roleRef": {"apiGroup": {"rbac.authorization.k8s.io"}, "kind": {"Role"}, "name": NAME},
    },
}


@pytest.fixture(scope="module")
def objects():
    parts = yaml.safe_load_all((FOLDER / "jobset.yaml").read_text())
    return {part["kind"]: part for part in parts}


@pytest.fixture(scope="module")
def job(objects):
    (only,) = objects["JobSet"]["spec"]["replicatedJobs"]
    assert only["replicas"] == 1  # JAX takes the processes of one job
    return only["template"]["spec"]


def test_the_jobset_has_the_keys_and_types_that_kubernetes_asks_for(objects):
    assert objects.keys() == KINDS.keys()
    assert [f for kind, schema in KINDS.items() for f in faults(objects[kind], schema, kind)] == []


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("parallelism", "2", ".parallelism: '2', expected int"),
        ("completionMode", "NonIndexed", ".completionMode: 'NonIndexed', expected {'Indexed'}"),
        ("backOffLimit", 0, ": 'backOffLimit' is unknown"),
    ],
)
def test_a_wrong_key_or_type_of_the_jobset_is_found(job, key, value, fault):
    assert faults(copy.deepcopy(job) | {key: value}, JOB) == [fault]


def test_the_jobset_starts_all_processes_together_or_none(objects, job):
    assert job["completions"] == job["parallelism"] > 1
    assert job["backoffLimit"] == 0
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2]  # and not 75 or 143, after which to resume helps
    (policy,) = objects["JobSet"]["spec"]["failurePolicy"]["rules"]
    assert (policy["action"], policy["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert objects["JobSet"]["spec"]["failurePolicy"]["maxRestarts"] > 0


def test_names_in_the_jobset_lead_somewhere(objects, job):
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    account = objects["ServiceAccount"]["metadata"]["name"]
    assert pod["serviceAccountName"] == account
    assert [subject["name"] for subject in objects["RoleBinding"]["subjects"]] == [account]
    assert objects["RoleBinding"]["roleRef"]["name"] == objects["Role"]["metadata"]["name"]
    assert {v["name"] for v in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]


def test_the_account_may_ask_what_jax_asks(objects):
    allowed = {
        (what, verb)
        for rule in objects["Role"]["rules"]
        for what in rule["resources"]
        for verb in rule["verbs"]
    }
    assert allowed >= {("pods", "list"), ("jobs", "get")}
    assert not {verb for _, verb in allowed} - {"get", "list"}  # it changes nothing


@pytest.mark.parametrize("again", [False, True])
def test_a_pod_becomes_train_and_resumes_a_run_that_is_there(tmp_path, job, again):
    (container,) = job["template"]["spec"]["containers"]
    shell, flag, script = container["command"]
    (tmp_path / "python").write_text('#!/bin/bash\necho $$ "$@"\nexit 143\n')
    (tmp_path / "python").chmod(0o755)
    if again:
        (tmp_path / "runs" / "k8s").mkdir(parents=True)
        (tmp_path / "runs" / "k8s" / "config.json").touch()
    script = script.replace("/shared", str(tmp_path))
    pod = subprocess.Popen(
        [shell, flag, script],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    out, _ = pod.communicate()
    process, train, *given = shlex.split(out)
    assert (int(process), pod.returncode) == (pod.pid, 143)  # signals and statuses pass through
    assert train == "examples/cifar10/train.py"
    args = options.parser().parse_args(given)
    assert (args.cluster, args.resume, args.name) == (True, again, "k8s")
