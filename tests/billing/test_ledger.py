"""What each command answers, and what it leaves in the customer's rows."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from billing.commands import (
    ExpireLeases,
    Grant,
    Granted,
    Heartbeat,
    HeartbeatDone,
    InsufficientCredits,
    KeyCreated,
    KeyRefused,
    KeyRevoked,
    LeasesExpired,
    Outcome,
    Rejected,
    Reserved,
    RevokeKey,
    Settle,
    Settled,
    UnknownCustomer,
    UnknownKey,
    UnknownReservation,
)
from billing.keys import initial_grant_id
from billing.money import MAX_MILS, Mils
from tests.billing.conftest import GRACE_S, Desk


def assert_rejected(outcome: Outcome, reason: str) -> None:
    """By the ledger itself: the database's own refusal is the second line."""
    assert isinstance(outcome, Rejected)
    assert reason in outcome.reason


class TestReserve:
    def test_49_frames_debit_exactly_245_mils_before_any_work(self, desk: Desk):
        account = desk.account(1000)
        command = desk.reserve(account, frames=49)
        assert desk.do(command) == Reserved(command.request_id, account.customer_id, Mils(245), Mils(755))
        assert desk.balance(account) == 755
        assert desk.rows(account)[-1] == ("debit", -245, command.request_id)

    def test_a_balance_exactly_equal_to_the_price_is_enough(self, desk: Desk):
        account = desk.account(245)
        assert isinstance(desk.do(desk.reserve(account, frames=49)), Reserved)
        assert desk.balance(account) == 0

    def test_a_balance_one_mil_short_is_refused_and_nothing_is_written(self, desk: Desk):
        account = desk.account(244)
        command = desk.reserve(account, frames=49)
        assert desk.do(command) == InsufficientCredits(Mils(244), Mils(245))
        assert desk.balance(account) == 244
        assert [kind for kind, _, _ in desk.rows(account)] == ["credit"]
        assert desk.reader.reservation(command.request_id) is None

    def test_a_refused_request_may_reserve_under_the_same_id_after_a_grant(self, desk: Desk):
        account = desk.account(244)
        command = desk.reserve(account, frames=49)
        desk.do(command)
        desk.do(Grant(account.customer_id, Mils(1), "adm_one", "one mil"))
        assert isinstance(desk.do(command), Reserved)

    def test_a_retry_of_a_retry_gives_the_same_answer_and_no_second_row(self, desk: Desk):
        account = desk.account(1000)
        command = desk.reserve(account)
        answers = {desk.do(command) for _ in range(3)}
        assert len(answers) == 1
        assert len(desk.rows(account)) == 2

    def test_a_retry_gives_the_same_answer_when_the_balance_is_gone_and_the_key_revoked(self, desk: Desk):
        account = desk.account(245)
        command = desk.reserve(account, frames=49)
        first = desk.do(command)
        desk.do(RevokeKey(account.key.key_id))
        assert desk.do(command) == first

    def test_a_retry_after_settlement_gives_the_first_answer_and_does_not_open_it_again(self, desk: Desk):
        account = desk.account(1000)
        command = desk.reserve(account)
        first = desk.do(command)
        desk.settle(command.request_id, 0, "engine_failed")
        assert desk.do(command) == first
        assert desk.balance(account) == 1000

    @pytest.mark.parametrize("change", [{"frames": 48}, {"mils_per_frame": Mils(6)}, {"key_id": "key_other"}])
    def test_the_same_id_for_other_work_is_rejected(self, desk: Desk, change):
        account = desk.account(1000)
        command = desk.reserve(account)
        desk.do(command)
        assert_rejected(desk.do(replace(command, **change)), "already reserved for other work")
        assert desk.balance(account) == 755

    def test_an_unknown_key_is_refused(self, desk: Desk):
        account = desk.account(1000)
        assert desk.do(replace(desk.reserve(account), key_id="key_unknown")) == KeyRefused()
        assert desk.balance(account) == 1000

    def test_two_keys_of_one_customer_spend_from_one_wallet(self, desk: Desk):
        first = desk.account(300, name="ann")
        second = desk.account(0, name="ann")
        desk.reserved(first, frames=49)
        assert desk.do(desk.reserve(second, frames=49)) == InsufficientCredits(Mils(55), Mils(245))

    def test_50_threads_that_race_for_a_balance_of_20_get_exactly_20(self, desk: Desk):
        account = desk.account(20 * 245)
        commands = [desk.reserve(account, frames=49) for _ in range(50)]
        with ThreadPoolExecutor(50) as pool:
            answers = list(pool.map(desk.do, commands))
        assert sum(isinstance(answer, Reserved) for answer in answers) == 20
        assert sum(isinstance(answer, InsufficientCredits) for answer in answers) == 30
        assert desk.balance(account) == 0
        assert len(desk.rows(account)) == 1 + 20

    def test_1000_reserves_in_one_batch_for_a_balance_of_400_get_exactly_400(self, desk: Desk):
        account = desk.account(400 * 5)
        answers = desk.ledger.apply([desk.reserve(account, frames=1) for _ in range(1000)])
        assert [type(answer) for answer in answers] == [Reserved] * 400 + [InsufficientCredits] * 600
        assert desk.balance(account) == 0

    def test_50_threads_with_one_request_id_debit_once(self, desk: Desk):
        account = desk.account(10_000)
        command = desk.reserve(account)
        with ThreadPoolExecutor(50) as pool:
            answers = set(pool.map(desk.do, [command] * 50))
        assert len(answers) == 1
        assert desk.balance(account) == 10_000 - 245


