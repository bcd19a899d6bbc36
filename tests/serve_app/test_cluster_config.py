"""The shipped cluster files against Ray's own schemas and ours."""

from pathlib import Path
from typing import Any

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from serve_app.settings import ClusterArgs

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
