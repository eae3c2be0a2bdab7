"""What gcloud, xpk, sbatch and Kubernetes accept, as far as the launch scripts use it."""

import argparse
import re


class Strict(argparse.ArgumentParser):
    """Knows some flags of a program, all of them spelled out."""

    def __init__(self, *names: str, switches: tuple[str, ...] = (), positionals: int = 0):
        super().__init__(allow_abbrev=False)
        for name in names:
            self.add_argument(f"--{name}")
        for name in switches:
            self.add_argument(f"--{name}", action="store_true")
        if positionals:
            self.add_argument("plain", nargs=positionals)

    def error(self, message):
        raise AssertionError(message)


# As `gcloud compute tpus ... --help` and `xpk workload create --help` have them.
GCLOUD = {
    ("tpu-vm", "describe"): Strict("zone", "format", positionals=1),
    ("tpu-vm", "create"): Strict("zone", "accelerator-type", "version", switches=("spot",), positionals=1),
    ("tpu-vm", "delete"): Strict("zone", switches=("quiet",), positionals=1),
    ("tpu-vm", "scp"): Strict("zone", "worker", positionals=2),
    ("tpu-vm", "ssh"): Strict("zone", "worker", "command", positionals=1),
    ("queued-resources", "describe"): Strict("zone", "format", positionals=1),
    ("queued-resources", "create"): Strict(
        *"zone accelerator-type runtime-version node-id node-count node-prefix".split(),
        switches=("spot", "reserved"),
        positionals=1,
    ),
    ("queued-resources", "delete"): Strict("zone", switches=("quiet", "force"), positionals=1),
    ("queued-resources", "scp"): Strict("zone", "worker", "node", positionals=2),
    ("queued-resources", "ssh"): Strict("zone", "worker", "node", "command", positionals=1),
}
XPK = Strict(
    *"workload cluster zone project tpu-type num-slices docker-image command max-restarts storage".split(),
    *"restart-on-exit-codes termination-grace-period-seconds".split(),
    switches=("spot",),
)


def read_gcloud(words: list[str]) -> tuple[str, argparse.Namespace]:
    assert words[:3] == ["gcloud", "compute", "tpus"]
    return words[4], GCLOUD[words[3], words[4]].parse_args(words[5:])


# As sbatch(1) has them; None takes no value.
SBATCH = {
    "job-name": r"\S+",
    "output": r"\S+",
    "open-mode": r"append|truncate",
    "requeue": None,
    "signal": r"([RB]{1,2}:)?([A-Z0-9]+)(@\d+)?",
    "nodes": r"\d+(-\d+)?",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"(\w+:)?\d+",
    "partition": r"\S+",
    "time": r"(\d+-)?\d+(:\d+){0,2}",
}


def read_sbatch(words: list[str]) -> dict[str, str | None]:
    """Options by name, up to the first word that is none."""
    options = {}
    for word in words:
        if not word.startswith("--"):
            break
        name, equals, value = word[2:].partition("=")
        assert name in SBATCH, f"sbatch has no --{name}"
        assert bool(equals) == (SBATCH[name] is not None), word
        assert not equals or re.fullmatch(SBATCH[name], value), word
        options[name] = value or None
    return options


POD_SPEC = {
    "restartPolicy": str,
    "hostNetwork": bool,
    "dnsPolicy": str,
    "terminationGracePeriodSeconds": int,
    "nodeSelector": dict,
    "containers": [
        {
            "name": str,
            "image": str,
            "command": [str],
            "ports": [{"containerPort": int}],
            "resources": {"limits": dict},
            "volumeMounts": [{"name": str, "mountPath": str}],
        }
    ],
    "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}}],
}


def check_jobset(tree: dict) -> None:
    """The fields that we use of a JobSet (v1alpha2) and of the Job and Pod in it: names, types, what must agree."""
    shape = {
        "apiVersion": str,
        "kind": str,
        "metadata": {"name": str, "annotations": dict},
        "spec": {
            "failurePolicy": {
                "maxRestarts": int,
                "rules": [{"name": str, "action": str, "onJobFailureReasons": [str]}],
            },
            "replicatedJobs": [
                {
                    "name": str,
                    "replicas": int,
                    "template": {
                        "spec": {
                            "parallelism": int,
                            "completions": int,
                            "completionMode": str,
                            "backoffLimit": int,
                            "podFailurePolicy": {
                                "rules": [
                                    {
                                        "action": str,
                                        "onExitCodes": {
                                            "containerName": str,
                                            "operator": str,
                                            "values": [int],
                                        },
                                    }
                                ]
                            },
                            "template": {"spec": POD_SPEC},
                        }
                    },
                }
            ],
        },
    }
    check_shape(tree, shape, "")
    assert (tree["apiVersion"], tree["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    for rule in tree["spec"]["failurePolicy"]["rules"]:
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
        assert rule["action"] in {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}
        assert set(rule["onJobFailureReasons"]) <= {"BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"}
    for job in tree["spec"]["replicatedJobs"]:
        spec = job["template"]["spec"]
        pod = spec["template"]["spec"]
        assert spec["parallelism"] == spec["completions"] and spec["completionMode"] == "Indexed"
        assert spec["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"  # podFailurePolicy wants Never
        containers = {container["name"] for container in pod["containers"]}
        for rule in spec["podFailurePolicy"]["rules"]:
            assert rule["action"] in {"FailJob", "Ignore", "Count", "FailIndex"}
            assert rule["onExitCodes"]["containerName"] in containers and rule["onExitCodes"]["operator"] in {
                "In",
                "NotIn",
            }
        mounted = {mount["name"] for container in pod["containers"] for mount in container.get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in pod.get("volumes", [])}
        # <jobset>-<job>-<index>-<pod>-<5 characters> is a host name.
        longest = f"{tree['metadata']['name']}-{job['name']}-{job['replicas']}-{spec['parallelism']}-12345"
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", longest)


def check_shape(value, shape, where: str) -> None:
    if isinstance(shape, dict):
        assert isinstance(value, dict) and set(value) <= set(shape), f"{where}: {set(value) - set(shape)}"
        for key, part in value.items():
            check_shape(part, shape[key], f"{where}.{key}")
    elif isinstance(shape, list):
        assert isinstance(value, list) and value, where
        for part in value:
            check_shape(part, shape[0], f"{where}[]")
    else:
        assert type(value) is shape, f"{where} is {value!r}"
        if shape is dict:  # labels, annotations, selectors, quantities
            assert all(isinstance(key, str) for key in value), where
            assert all(isinstance(part, str) or where.endswith(".limits") for part in value.values()), where