class TestSettle:
    def test_full_delivery_keeps_everything_and_writes_no_row(self, desk: Desk):
        account = desk.account(1000)
        request_id = desk.reserved(account, frames=49)
        assert desk.settle(request_id, 49) == Settled(request_id, Mils(245), Mils(0), Mils(755))
        assert [kind for kind, _, _ in desk.rows(account)] == ["credit", "debit"]

    def test_no_delivery_gives_everything_back_under_the_same_id_and_names_the_reason(self, desk: Desk):
        account = desk.account(1000)
        request_id = desk.reserved(account, frames=49)
        assert desk.settle(request_id, 0, "engine_failed") == Settled(request_id, Mils(0), Mils(245), Mils(1000))
        assert desk.rows(account)[-2:] == [("debit", -245, request_id), ("refund", 245, request_id)]
        refund = desk.reader.transactions(account.customer_id, 1)[0]
        assert refund.detail == "refund · 49 of 49 frames not delivered · engine_failed"

    def test_partial_delivery_keeps_the_price_of_what_was_delivered(self, desk: Desk):
        account = desk.account(1000)
        request_id = desk.reserved(account, frames=49)
        assert desk.settle(request_id, 13, "replica_lost") == Settled(request_id, Mils(65), Mils(180), Mils(935))
        record = desk.reader.reservation(request_id)
        assert record is not None
        assert (record.state, record.captured_mils, record.refunded_mils, record.reason) == (
            "settled",
            65,
            180,
            "replica_lost",
        )

    @pytest.mark.parametrize("delivered", [1, 48])
    def test_one_frame_more_or_less_than_nothing_or_all_is_partial(self, desk: Desk, delivered):
        account = desk.account(245)
        request_id = desk.reserved(account, frames=49)
        desk.settle(request_id, delivered)
        assert desk.balance(account) == 245 - 5 * delivered

    @pytest.mark.parametrize("delivered", [(), (0,), (0, 2, 5), (0, 1, 2, 3, 4, 5)])
    def test_a_batch_of_candidates_pays_for_those_that_were_delivered(self, desk: Desk, delivered: tuple[int, ...]):
        lengths = (49, 49, 25, 13, 49, 2)
        account = desk.account(10_000)
        request_id = desk.reserved(account, frames=sum(lengths))
        frames = sum(lengths[candidate] for candidate in delivered)
        captured, missing = Mils(5 * frames), sum(lengths) - frames
        settled = Settled(request_id, captured, Mils(5 * missing), Mils(10_000 - captured))
        assert desk.settle(request_id, frames, "engine failed") == settled
        newest = desk.reader.transactions(account.customer_id, 1)[0]
        if missing:
            assert newest.detail == f"refund · {missing} of 187 frames not delivered · engine failed"
        else:
            assert newest.kind == "debit"
        assert desk.settle(request_id, sum(lengths)) == settled

    def test_the_first_settlement_is_final_and_every_later_one_is_answered_with_it(self, desk: Desk):
        account = desk.account(1000)
        request_id = desk.reserved(account, frames=49)
        first = desk.settle(request_id, 12, "engine_failed")
        rows = desk.rows(account)
        assert desk.settle(request_id, 12, "engine_failed") == first
        assert desk.settle(request_id, 49) == first
        assert desk.settle(request_id, 0, "lost") == first
        assert desk.rows(account) == rows

    def test_a_settlement_answers_the_balance_of_its_own_moment(self, desk: Desk):
        account = desk.account(1000)
        kept, returned = desk.reserved(account, frames=1), desk.reserved(account, frames=1)
        first_kept, first_returned = desk.settle(kept, 1), desk.settle(returned, 0)
        desk.do(Grant(account.customer_id, Mils(7), "adm_later", ""))
        assert desk.settle(kept, 1) == first_kept
        assert desk.settle(returned, 0) == first_returned

    def test_an_unknown_request_is_answered_so(self, desk: Desk):
        assert desk.settle("req_never", 1) == UnknownReservation("req_never")

    def test_delivering_more_frames_than_reserved_is_rejected_and_leaves_it_open(self, desk: Desk):
        account = desk.account(1000)
        request_id = desk.reserved(account, frames=49)
        assert_rejected(desk.settle(request_id, 50), "reserved 49 frames; 50 were delivered")
        assert desk.settle(request_id, 49) == Settled(request_id, Mils(245), Mils(0), Mils(755))

    def test_the_rate_is_the_one_that_was_reserved(self, desk: Desk):
        account = desk.account(1000)
        command = replace(desk.reserve(account, frames=10), mils_per_frame=Mils(7))
        desk.do(command)
        assert desk.settle(command.request_id, 4) == Settled(command.request_id, Mils(28), Mils(42), Mils(972))

    def test_an_unprintable_or_endless_reason_does_not_stop_the_refund(self, desk: Desk):
        account = desk.account(1000)
        request_id = desk.reserved(account, frames=49)
        desk.settle(request_id, 0, "broken\x00pipe\n\ud800" + "!" * 10_000)
        assert desk.balance(account) == 1000
        detail = desk.reader.transactions(account.customer_id, 1)[0].detail
        assert "broken\ufffdpipe\ufffd\ufffd!" in detail
        assert len(detail) < 400

    def test_50_threads_that_settle_differently_agree_on_one_settlement(self, desk: Desk):
        account = desk.account(1000)
        request_id = desk.reserved(account, frames=49)
        with ThreadPoolExecutor(50) as pool:
            answers = set(pool.map(lambda frames: desk.settle(request_id, frames), range(50)))
        assert len(answers) == 1
        assert [kind for kind, _, _ in desk.rows(account)].count("refund") <= 1


