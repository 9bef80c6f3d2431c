"""The manifests against the schemas of Kubernetes and of the operators, as far as packages ship them.

Kubeflow's operator: its own models, made from its custom resource definition. Apache's operator publishes no package with its
definition: its fields are written down here from the definition of `spark.apache.org/v1`, and its pod templates are held against
Kubernetes' schema.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pydantic
import pytest
import yaml
from kubeflow_spark_api.models.spark_v1beta2_spark_application import SparkV1beta2SparkApplication

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "deploy" / "kubernetes"
KUBERNETES = "1.34"


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


KUBEFLOW, APACHE = read("kubeflow.yaml"), read("apache.yaml")
STORAGE = list(yaml.safe_load_all((FOLDER / "storage.yaml").read_text(encoding="utf-8")))


def fields(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": properties}


STRING, INTEGER, STRINGS = {"type": "string"}, {"type": "integer"}, {"type": "array", "items": {"type": "string"}}
POD = fields(podTemplateSpec=fields(metadata={"type": "object"}, spec={"type": "object"}))
TIMES = ("driverStartTimeoutMillis", "driverReadyTimeoutMillis", "executorStartTimeoutMillis", "forceTerminationGracePeriodMillis",
         "terminationRequeuePeriodMillis")  # fmt: skip
RESTARTS = ("maxRestartAttempts", "restartBackoffMillis", "restartCounterResetMillis", "maxRestartOnFailure",
            "restartBackoffMillisForFailure", "maxRestartOnSchedulingFailure", "restartBackoffMillisForSchedulingFailure")  # fmt: skip
APACHE_SPEC = fields(
    mainClass=STRING, jars=STRING, pyFiles=STRING, sparkRFiles=STRING, files=STRING, proxyUser=STRING, driverArgs=STRINGS,
    deploymentMode={"enum": ["ClientMode", "ClusterMode"]},
    sparkConf={"type": "object", "additionalProperties": STRING},
    runtimeVersions=fields(sparkVersion=STRING, scalaVersion=STRING, jdkVersion=STRING) | {"required": ["sparkVersion"]},
    applicationTolerations=fields(
        restartConfig=fields(
            restartPolicy={"enum": ["Always", "Never", "OnFailure", "OnInfrastructureFailure"]},
            **dict.fromkeys(RESTARTS, INTEGER),
        ),
        applicationTimeoutConfig=fields(**dict.fromkeys(TIMES, INTEGER)),
        instanceConfig=fields(**dict.fromkeys(("minExecutors", "initExecutors", "maxExecutors"), INTEGER)),
        resourceRetainPolicy={"enum": ["Always", "Never", "OnFailure"]},
        resourceRetainDurationMillis=INTEGER, ttlAfterStopMillis=INTEGER,
    ),
    driverSpec=POD, executorSpec=POD,
) | {"required": ["runtimeVersions"]}  # fmt: skip


def check_kubeflow(manifest: Any) -> None:
    """Raise ValueError unless the operator's models take every field of it."""
    read_back = SparkV1beta2SparkApplication.from_dict(copy.deepcopy(manifest))
    if read_back.to_dict() != manifest:  # the models pass over fields that they do not know
        raise ValueError("a field is none of a SparkApplication's")
    spec = manifest["spec"]
    if (
        spec["restartPolicy"]["type"] not in ("Always", "Never", "OnFailure")
        or spec["type"] != "Python"
        or spec["mode"] != "cluster"
    ):
        raise ValueError("not one of the choices of the definition")


def check_apache(manifest: Any) -> None:
    """Raise ValueError unless its fields are those of the definition, and its pods are pods."""
    try:
        assert manifest["apiVersion"] == "spark.apache.org/v1"
        jsonschema.validate(manifest["spec"], APACHE_SPEC)
        for name in ("driverSpec", "executorSpec"):
            template = copy.deepcopy(manifest["spec"][name]["podTemplateSpec"])
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    except jsonschema.ValidationError as error:  # both validators'
        raise ValueError(error.message) from error


CHECKS = {"kubeflow": (check_kubeflow, KUBEFLOW), "apache": (check_apache, APACHE)}


@pytest.mark.parametrize("operator", CHECKS)
def test_the_operators_would_take_their_manifests(operator: str) -> None:
    check, manifest = CHECKS[operator]
    check(manifest)


@pytest.mark.parametrize("document", STORAGE, ids=lambda document: document["kind"])
def test_kubernetes_would_take_the_rest(document: Any) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_the_namespace_comes_before_what_is_in_it() -> None:
    """kubectl applies documents in their order."""
    kinds = [document["kind"] for document in STORAGE]
    assert kinds[0] == "Namespace"
    inside = [*STORAGE[1:], KUBEFLOW, APACHE]
    assert {document["metadata"]["namespace"] for document in inside} == {STORAGE[0]["metadata"]["name"]}


