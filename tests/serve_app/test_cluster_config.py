"""The shipped cluster files against Ray's own schemas and ours."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray._common.utils import import_attr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve import Application
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema
from ray.util.accelerators import accelerators

from serve_app.settings import ClusterArgs, ModelArgs

ROOT = Path(__file__).resolve().parents[2]


def load(path: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / path).read_text())
    return loaded


def test_cluster_yaml_is_what_ray_up_accepts() -> None:
    validate_config(prepare_config(load("cluster.yaml")))


def test_the_head_runs_no_work() -> None:
    config = load("cluster.yaml")
    assert config["available_node_types"][config["head_node_type"]]["resources"]["CPU"] == 0


def test_the_serve_config_is_what_serve_deploy_accepts() -> None:
    deployed = ServeDeploySchema.model_validate(load("serve_app/config/production.yaml"))
    assert [application.import_path for application in deployed.applications] == ["serve_app.build:build"]


def test_the_arguments_of_the_serve_config_are_ours_and_hold_no_password() -> None:
    (application,) = load("serve_app/config/production.yaml")["applications"]
    args = ClusterArgs.model_validate(application["args"])
    assert "@" not in args.database_url.split("//")[1].split("@")[1]
    assert ":" not in args.database_url.split("//")[1].split("@")[0]


def test_a_model_asks_for_a_gpu_that_ray_knows_and_for_nodes_that_exist() -> None:
    (application,) = load("serve_app/config/production.yaml")["applications"]
    args = ClusterArgs.model_validate(application["args"])
    known = {value for name, value in vars(accelerators).items() if name.isupper()}
    assert {model.accelerator for model in args.models} - {""} <= known
    labels = [node.get("labels", {}) for node in load("cluster.yaml")["available_node_types"].values()]
    assert any(args.control_labels.items() <= each.items() for each in labels)


def test_the_kubernetes_manifest_deploys_the_same_application_with_fault_tolerance_and_incremental_upgrades() -> None:
    manifest = load("serve_app/config/rayservice.yaml")
    spec, cluster = manifest["spec"], manifest["spec"]["rayClusterConfig"]
    assert yaml.safe_load(spec["serveConfigV2"]) == load("serve_app/config/production.yaml")
    assert spec["upgradeStrategy"]["type"] == "NewClusterWithIncrementalUpgrade"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert "redisAddress" in cluster["gcsFaultToleranceOptions"]
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    groups = [group["labels"] for group in cluster["workerGroupSpecs"]]
    assert application["args"]["control_labels"] in groups


@pytest.mark.parametrize(
    ("terms", "why"),
    [
        ({"min_replicas": 2, "max_replicas": 1}, "0 <= min <= max"),
        ({"min_replicas": 0}, "cold-start budget"),
        ({"scaling": {"boot_s": 0}}, "boot_s"),
    ],
)
def test_contradicting_scaling_terms_are_refused_with_the_reason(terms: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        ModelArgs(slug="tiny-pusher", **terms)


def test_a_cold_start_that_takes_longer_than_a_request_may_wait_is_refused() -> None:
    (application,) = load("serve_app/config/production.yaml")["applications"]
    with pytest.raises(ValidationError, match=r"tiny-pusher: cold_start_budget_s 30 .* queue_timeout_s 20"):
        ClusterArgs.model_validate(application["args"] | {"limits": {"queue_timeout_s": 20}})


def test_serve_can_call_the_builder_that_the_config_names() -> None:
    (deployed,) = load("serve_app/config/production.yaml")["applications"]
    builder = import_attr(deployed["import_path"])
    built = call_user_app_builder_with_args_if_necessary(builder, deployed["args"])
    assert isinstance(built, Application)