class TestLeases:
    def test_a_lease_that_has_run_out_is_refunded_in_full(self, desk: Desk):
        account = desk.account(1000)
        request_id = desk.reserved(account, lease_s=60)
        desk.clock.advance(60)
        assert desk.do(ExpireLeases()) == LeasesExpired((request_id,))
        assert desk.rows(account)[-1] == ("refund", 245, request_id)
        assert "lease expired" in desk.reader.transactions(account.customer_id, 1)[0].detail

    def test_a_lease_with_a_moment_left_is_not(self, desk: Desk):
        account = desk.account(1000)
        desk.reserved(account, lease_s=60)
        desk.clock.advance(59.9)
        assert desk.do(ExpireLeases()) == LeasesExpired(())
        assert desk.balance(account) == 755

    def test_a_second_sweep_finds_nothing(self, desk: Desk):
        account = desk.account(1000)
        desk.reserved(account, lease_s=60)
        desk.clock.advance(61)
        desk.do(ExpireLeases())
        assert desk.do(ExpireLeases()) == LeasesExpired(())
        assert desk.balance(account) == 1000

    def test_settled_work_is_not_refunded_by_the_sweep(self, desk: Desk):
        account = desk.account(1000)
        desk.settle(desk.reserved(account, lease_s=60), 49)
        desk.clock.advance(1_000)
        assert desk.do(ExpireLeases()) == LeasesExpired(())
        assert desk.balance(account) == 755

    def test_work_that_finishes_after_its_refund_is_delivered_free(self, desk: Desk):
        account = desk.account(1000)
        request_id = desk.reserved(account, lease_s=60)
        desk.clock.advance(61)
        desk.do(ExpireLeases())
        assert desk.settle(request_id, 49) == Settled(request_id, Mils(0), Mils(245), Mils(1000))
        assert desk.balance(account) == 1000

    def test_late_work_that_is_not_yet_swept_is_still_paid(self, desk: Desk):
        account = desk.account(1000)
        request_id = desk.reserved(account, lease_s=60)
        desk.clock.advance(61)
        assert desk.settle(request_id, 49) == Settled(request_id, Mils(245), Mils(0), Mils(755))

    def test_a_heartbeat_renews_open_leases_and_counts_them(self, desk: Desk):
        account = desk.account(10_000)
        open_id, settled_id = desk.reserved(account, lease_s=60), desk.reserved(account, lease_s=60)
        desk.settle(settled_id, 49)
        desk.clock.advance(59)
        heartbeat = Heartbeat((open_id, settled_id, "req_never", open_id), lease_s=60)
        assert desk.do(heartbeat) == HeartbeatDone(renewed=1)
        desk.clock.advance(59)
        assert desk.do(ExpireLeases()) == LeasesExpired(())
        desk.clock.advance(1)
        assert desk.do(ExpireLeases()) == LeasesExpired((open_id,))

    def test_a_heartbeat_never_shortens_a_lease(self, desk: Desk):
        account = desk.account(1000)
        request_id = desk.reserved(account, lease_s=600)
        desk.do(Heartbeat((request_id,), lease_s=1))
        desk.clock.advance(599)
        assert desk.do(ExpireLeases()) == LeasesExpired(())

    def test_a_heartbeat_in_the_same_batch_as_the_sweep_saves_the_work_if_it_came_first(self, desk: Desk):
        account = desk.account(10_000)
        first, second = desk.reserved(account, lease_s=60), desk.reserved(account, lease_s=60)
        desk.clock.advance(60)
        answers = desk.ledger.apply([Heartbeat((first,), 60), ExpireLeases(), Heartbeat((second,), 60)])
        assert answers == [HeartbeatDone(1), LeasesExpired((second,)), HeartbeatDone(0)]

    def test_a_thousand_heartbeats_are_one_command(self, desk: Desk):
        account = desk.account(1200 * 5)
        commands = [desk.reserve(account, frames=1) for _ in range(1200)]
        desk.ledger.apply(commands)
        ids = tuple(command.request_id for command in commands)
        assert desk.do(Heartbeat(ids, 60)) == HeartbeatDone(1200)
        desk.clock.advance(60)
        expired = desk.do(ExpireLeases())
        assert isinstance(expired, LeasesExpired)
        assert set(expired.request_ids) == set(ids)
        assert desk.balance(account) == 6000

    def test_take_over_gives_running_work_time_to_send_a_heartbeat(self, desk: Desk):
        account = desk.account(1000)
        request_id = desk.reserved(account, lease_s=60)
        desk.clock.advance(3600)  # nobody wrote for an hour
        desk.ledger = desk.new_ledger()
        assert desk.do(ExpireLeases()) == LeasesExpired(())
        desk.clock.advance(GRACE_S)
        assert desk.do(ExpireLeases()) == LeasesExpired((request_id,))

    def test_take_over_does_not_shorten_a_longer_lease(self, desk: Desk):
        account = desk.account(1000)
        desk.reserved(account, lease_s=600)
        desk.ledger = desk.new_ledger()
        desk.clock.advance(599)
        assert desk.do(ExpireLeases()) == LeasesExpired(())


