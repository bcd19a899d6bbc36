"""What the documentation promises exists, and what exists is documented."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from deployments.metrics import METRICS
from serve_app.errors import PAYMENT_ERRORS, ROLLOUT_ERRORS, ApiError
from serve_app.settings import ClusterArgs, Limits, ModelArgs, PaymentsArgs, ScalingArgs, Settings
from tests.support.app import App

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
METRICS_PAGE = (ROOT / "docs" / "08-metrics.md").read_text()
SETTINGS_PAGE = (ROOT / "docs" / "09-settings.md").read_text()
WIRE = (ROOT / "docs" / "02-wire.md").read_text()
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("billing/*.md")])


@pytest.mark.parametrize("name", [name.upper() for name in Settings.model_fields])
def test_every_setting_is_in_the_readme(name: str) -> None:
    assert f"`{name}`" in README


@pytest.mark.parametrize(
    ("section", "settings"),
    [
        ("The cluster", ClusterArgs),
        ("A model", ModelArgs),
        ("Scaling", ScalingArgs),
        ("Limits", Limits),
        ("Payments", PaymentsArgs),
    ],
)
def test_every_argument_of_the_application_has_its_row_with_its_default(
    section: str, settings: type[BaseModel]
) -> None:
    text = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", SETTINGS_PAGE, re.MULTILINE | re.DOTALL)
    assert text is not None
    rows = [row.split(" | ") for row in text[1].splitlines() if row.startswith("| `")]
    assert [f"{name} | {default}" for name, default, _ in rows] == [
        f"| `{name}` | {_shown(each)}" for name, each in settings.model_fields.items()
    ]
    assert all(len(what) > 5 for *_, what in rows)


def _shown(setting: FieldInfo) -> str:
    if setting.is_required():
        return "required"
    value = setting.get_default(call_default_factory=True)
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    return "" if isinstance(value, BaseModel) or value in ("", None) else f"`{value}`"


def test_every_socket_and_every_code_that_closes_it_is_in_the_wire_document() -> None:
    sources = (ROOT / "serve_app" / "routes" / "sessions.py").read_text()
    paths = set(re.findall(r'websocket\("([^"]+)"\)', sources))
    assert paths
    assert all(f"`{path}` (WebSocket)" in WIRE for path in paths)
    rows = "\n".join(row for row in WIRE.splitlines() if row.startswith("|"))
    codes = set(re.findall(r"\b(?:1012|40\d\d)\b", sources))
    assert codes
    assert [code for code in codes if code not in rows] == []


def test_every_metric_is_in_the_table_as_the_code_declares_it_and_no_other() -> None:
    rows = [row for row in METRICS_PAGE.splitlines() if row.startswith("| `dream_")]
    declared = [
        f"| `{each.name}` | {each.kind} | {', '.join(f'`{label}`' for label in each.labels)} | {each.help} |"
        for each in METRICS
    ]
    assert rows == declared


async def test_every_route_is_in_the_wire_document(app: App) -> None:
    for path, methods in app.api.openapi()["paths"].items():
        for method in methods:
            assert f"`{method.upper()} {path}`" in WIRE


def test_every_error_code_and_status_is_in_the_wire_document() -> None:
    subclasses = [ApiError]
    for each in subclasses:
        subclasses += each.__subclasses__()
    answered = (
        {(each.status, each.code) for each in subclasses} | set(ROLLOUT_ERRORS.values()) | set(PAYMENT_ERRORS.values())
    )
    for status, code in answered:
        rows = [row for row in WIRE.splitlines() if row.startswith("|") and f"`{code}`" in row]
        assert any(str(status) in row.split("|")[1] for row in rows), (status, code)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_between_pages_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_commands_in_the_readme_are_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make ([\w-]+)", README, re.MULTILINE)) <= targets


def test_the_top_level_is_the_agreed_one() -> None:
    import subprocess

    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {path.split("/")[0] for path in tracked.splitlines()}
    assert {name for name in top if not name.startswith(".")} == {
        "pyproject.toml",
        "Makefile",
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "cluster.yaml",
        "serve_app",
        "deployments",
        "billing",
        "tests",
        "docs",
        "benchmarks",
    }