BROKEN: list[tuple[str, str, Callable[[Any], Any]]] = [
    ("kubeflow", "misspelt field", lambda spec: spec["executor"].update(instance=4)),
    ("kubeflow", "number as a string", lambda spec: spec["executor"].update(instances="4")),
    ("kubeflow", "setting that is no string", lambda spec: spec["sparkConf"].update({"spark.task.resource.gpu.amount": 1})),
    ("kubeflow", "no file to run", lambda spec: spec.pop("mainApplicationFile")),
    ("kubeflow", "unknown restart policy", lambda spec: spec["restartPolicy"].update(type="Retry")),
    ("kubeflow", "volume of no kind", lambda spec: spec["volumes"][0].update(persistentVolume={"claimName": "lexplain"})),
    ("apache", "misspelt field", lambda spec: spec.update(driverArguments=["plan.yaml"])),
    ("apache", "setting that is no string", lambda spec: spec["sparkConf"].update({"spark.executor.instances": 4})),
    ("apache", "no Spark version", lambda spec: spec.pop("runtimeVersions")),
    ("apache", "unknown restart policy",
     lambda spec: spec["applicationTolerations"]["restartConfig"].update(restartPolicy="Retry")),
    ("apache", "toleration that is none",
     lambda spec: spec["executorSpec"]["podTemplateSpec"]["spec"]["tolerations"][0].update(effects="NoSchedule")),
]  # fmt: skip


@pytest.mark.parametrize(("operator", "change"), [(one, change) for one, _, change in BROKEN],
                         ids=[f"{one}: {name}" for one, name, _ in BROKEN])  # fmt: skip
def test_a_broken_manifest_is_refused(operator: str, change: Callable[[Any], Any]) -> None:
    check, manifest = CHECKS[operator]
    broken = copy.deepcopy(manifest)
    change(broken["spec"])
    with pytest.raises((ValueError, pydantic.ValidationError)):
        check(broken)


# --- what no schema knows -------------------------------------------------------------------------------------------


def pods(manifest: Any) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """Yield (container, volumes) of driver and executor."""
    spec = manifest["spec"]
    if manifest is KUBEFLOW:
        for role in ("driver", "executor"):
            yield spec[role], spec["volumes"]
    else:
        for role in ("driverSpec", "executorSpec"):
            pod = spec[role]["podTemplateSpec"]["spec"]
            yield pod["containers"][0], pod["volumes"]


@pytest.mark.parametrize("manifest", [KUBEFLOW, APACHE], ids=["kubeflow", "apache"])
def test_what_is_mounted_is_there(manifest: Any) -> None:
    (claim,) = [document["metadata"]["name"] for document in STORAGE if document["kind"] == "PersistentVolumeClaim"]
    plan = read("plan.yaml")
    for container, volumes in pods(manifest):
        named = {volume["name"]: volume for volume in volumes}
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounts) <= set(named)
        assert named["data"]["persistentVolumeClaim"]["claimName"] == claim
        for path in (plan["sink"]["path"], plan["models"]["base"], plan["corpus"]["path"], plan["training"]["path"]):
            assert path.startswith(f"{mounts['data']}/")
    driver, _ = next(pods(manifest))
    (argument,) = manifest["spec"].get("arguments") or manifest["spec"]["driverArgs"]
    assert argument.startswith(tuple(f"{mount['mountPath']}/" for mount in driver["volumeMounts"]))


@pytest.mark.parametrize("manifest", [KUBEFLOW, APACHE], ids=["kubeflow", "apache"])
def test_files_and_user_are_those_of_the_image(manifest: Any) -> None:
    dockerfile = (REPOSITORY / "deploy" / "docker" / "Dockerfile").read_text(encoding="utf-8")
    (user,) = re.findall(r"^ARG SPARK_UID=(\d+)", dockerfile, flags=re.MULTILINE)
    assert {container["securityContext"]["runAsUser"] for container, _ in pods(manifest)} == {int(user)}
    spec = manifest["spec"]
    script = (spec.get("mainApplicationFile") or spec["pyFiles"]).removeprefix("local://")
    assert script == f"/opt/lexplain/jobs/{Path(script).name}"
    assert (REPOSITORY / "jobs" / Path(script).name).is_file()
    assert spec["sparkConf"]["spark.executor.resource.gpu.discoveryScript"] == "/opt/lexplain/discover-gpus.sh"


def test_both_operators_are_told_the_same() -> None:
    """But for what Kubeflow's has fields of its own."""
    apache = dict(APACHE["spec"]["sparkConf"])
    for role in ("driver", "executor"):
        pod = KUBEFLOW["spec"][role]
        assert apache.pop(f"spark.{role}.cores") == str(pod["cores"])
        assert apache.pop(f"spark.{role}.memory") == pod["memory"]
        assert apache.pop(f"spark.{role}.memoryOverhead") == pod["memoryOverhead"]
    assert apache.pop("spark.executor.instances") == str(KUBEFLOW["spec"]["executor"]["instances"])
    assert apache.pop("spark.kubernetes.container.image") == KUBEFLOW["spec"]["image"]
    (account,) = [document["metadata"]["name"] for document in STORAGE if document["kind"] == "ServiceAccount"]
    assert apache.pop("spark.kubernetes.authenticate.driver.serviceAccountName") == account
    assert KUBEFLOW["spec"]["driver"]["serviceAccount"] == account
    assert apache == KUBEFLOW["spec"]["sparkConf"]
    assert APACHE["spec"]["runtimeVersions"]["sparkVersion"] == KUBEFLOW["spec"]["sparkVersion"]