class TestGrant:
    def test_a_grant_credits_under_its_own_id(self, desk: Desk):
        account = desk.account()
        grant = Grant(account.customer_id, Mils(250_000), "adm_1", "Welcome · $25.00")
        assert desk.do(grant) == Granted("adm_1", Mils(250_000), Mils(250_000))
        assert desk.rows(account) == [("credit", 250_000, "adm_1")]

    def test_the_same_grant_again_credits_nothing(self, desk: Desk):
        account = desk.account(100)
        grant = Grant(account.customer_id, Mils(50), "adm_1", "")
        first = desk.do(grant)
        desk.reserved(account, frames=1)
        assert desk.do(grant) == first
        assert desk.balance(account) == 145

    @pytest.mark.parametrize("change", [{"amount_mils": Mils(51)}, {"customer_id": "cus_other"}])
    def test_the_same_id_for_another_grant_is_rejected(self, desk: Desk, change):
        account = desk.account()
        grant = Grant(account.customer_id, Mils(50), "adm_1", "")
        desk.do(grant)
        assert_rejected(desk.do(replace(grant, **change)), "has already credited 50 mils")
        assert desk.balance(account) == 50

    def test_an_unknown_customer_is_answered_so(self, desk: Desk):
        assert desk.do(Grant("cus_never", Mils(1), "adm_1", "")) == UnknownCustomer("cus_never")

    def test_a_balance_may_reach_the_largest_exact_amount_but_not_exceed_it(self, desk: Desk):
        account = desk.account(1)
        assert_rejected(desk.do(Grant(account.customer_id, Mils(MAX_MILS), "adm_1", "")), "would exceed")
        granted = desk.do(Grant(account.customer_id, Mils(MAX_MILS - 1), "adm_2", ""))
        assert granted == Granted("adm_2", Mils(MAX_MILS - 1), MAX_MILS)

    def test_work_reserved_from_a_full_wallet_can_be_refunded_after_another_grant(self, desk: Desk):
        account = desk.account(MAX_MILS)
        request_id = desk.reserved(account, frames=49)
        desk.do(Grant(account.customer_id, Mils(245), "adm_1", ""))
        desk.settle(request_id, 0)
        assert desk.balance(account) == MAX_MILS + 245


