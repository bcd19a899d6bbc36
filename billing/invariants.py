"""What must be true of the ledger at every moment: each audit is one SQL statement that must return no row.

The constraints make most of these impossible to break; the audits do not rely on that. They run in the tests after
every step, and on a live database they read one snapshot and change nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, text

MAX_ROWS_PER_AUDIT = 20
"""A broken ledger can break everywhere; the first rows say where to look."""


@dataclass(frozen=True, slots=True)
class Audit:
    name: str
    claim: str
    sql: str
    """Finds what contradicts the claim."""


@dataclass(frozen=True, slots=True)
class Violation:
    audit: str
    claim: str
    row: Mapping[str, Any]


AUDITS = (
    Audit(
        "conservation",
        "What came in and stayed is what can be spent, plus what open reservations hold, plus what was captured.",
        """
        SELECT credited, spendable, held, captured FROM (SELECT
          (SELECT COALESCE(SUM(amount), 0) FROM entry WHERE kind NOT IN ('debit', 'refund')) AS credited,
          (SELECT COALESCE(SUM(balance_mils), 0) FROM wallet) AS spendable,
          (SELECT COALESCE(SUM(amount), 0) FROM reservation WHERE state = 'open') AS held,
          (SELECT COALESCE(SUM(captured), 0) FROM reservation WHERE state = 'settled') AS captured) AS totals
        WHERE credited <> spendable + held + captured
        """,
    ),
    Audit(
        "prefix_sum",
        "Entries are numbered from 0 without a gap, and each balance is the sum of all amounts up to it.",
        """
        SELECT customer_id, seq, balance_after, expected_seq, expected_balance FROM (
          SELECT customer_id, seq, balance_after, prev_balance, amount,
            ROW_NUMBER() OVER (PARTITION BY customer_id ORDER BY seq) - 1 AS expected_seq,
            SUM(amount) OVER (PARTITION BY customer_id ORDER BY seq) AS expected_balance
          FROM entry) AS chain
        WHERE seq <> expected_seq OR balance_after <> expected_balance OR prev_balance <> expected_balance - amount
        """,
    ),
    Audit(
        "wallet_is_its_tail",
        "A wallet's sequence number and balance are those of its last entry.",
        """
        SELECT wallet.customer_id, wallet.seq, wallet.balance_mils, tail.seq AS tail_seq, tail.balance_after
        FROM wallet LEFT JOIN entry AS tail ON tail.customer_id = wallet.customer_id
          AND tail.seq = (SELECT MAX(seq) FROM entry WHERE entry.customer_id = wallet.customer_id)
        WHERE tail.seq IS NULL OR wallet.seq <> tail.seq OR wallet.balance_mils <> tail.balance_after
        """,
    ),
    Audit(
        "no_negative_balance",
        "No wallet is below its credit limit, and nobody ever spent below the line that was drawn last.",
        """
        SELECT customer_id, NULL AS seq, balance_mils FROM wallet WHERE balance_mils < -credit_limit_mils
        UNION ALL SELECT entry.customer_id, entry.seq, balance_after FROM entry
        WHERE balance_after < 0 AND amount < 0 AND balance_after < COALESCE((SELECT floor_mils FROM credit_line
          WHERE credit_line.customer_id = entry.customer_id AND entry_seq < entry.seq
          ORDER BY credit_line.seq DESC LIMIT 1), 0)
        """,
    ),
    Audit(
        "one_entry_per_id",
        "A request is debited at most once and refunded at most once, and a payment is credited at most once.",
        """
        SELECT kind, public_id, COUNT(*) AS times FROM entry
        WHERE kind IN ('opening', 'debit', 'refund', 'credit') GROUP BY kind, public_id HAVING COUNT(*) > 1
        """,
    ),
    Audit(
        "refund_follows_debit",
        "A refund has an earlier debit of the same request in the same wallet, and is not larger.",
        """
        SELECT refund.customer_id, refund.seq, refund.public_id, refund.amount, debit.seq AS debit_seq,
          debit.amount AS debited
        FROM entry AS refund LEFT JOIN entry AS debit
          ON debit.kind = 'debit' AND debit.public_id = refund.public_id AND debit.customer_id = refund.customer_id
        WHERE refund.kind = 'refund' AND (debit.seq IS NULL OR debit.seq >= refund.seq OR refund.amount > -debit.amount)
        """,
    ),
    Audit(
        "debit_has_reservation",
        "Every debit belongs to a reservation of exactly that amount in that wallet.",
        """
        SELECT debit.customer_id, debit.seq, debit.public_id, debit.amount
        FROM entry AS debit LEFT JOIN reservation ON reservation.request_id = debit.public_id
        WHERE debit.kind = 'debit' AND (reservation.request_id IS NULL
          OR reservation.customer_id <> debit.customer_id OR reservation.amount <> -debit.amount)
        """,
    ),
    Audit(
        "reservation_has_debit",
        "Every reservation was debited, by the entry that it names.",
        """
        SELECT reservation.request_id, reservation.customer_id, reservation.debit_seq
        FROM reservation LEFT JOIN entry AS debit
          ON debit.customer_id = reservation.customer_id AND debit.seq = reservation.debit_seq
          AND debit.kind = 'debit' AND debit.public_id = reservation.request_id
        WHERE debit.seq IS NULL
        """,
    ),
    Audit(
        "settled_arithmetic",
        "Captured and refunded make up what was reserved, at the frozen price, and the refund is a row.",
        """
        SELECT reservation.request_id, state, reservation.amount, captured, refunded, refund.amount AS refund_row
        FROM reservation LEFT JOIN entry AS refund
          ON refund.kind = 'refund' AND refund.public_id = reservation.request_id
          AND refund.customer_id = reservation.customer_id
        WHERE reservation.amount <> ((frames - COALESCE(covered, 0)) * mils_per_frame + per_frames - 1) / per_frames
          OR refunded <> COALESCE(refund.amount, 0)
          OR (state = 'open' AND (captured <> 0 OR refunded <> 0))
          OR (state = 'settled' AND (captured < 0 OR refunded < 0 OR captured + refunded <> reservation.amount
            OR frames_delivered IS NULL OR frames_delivered > frames
            OR captured <> ((CASE WHEN frames_delivered > COALESCE(covered, 0)
              THEN frames_delivered - COALESCE(covered, 0) ELSE 0 END) * mils_per_frame + per_frames - 1) / per_frames))
        """,
    ),
    Audit(
        "no_spending_by_revoked_key",
        "A key debits nothing before it was made and nothing after it was revoked.",
        """
        SELECT reservation.request_id, api_key.key_id, debit_seq, created_seq, revoked_seq
        FROM reservation JOIN api_key ON api_key.key_id = reservation.key_id
        WHERE debit_seq <= created_seq OR debit_seq > revoked_seq OR api_key.customer_id <> reservation.customer_id
        """,
    ),
    Audit(
        "one_request_per_idempotency_key",
        "Of all requests that one customer sent under one key, at most one is open or kept money.",
        """
        SELECT submission.customer_id, idempotency_key, COUNT(*) AS requests
        FROM submission JOIN reservation ON reservation.request_id = submission.request_id
        WHERE idempotency_key <> '' AND (state = 'open' OR frames_delivered > 0)
        GROUP BY submission.customer_id, idempotency_key HAVING COUNT(*) > 1
        """,
    ),
    Audit(
        "submission_is_its_request",
        "What a request is recognised by belongs to its customer, and a key was released only where nothing was kept.",
        """
        SELECT submission.request_id, submission.customer_id, released_at, state, frames_delivered
        FROM submission LEFT JOIN reservation ON reservation.request_id = submission.request_id
        WHERE reservation.request_id IS NULL OR reservation.customer_id <> submission.customer_id
          OR reservation.amount <> submission.amount
          OR (released_at IS NOT NULL AND (state = 'open' OR frames_delivered > 0))
        """,
    ),
    Audit(
        "payment_is_its_credit",
        "Every payment was credited once, by the entry that it names, and not more was taken back than it granted.",
        """
        SELECT payment.source, payment.customer_id, granted, reversed, credit.amount
        FROM payment LEFT JOIN entry AS credit ON credit.customer_id = payment.customer_id
          AND credit.seq = credit_seq AND credit.kind = 'credit' AND credit.public_id = payment.public_id
        WHERE credit.seq IS NULL OR credit.amount <> granted OR reversed < 0 OR reversed > granted
        """,
    ),
    Audit(
        "reversals_add_up",
        "What is reversed of a payment is what all its reversals took from the wallet and left owing.",
        """
        SELECT payment.source, reversed, COALESCE(SUM(taken + owed), 0) AS booked, COUNT(reversal.seq) AS reversals
        FROM payment LEFT JOIN reversal ON reversal.source = payment.source
          AND reversal.customer_id = payment.customer_id
        GROUP BY payment.source, reversed, reversal_seq
        HAVING reversed <> COALESCE(SUM(taken + owed), 0) OR COALESCE(reversal_seq, 0) <> COUNT(reversal.seq)
        """,
    ),
    Audit(
        "reversal_is_an_entry",
        "What reversals took or gave back is what the wallets' entries say, one for one.",
        """
        SELECT reversal.source, reversal.seq, taken, moved.amount FROM reversal LEFT JOIN entry AS moved
          ON moved.customer_id = reversal.customer_id AND moved.seq = entry_seq
          AND moved.kind IN ('reversal', 'reinstatement')
        WHERE taken <> 0 AND (moved.seq IS NULL OR moved.amount <> -taken)
        UNION ALL SELECT public_id, entry.seq, NULL, amount FROM entry
        WHERE kind IN ('reversal', 'reinstatement') AND NOT EXISTS (SELECT 1 FROM reversal
          WHERE reversal.customer_id = entry.customer_id AND entry_seq = entry.seq AND taken = -amount)
        """,
    ),
    Audit(
        "debt_adds_up",
        "A wallet's debt is what its reversals left owing less what was repaid; nothing is spendable beside it.",
        """
        SELECT wallet.customer_id, debt_mils, balance_mils, floor_mils, COALESCE(owing.mils, 0) AS owing,
          COALESCE(repaid.mils, 0) AS repaid
        FROM wallet
        LEFT JOIN (SELECT customer_id, SUM(amount) AS total, MAX(seq) AS seq FROM debt GROUP BY customer_id) AS chain
          ON chain.customer_id = wallet.customer_id
        LEFT JOIN (SELECT customer_id, SUM(owed) AS mils FROM reversal GROUP BY customer_id) AS owing
          ON owing.customer_id = wallet.customer_id
        LEFT JOIN (SELECT customer_id, SUM(amount) AS mils FROM entry WHERE kind = 'repayment' GROUP BY customer_id)
          AS repaid ON repaid.customer_id = wallet.customer_id
        WHERE debt_mils <> COALESCE(chain.total, 0) OR COALESCE(debt_seq, 0) <> COALESCE(chain.seq, 0)
          OR debt_mils <> COALESCE(owing.mils, 0) + COALESCE(repaid.mils, 0)
          OR (debt_mils > 0 AND balance_mils > floor_mils)
        """,
    ),
    Audit(
        "line_is_the_newest",
        "A wallet's credit limit and floor are those of its newest credit line, and lines are numbered without a gap.",
        """
        SELECT wallet.customer_id, credit_limit_mils, wallet.floor_mils, limit_mils, lines.times
        FROM wallet LEFT JOIN (SELECT customer_id, MAX(seq) AS newest, COUNT(*) AS times FROM credit_line
          GROUP BY customer_id) AS lines ON lines.customer_id = wallet.customer_id
        LEFT JOIN credit_line ON credit_line.customer_id = wallet.customer_id AND credit_line.seq = newest
        WHERE credit_limit_mils <> COALESCE(limit_mils, 0) OR wallet.floor_mils <> COALESCE(credit_line.floor_mils, 0)
          OR lines.newest <> lines.times
        """,
    ),
    Audit(
        "teams_have_two_levels",
        "No parent of a team is a member of one.",
        """
        SELECT member.customer_id, member.parent_id, parent.parent_id AS grandparent_id
        FROM membership AS member JOIN membership AS parent ON parent.customer_id = member.parent_id
        """,
    ),
    Audit(
        "transfer_is_two_entries",
        "What moved within a team left one wallet and arrived in the other, between a parent and its member.",
        """
        SELECT transfer_id, transfer.amount, sent.amount AS sent, received.amount AS received FROM transfer
        LEFT JOIN entry AS sent ON sent.customer_id = from_id AND sent.seq = from_seq
          AND sent.kind = 'transfer_out' AND sent.public_id = transfer_id
        LEFT JOIN entry AS received ON received.customer_id = to_id AND received.seq = to_seq
          AND received.kind = 'transfer_in' AND received.public_id = transfer_id
        LEFT JOIN membership ON (membership.customer_id = from_id AND parent_id = to_id)
          OR (membership.customer_id = to_id AND parent_id = from_id)
        WHERE sent.seq IS NULL OR received.seq IS NULL OR sent.amount <> -transfer.amount
          OR received.amount <> transfer.amount OR membership.customer_id IS NULL
        UNION ALL SELECT public_id, amount, NULL, NULL FROM entry
        WHERE kind IN ('transfer_in', 'transfer_out')
          AND NOT EXISTS (SELECT 1 FROM transfer WHERE transfer_id = public_id)
        """,
    ),
    Audit(
        "draw_is_a_transfer",
        "What a capped member's request drew came from its parent, and of what was refunded that much went back.",
        """
        SELECT draw.request_id, drawn, refunded, brought.amount AS brought, returned.amount AS returned
        FROM draw JOIN reservation ON reservation.request_id = draw.request_id
        LEFT JOIN transfer AS brought ON brought.transfer_id = draw.request_id || '.draw'
          AND brought.to_id = draw.customer_id
        LEFT JOIN transfer AS returned ON returned.transfer_id = draw.request_id || '.back'
          AND returned.from_id = draw.customer_id
        WHERE COALESCE(brought.amount, 0) <> drawn OR drawn > reservation.amount
          OR draw.customer_id <> reservation.customer_id
          OR COALESCE(returned.amount, 0) <> CASE WHEN refunded < drawn THEN refunded ELSE drawn END
        """,
    ),
    Audit(
        "statements_tile",
        "A customer's statements follow each other entry by entry, and say what those entries add up to.",
        """
        SELECT chain.customer_id, number, from_seq, to_seq, opening_mils, closing_mils, usage_mils, payments_mils,
          transfers_mils
        FROM (SELECT statement.*,
            LAG(to_seq) OVER (PARTITION BY customer_id ORDER BY number) AS to_seq_before,
            LAG(closing_mils) OVER (PARTITION BY customer_id ORDER BY number) AS closing_before,
            LAG(period) OVER (PARTITION BY customer_id ORDER BY number) AS period_before
          FROM statement) AS chain
        WHERE from_seq <> COALESCE(to_seq_before, 0) OR opening_mils <> COALESCE(closing_before, 0)
          OR period <= period_before
          OR closing_mils <> (SELECT balance_after FROM entry
            WHERE entry.customer_id = chain.customer_id AND seq = to_seq)
          OR usage_mils <> (SELECT COALESCE(SUM(amount), 0) FROM entry
            WHERE entry.customer_id = chain.customer_id AND seq > from_seq AND seq <= to_seq
              AND kind IN ('debit', 'refund', 'fee'))
          OR transfers_mils <> (SELECT COALESCE(SUM(amount), 0) FROM entry
            WHERE entry.customer_id = chain.customer_id AND seq > from_seq AND seq <= to_seq
              AND kind IN ('transfer_in', 'transfer_out'))
          OR closing_mils <> opening_mils + usage_mils + payments_mils + transfers_mils
        """,
    ),
    Audit(
        "prices_follow_each_other",
        "The versions of a price are numbered from 1 without a gap, and take effect in their order.",
        """
        SELECT model, customer_id, version, effective_from, expected_version, effective_before FROM (
          SELECT model, customer_id, version, effective_from,
            ROW_NUMBER() OVER (PARTITION BY model, customer_id ORDER BY version) AS expected_version,
            LAG(effective_from) OVER (PARTITION BY model, customer_id ORDER BY version) AS effective_before
          FROM price) AS history
        WHERE version <> expected_version OR effective_from <= effective_before
        """,
    ),
    Audit(
        "units_are_charged_once",
        "A month of provisioned units was charged by the entry that it names, at the terms in force then.",
        """
        SELECT unit_charge.customer_id, model, period, unit_charge.amount, fee.amount AS charged
        FROM unit_charge LEFT JOIN entry AS fee ON fee.customer_id = unit_charge.customer_id
          AND fee.seq = entry_seq AND fee.kind = 'fee'
        WHERE fee.seq IS NULL OR fee.amount <> -unit_charge.amount
          OR version <> (SELECT MAX(version) FROM provision WHERE provision.customer_id = unit_charge.customer_id
            AND provision.model = unit_charge.model AND from_period <= period)
        UNION ALL SELECT customer_id, '', '', NULL, amount FROM entry WHERE kind = 'fee' AND NOT EXISTS (
          SELECT 1 FROM unit_charge WHERE unit_charge.customer_id = entry.customer_id AND entry_seq = entry.seq)
        """,
    ),
    Audit(
        "units_cover_what_they_allot",
        "What units pay for is what requests say, in a month's chain that never exceeds its allotment.",
        """
        SELECT unit_charge.customer_id, model, period, NULL AS request_id, unit_charge.frames, SUM(use.frames) AS used
        FROM unit_charge JOIN unit_use AS use USING (customer_id, model, period)
        GROUP BY unit_charge.customer_id, model, period, unit_charge.frames
        HAVING SUM(use.frames) NOT BETWEEN 0 AND unit_charge.frames
          OR SUM(use.frames) <> (SELECT used_after FROM unit_use AS last
            WHERE last.customer_id = unit_charge.customer_id AND last.model = unit_charge.model
              AND last.period = unit_charge.period ORDER BY seq DESC LIMIT 1)
        UNION ALL SELECT customer_id, model, '', reservation.request_id, covered, used.frames
        FROM reservation LEFT JOIN (SELECT request_id, SUM(frames) AS frames FROM unit_use GROUP BY request_id) AS used
          ON used.request_id = reservation.request_id
        WHERE COALESCE(used.frames, 0) <> CASE WHEN state = 'settled' AND frames_delivered < COALESCE(covered, 0)
          THEN frames_delivered ELSE COALESCE(covered, 0) END
        """,
    ),
    Audit(
        "history_runs_forward",
        "Along a wallet neither the time nor the writer's epoch decreases, and no epoch is newer than the fence.",
        """
        SELECT customer_id, seq, ts, epoch FROM (
          SELECT customer_id, seq, ts, epoch,
            LAG(ts) OVER (PARTITION BY customer_id ORDER BY seq) AS ts_before,
            LAG(epoch) OVER (PARTITION BY customer_id ORDER BY seq) AS epoch_before
          FROM entry) AS history
        WHERE ts < ts_before OR epoch < epoch_before OR epoch > (SELECT epoch FROM writer_fence)
        """,
    ),
)


def audit(engine: Engine) -> list[Violation]:
    """Run every audit on one snapshot. An empty list is a healthy ledger."""
    if engine.dialect.name == "postgresql":  # SQLite's reading transactions are snapshots already
        engine = engine.execution_options(isolation_level="REPEATABLE READ")
    violations = []
    with engine.connect() as connection:
        for each in AUDITS:
            rows = connection.execute(text(each.sql)).mappings().fetchmany(MAX_ROWS_PER_AUDIT)
            violations += [Violation(each.name, each.claim, dict(row)) for row in rows]
    return violations
