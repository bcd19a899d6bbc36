"""`dream-admin` beside a running cluster: one writer stays one writer."""

import dream

from tests.support.cluster import Cluster


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