class TestCreateKey:
    def test_a_new_name_makes_a_customer_with_its_credits_in_the_same_commit(self, desk: Desk):
        command, _ = desk.key("ann", 250_000)
        assert desk.do(command) == KeyCreated(command.key_id, command.customer_id, Mils(250_000))
        [row] = desk.reader.transactions(command.customer_id, 10)
        assert (row.seq, row.kind, row.amount_mils) == (1, "credit", 250_000)
        assert row.public_id == initial_grant_id(command.key_id)
        assert row.detail == "Initial credits · $25.00"

    def test_without_credits_the_transaction_list_is_empty(self, desk: Desk):
        account = desk.account(0)
        assert desk.rows(account) == []
        assert desk.balance(account) == 0

    def test_a_known_name_shares_its_wallet_and_adds_the_credits(self, desk: Desk):
        first = desk.account(100, name="ann")
        second, _ = desk.key("ann", 50)
        assert desk.do(second) == KeyCreated(second.key_id, first.customer_id, Mils(150))
        assert second.customer_id != first.customer_id

    def test_the_same_command_again_makes_nothing_and_credits_nothing(self, desk: Desk):
        command, _ = desk.key("ann", 100)
        first = desk.do(command)
        desk.do(Grant(command.customer_id, Mils(1), "adm_1", ""))
        assert desk.do(command) == first
        assert desk.reader.balance(command.customer_id) == 101
        assert len(desk.reader.keys()) == 1

    def test_a_key_id_for_another_key_is_rejected(self, desk: Desk):
        command, _ = desk.key("ann", 100)
        desk.do(command)
        other, _ = desk.key("ann", 100)
        assert_rejected(desk.do(replace(other, key_id=command.key_id)), "already another key")
        assert_rejected(desk.do(replace(command, customer_name="bob")), "already another key")

    def test_a_token_cannot_have_two_keys(self, desk: Desk):
        command, _ = desk.key("ann", 100)
        desk.do(command)
        other, _ = desk.key("bob", 100)
        assert_rejected(desk.do(replace(other, sha256=command.sha256)), "already has a key")
        assert desk.reader.customer("bob") is None

    def test_a_customer_id_cannot_be_two_customers(self, desk: Desk):
        command, _ = desk.key("ann", 100)
        desk.do(command)
        other, _ = desk.key("bob", 100)
        assert_rejected(desk.do(replace(other, customer_id=command.customer_id)), "already another customer")

    def test_initial_credits_whose_id_was_granted_otherwise_are_rejected(self, desk: Desk):
        account = desk.account()
        command, _ = desk.key("ann", 100)
        desk.do(Grant(account.customer_id, Mils(100), initial_grant_id(command.key_id), ""))
        assert_rejected(desk.do(command), "already credited something else")
        assert desk.reader.customer("ann") is None


