"""`dream-admin` beside a running cluster and without one: one writer stays one writer."""

import json
import subprocess
import sys
from pathlib import Path

import dream

from tests.support.cluster import Cluster, environment


def admin(data_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The tool on a data directory on which no cluster runs."""
    return subprocess.run(
        [str(Path(sys.executable).with_name("dream-admin")), *arguments],
        env=environment(data_dir, port=1),
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def test_a_key_minted_beside_a_running_cluster_works_at_once(cluster: Cluster) -> None:
    with dream.Client(api_key=cluster.new_key("beside", "25.00"), base_url=cluster.base_url) as client:
        assert client.billing.balance().balance_mils == 250_000


def test_many_keys_of_one_customer_share_its_balance(cluster: Cluster) -> None:
    keys = [cluster.new_key("two keys", "1"), cluster.new_key("two keys", "0.5")]
    for key in keys:
        with dream.Client(api_key=key, base_url=cluster.base_url) as client:
            assert client.billing.balance().balance_mils == 15_000


def test_a_grant_beside_a_running_cluster_is_one_credit_row(cluster: Cluster) -> None:
    key = cluster.new_key("granted", "1")
    done = cluster.admin("credits", "grant", "--customer", "granted", "--amount", "2.5", "--note", "Thank you")
    assert done.returncode == 0, done.stderr
    with dream.Client(api_key=key, base_url=cluster.base_url) as client:
        newest = client.billing.transactions(limit=1)[0]
        assert (newest.kind, newest.amount_mils, newest.detail) == ("credit", 25_000, "Thank you")
        assert newest.id.startswith("adm_")


def test_the_writer_of_a_running_cluster_is_not_fenced_off_by_the_tool(cluster: Cluster) -> None:
    (before,) = cluster.processes("LedgerActor")
    cluster.new_key("no fencing", "1")
    (after,) = cluster.processes("LedgerActor")
    assert before.pid == after.pid


def test_without_a_cluster_the_tool_is_the_writer(tmp_path: Path) -> None:
    made = json.loads(admin(tmp_path, "keys", "create", "--customer", "a", "--initial-credits", "1", "--json").stdout)
    assert made["balance_usd"] == 1.0
    assert admin(tmp_path, "credits", "grant", "--customer", made["customer_id"], "--amount", "0.0001").returncode == 0
    (listed,) = json.loads(admin(tmp_path, "keys", "list", "--json").stdout)
    assert (listed["balance_usd"], listed["ends_in"], listed["revoked"]) == (1.0001, made["key"][-4:], None)
    assert admin(tmp_path, "keys", "revoke", made["key_id"]).returncode == 0
    assert json.loads(admin(tmp_path, "keys", "list", "--json").stdout)[0]["revoked"] is not None
    assert json.loads(admin(tmp_path, "ledger", "audit", "--json").stdout)["violations"] == []


def test_a_key_is_shown_whole_once_and_never_again(tmp_path: Path) -> None:
    shown = admin(tmp_path, "keys", "create", "--customer", "a").stdout
    (key,) = [word for word in shown.split() if word.startswith("dre_")]
    assert len(key) == 47
    assert key not in admin(tmp_path, "keys", "list").stdout
    assert not any(key.encode() in path.read_bytes() for path in tmp_path.iterdir())


def test_what_cannot_be_done_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    for arguments, problem in (
        (("keys", "revoke", "key_unknown"), "no key key_unknown"),
        (("credits", "grant", "--customer", "nobody", "--amount", "1"), "no customer 'nobody'"),
        (("credits", "grant", "--customer", "nobody", "--amount", "0.00001"), "no customer"),
        (("keys", "create", "--customer", "a", "--initial-credits", "-1"), "too little"),
        (("keys", "create", "--customer", "a", "--initial-credits", "NaN"), "not an amount"),
        (("keys", "create", "--customer", " "), "name"),
    ):
        done = admin(tmp_path, *arguments)
        assert done.returncode == 2, done
        assert problem in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_key_is_limited_and_rotated_without_a_cluster(tmp_path: Path) -> None:
    made = json.loads(admin(tmp_path, "keys", "create", "--customer", "a", "--initial-credits", "1", "--json").stdout)
    limits = ("--label", "planner", "--model", "tiny-pusher", "--daily-budget", "0.5", "--expires-in-days", "30")
    terms = json.loads(admin(tmp_path, "keys", "terms", made["key_id"], *limits, "--json").stdout)
    assert (terms["label"], terms["models"], terms["daily_budget_usd"]) == ("planner", "tiny-pusher", 0.5)
    rotated = json.loads(admin(tmp_path, "keys", "rotate", made["key_id"], "--json").stdout)
    assert rotated["key"] != made["key"]
    old, new = json.loads(admin(tmp_path, "keys", "list", "--json").stdout)
    assert old["revoked"] is not None
    assert (new["revoked"], new["label"], new["ends_in"]) == (None, "planner", rotated["key"][-4:])