class TestRevokeKey:
    def test_a_revoked_key_reserves_nothing_more(self, desk: Desk):
        account = desk.account(1000)
        desk.clock.advance(5)
        assert desk.do(RevokeKey(account.key.key_id)) == KeyRevoked(account.key.key_id, desk.clock.now)
        assert desk.do(desk.reserve(account)) == KeyRefused()

    def test_work_reserved_before_the_revocation_settles(self, desk: Desk):
        account = desk.account(1000)
        request_id = desk.reserved(account)
        desk.do(RevokeKey(account.key.key_id))
        assert desk.settle(request_id, 12) == Settled(request_id, Mils(60), Mils(185), Mils(940))

    def test_revoking_again_answers_the_first_time(self, desk: Desk):
        account = desk.account()
        first = desk.do(RevokeKey(account.key.key_id))
        desk.clock.advance(5)
        assert desk.do(RevokeKey(account.key.key_id)) == first

    def test_the_customers_other_key_keeps_working(self, desk: Desk):
        first, second = desk.account(1000, name="ann"), desk.account(0, name="ann")
        desk.do(RevokeKey(first.key.key_id))
        assert isinstance(desk.do(desk.reserve(second)), Reserved)

    def test_in_one_batch_only_what_came_before_the_revocation_is_reserved(self, desk: Desk):
        account = desk.account(1000)
        before, after = desk.reserve(account), desk.reserve(account)
        answers = desk.ledger.apply([before, RevokeKey(account.key.key_id), after])
        assert [type(answer) for answer in answers] == [Reserved, KeyRevoked, KeyRefused]

    def test_an_unknown_key_is_answered_so(self, desk: Desk):
        assert desk.do(RevokeKey("key_never")) == UnknownKey("key_never")


class TestTime:
    def test_entries_carry_the_clock(self, desk: Desk):
        account = desk.account(1000)
        desk.clock.advance(5)
        desk.reserved(account)
        newest, oldest = desk.reader.transactions(account.customer_id, 2)
        assert newest.ts - oldest.ts == 5

    def test_a_clock_that_steps_back_does_not_put_a_refund_before_its_debit(self, desk: Desk):
        account = desk.account(1000)
        request_id = desk.reserved(account)
        desk.clock.advance(-3600)
        desk.settle(request_id, 0)
        refund, debit, _ = desk.reader.transactions(account.customer_id, 3)
        assert refund.ts >= debit.ts

    def test_nor_across_a_take_over(self, desk: Desk):
        account = desk.account(1000)
        request_id = desk.reserved(account)
        desk.clock.advance(-3600)
        desk.ledger = desk.new_ledger()
        desk.settle(request_id, 0)
        refund, debit, _ = desk.reader.transactions(account.customer_id, 3)
        assert refund.ts >= debit.ts


class TestMalformedCommands:
    def test_a_bad_command_is_rejected_and_its_neighbours_are_served(self, desk: Desk):
        account = desk.account(1000)
        good = [desk.reserve(account, frames=1) for _ in range(7)]
        bad = replace(desk.reserve(account), frames=1.5)
        answers = desk.ledger.apply([*good[:4], bad, *good[4:]])
        assert [type(answer) for answer in answers] == [Reserved] * 4 + [Rejected] + [Reserved] * 3

    def test_ids_that_no_database_could_look_up_are_rejected_before_any_is(self, desk: Desk):
        account = desk.account(1000)
        good = desk.reserve(account, frames=1)
        wrong_ids = [None, 7, ["req"], "nul\x00", "\ud800", ""]
        bad = [replace(good, request_id=wrong) for wrong in wrong_ids]
        bad += [replace(good, key_id=wrong) for wrong in wrong_ids]
        bad += [Heartbeat(wrong, 60) for wrong in wrong_ids] + [Settle(wrong, 1, "") for wrong in wrong_ids]
        answers = desk.ledger.apply([*bad, good, "not a command"])
        assert [type(answer) for answer in answers] == [Rejected] * len(bad) + [Reserved, Rejected]

    @pytest.mark.parametrize("amount", [245.0, 0.5, True, "245", None, -1, 0, MAX_MILS + 1, float("nan")])
    def test_anything_but_a_positive_whole_number_of_mils_is_rejected(self, desk: Desk, amount):
        account = desk.account(1000)
        assert isinstance(desk.do(Grant(account.customer_id, amount, "adm_1", "")), Rejected)
        assert isinstance(desk.do(replace(desk.reserve(account), mils_per_frame=amount)), Rejected)
        assert desk.balance(account) == 1000

    def test_settling_with_frames_that_cannot_be_counted_is_rejected(self, desk: Desk):
        account = desk.account(1000)
        request_id = desk.reserved(account)
        for frames in (-1, 48.5, True):
            assert isinstance(desk.do(Settle(request_id, frames, "")), Rejected)
        assert desk.balance(account) == 755
