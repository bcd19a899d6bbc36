"""The rules that no constraint can say: what is written stays written, and only the newest writer writes.

Each is one trigger that refuses rows; none of them changes data. SQLite and PostgreSQL spell them differently. Like
`billing.tables` this is the declaration; `billing.migrations` makes them, and a test holds the two equal.
"""

SQLITE = (
    """
CREATE TRIGGER tr_entry_epoch BEFORE INSERT ON entry
WHEN NEW.epoch IS NOT (SELECT epoch FROM writer_fence)
BEGIN SELECT RAISE(ABORT, 'tr_entry_epoch: this writer is fenced'); END
""",
    """
CREATE TRIGGER tr_entry_refund BEFORE INSERT ON entry
WHEN NEW.kind = 'refund' AND NOT EXISTS (
  SELECT 1 FROM entry AS debit JOIN reservation ON reservation.request_id = debit.public_id
  WHERE debit.kind = 'debit' AND debit.public_id = NEW.public_id AND debit.customer_id = NEW.customer_id
    AND debit.seq < NEW.seq AND reservation.state = 'settled' AND reservation.refunded = NEW.amount)
BEGIN SELECT RAISE(ABORT, 'tr_entry_refund: no earlier debit, or not what its settlement gives back'); END
""",
    """
CREATE TRIGGER tr_entry_update BEFORE UPDATE ON entry
BEGIN SELECT RAISE(ABORT, 'tr_entry_update: entries are never edited'); END
""",
    """
CREATE TRIGGER tr_entry_delete BEFORE DELETE ON entry
BEGIN SELECT RAISE(ABORT, 'tr_entry_delete: entries are never deleted'); END
""",
    """
CREATE TRIGGER tr_wallet_update BEFORE UPDATE ON wallet
WHEN NEW.customer_id <> OLD.customer_id OR NEW.seq < OLD.seq
BEGIN SELECT RAISE(ABORT, 'tr_wallet_update: a wallet never goes back'); END
""",
    """
CREATE TRIGGER tr_reservation_update BEFORE UPDATE ON reservation
WHEN OLD.state = 'settled' OR NEW.request_id <> OLD.request_id OR NEW.customer_id <> OLD.customer_id
  OR NEW.key_id <> OLD.key_id OR NEW.frames <> OLD.frames OR NEW.mils_per_frame <> OLD.mils_per_frame
  OR NEW.amount <> OLD.amount OR NEW.debit_seq <> OLD.debit_seq OR NEW.created_at <> OLD.created_at
  OR NEW.model <> OLD.model OR NEW.per_frames <> OLD.per_frames OR NEW.covered IS NOT OLD.covered
BEGIN SELECT RAISE(ABORT, 'tr_reservation_update: a reservation settles once and its terms never change'); END
""",
    """
CREATE TRIGGER tr_reservation_delete BEFORE DELETE ON reservation
BEGIN SELECT RAISE(ABORT, 'tr_reservation_delete: reservations are never deleted'); END
""",
    """
CREATE TRIGGER tr_api_key_update BEFORE UPDATE ON api_key
WHEN OLD.revoked_at IS NOT NULL OR NEW.key_id <> OLD.key_id OR NEW.sha256 <> OLD.sha256
  OR NEW.customer_id <> OLD.customer_id OR NEW.created_seq <> OLD.created_seq
BEGIN SELECT RAISE(ABORT, 'tr_api_key_update: a key is revoked once and never becomes another'); END
""",
    """
CREATE TRIGGER tr_api_key_delete BEFORE DELETE ON api_key
BEGIN SELECT RAISE(ABORT, 'tr_api_key_delete: keys are revoked, never deleted'); END
""",
    """
CREATE TRIGGER tr_writer_fence_update BEFORE UPDATE ON writer_fence
WHEN NEW.epoch <= OLD.epoch
BEGIN SELECT RAISE(ABORT, 'tr_writer_fence_update: the epoch only grows'); END
""",
    """
CREATE TRIGGER tr_writer_fence_delete BEFORE DELETE ON writer_fence
BEGIN SELECT RAISE(ABORT, 'tr_writer_fence_delete: the fence stays'); END
""",
    """
CREATE TRIGGER tr_submission_update BEFORE UPDATE ON submission
WHEN OLD.released_at IS NOT NULL OR NEW.released_at IS NULL OR NEW.request_id <> OLD.request_id
  OR NEW.customer_id <> OLD.customer_id OR NEW.amount <> OLD.amount OR NEW.idempotency_key <> OLD.idempotency_key
  OR NEW.payload_sha256 <> OLD.payload_sha256 OR NEW.created_at <> OLD.created_at
  OR NOT EXISTS (SELECT 1 FROM reservation
    WHERE request_id = OLD.request_id AND state = 'settled' AND frames_delivered = 0)
BEGIN SELECT RAISE(ABORT, 'tr_submission_update: a key is released once, by a request that kept nothing'); END
""",
    """
CREATE TRIGGER tr_submission_delete BEFORE DELETE ON submission
WHEN EXISTS (SELECT 1 FROM reservation WHERE request_id = OLD.request_id AND state = 'open')
BEGIN SELECT RAISE(ABORT, 'tr_submission_delete: a request is not forgotten while it is open'); END
""",
    """
CREATE TRIGGER tr_key_terms_update BEFORE UPDATE ON key_terms
WHEN NEW.key_id <> OLD.key_id OR NEW.budget_id <> OLD.budget_id
BEGIN SELECT RAISE(ABORT, 'tr_key_terms_update: a key keeps what it has spent'); END
""",
    """
CREATE TRIGGER tr_budget_use_update BEFORE UPDATE ON budget_use
BEGIN SELECT RAISE(ABORT, 'tr_budget_use_update: what was spent is never edited'); END
""",
    """
CREATE TRIGGER tr_budget_use_delete BEFORE DELETE ON budget_use
BEGIN SELECT RAISE(ABORT, 'tr_budget_use_delete: what was spent is never forgotten'); END
""",
    """
CREATE TRIGGER tr_quote_update BEFORE UPDATE ON quote
BEGIN SELECT RAISE(ABORT, 'tr_quote_update: a quote stands as it was given'); END
""",
    """
CREATE TRIGGER tr_quote_delete BEFORE DELETE ON quote
BEGIN SELECT RAISE(ABORT, 'tr_quote_delete: a quote stands as it was given'); END
""",
    """
CREATE TRIGGER tr_budget_event_update BEFORE UPDATE ON budget_event
BEGIN SELECT RAISE(ABORT, 'tr_budget_event_update: a warning stands as it was given'); END
""",
    """
CREATE TRIGGER tr_budget_event_delete BEFORE DELETE ON budget_event
BEGIN SELECT RAISE(ABORT, 'tr_budget_event_delete: a warning stands as it was given'); END
""",
    """
CREATE TRIGGER tr_entry_floor BEFORE INSERT ON entry
WHEN NEW.balance_after < 0 AND NEW.amount < 0
  AND NEW.balance_after < (SELECT floor_mils FROM wallet WHERE customer_id = NEW.customer_id)
BEGIN SELECT RAISE(ABORT, 'tr_entry_floor: nothing is spent below the floor'); END
""",
    """
CREATE TRIGGER tr_entry_reversal BEFORE INSERT ON entry
WHEN NEW.kind IN ('reversal', 'reinstatement') AND NOT EXISTS (SELECT 1 FROM reversal
  WHERE customer_id = NEW.customer_id AND entry_seq = NEW.seq AND taken = -NEW.amount)
BEGIN SELECT RAISE(ABORT, 'tr_entry_reversal: no payment is taken back by this'); END
""",
    """
CREATE TRIGGER tr_entry_repayment BEFORE INSERT ON entry
WHEN NEW.kind = 'repayment' AND NOT EXISTS (SELECT 1 FROM debt
  WHERE customer_id = NEW.customer_id AND entry_seq = NEW.seq AND kind = 'repayment' AND amount = NEW.amount)
BEGIN SELECT RAISE(ABORT, 'tr_entry_repayment: no debt is repaid by this'); END
""",
    """
CREATE TRIGGER tr_payment_insert BEFORE INSERT ON payment
WHEN NOT EXISTS (SELECT 1 FROM entry WHERE customer_id = NEW.customer_id AND seq = NEW.credit_seq AND kind = 'credit'
  AND public_id = NEW.public_id AND amount = NEW.granted)
BEGIN SELECT RAISE(ABORT, 'tr_payment_insert: a payment is its credit'); END
""",
    """
CREATE TRIGGER tr_payment_update BEFORE UPDATE ON payment
WHEN NEW.source <> OLD.source OR NEW.public_id <> OLD.public_id OR NEW.customer_id <> OLD.customer_id
  OR NEW.granted <> OLD.granted OR NEW.credit_seq <> OLD.credit_seq OR NEW.created_at <> OLD.created_at
  OR NEW.reversal_seq IS NULL OR NEW.reversal_seq <= COALESCE(OLD.reversal_seq, 0)
BEGIN SELECT RAISE(ABORT, 'tr_payment_update: of a payment only what was taken back changes, by a reversal'); END
""",
    """
CREATE TRIGGER tr_payment_delete BEFORE DELETE ON payment
BEGIN SELECT RAISE(ABORT, 'tr_payment_delete: payments are never deleted'); END
""",
    """
CREATE TRIGGER tr_reversal_update BEFORE UPDATE ON reversal
BEGIN SELECT RAISE(ABORT, 'tr_reversal_update: reversals are never edited'); END
""",
    """
CREATE TRIGGER tr_reversal_delete BEFORE DELETE ON reversal
BEGIN SELECT RAISE(ABORT, 'tr_reversal_delete: reversals are never deleted'); END
""",
    """
CREATE TRIGGER tr_debt_insert BEFORE INSERT ON debt
WHEN NEW.kind = 'shortage' AND NOT EXISTS (SELECT 1 FROM reversal
  WHERE customer_id = NEW.customer_id AND entry_seq = NEW.entry_seq AND owed = NEW.amount)
BEGIN SELECT RAISE(ABORT, 'tr_debt_insert: nothing is owed but what a reversal could not take'); END
""",
    """
CREATE TRIGGER tr_debt_update BEFORE UPDATE ON debt
BEGIN SELECT RAISE(ABORT, 'tr_debt_update: debts are never edited'); END
""",
    """
CREATE TRIGGER tr_debt_delete BEFORE DELETE ON debt
BEGIN SELECT RAISE(ABORT, 'tr_debt_delete: debts are never deleted'); END
""",
    """
CREATE TRIGGER tr_payment_event_update BEFORE UPDATE ON payment_event
BEGIN SELECT RAISE(ABORT, 'tr_payment_event_update: what was taken into account stays so'); END
""",
    """
CREATE TRIGGER tr_payment_event_delete BEFORE DELETE ON payment_event
BEGIN SELECT RAISE(ABORT, 'tr_payment_event_delete: what was taken into account stays so'); END
""",
    """
CREATE TRIGGER tr_price_update BEFORE UPDATE ON price
BEGIN SELECT RAISE(ABORT, 'tr_price_update: another price is another version'); END
""",
    """
CREATE TRIGGER tr_price_delete BEFORE DELETE ON price
BEGIN SELECT RAISE(ABORT, 'tr_price_delete: prices are never deleted'); END
""",
    """
CREATE TRIGGER tr_rollout_job_update BEFORE UPDATE ON rollout_job
WHEN OLD.finished_at IS NOT NULL OR NEW.request_id <> OLD.request_id OR NEW.customer_id <> OLD.customer_id
  OR NEW.amount <> OLD.amount OR NEW.frames <> OLD.frames
BEGIN SELECT RAISE(ABORT, 'tr_rollout_job_update: a job ends once and never becomes another'); END
""",
    """
CREATE TRIGGER tr_entry_transfer BEFORE INSERT ON entry
WHEN NEW.kind IN ('transfer_out', 'transfer_in') AND NOT EXISTS (SELECT 1 FROM transfer
  WHERE transfer_id = NEW.public_id AND amount = ABS(NEW.amount)
    AND ((NEW.kind = 'transfer_out' AND from_id = NEW.customer_id AND from_seq = NEW.seq)
      OR (NEW.kind = 'transfer_in' AND to_id = NEW.customer_id AND to_seq = NEW.seq)))
BEGIN SELECT RAISE(ABORT, 'tr_entry_transfer: nothing was transferred by this'); END
""",
    """
CREATE TRIGGER tr_wallet_insert BEFORE INSERT ON wallet
WHEN NEW.credit_limit_mils <> 0 OR NEW.floor_mils <> 0
BEGIN SELECT RAISE(ABORT, 'tr_wallet_insert: a wallet begins prepaid'); END
""",
    """
CREATE TRIGGER tr_wallet_line BEFORE UPDATE ON wallet
WHEN (NEW.credit_limit_mils <> OLD.credit_limit_mils OR NEW.floor_mils <> OLD.floor_mils) AND NOT EXISTS (
  SELECT 1 FROM credit_line WHERE customer_id = NEW.customer_id AND limit_mils = NEW.credit_limit_mils
    AND floor_mils = NEW.floor_mils
    AND seq = (SELECT MAX(seq) FROM credit_line WHERE customer_id = NEW.customer_id))
BEGIN SELECT RAISE(ABORT, 'tr_wallet_line: the newest credit line says otherwise'); END
""",
    """
CREATE TRIGGER tr_membership_insert BEFORE INSERT ON membership
WHEN EXISTS (SELECT 1 FROM membership WHERE customer_id = NEW.parent_id OR parent_id = NEW.customer_id)
BEGIN SELECT RAISE(ABORT, 'tr_membership_insert: teams have two levels'); END
""",
    """
CREATE TRIGGER tr_membership_update BEFORE UPDATE ON membership
WHEN NEW.customer_id <> OLD.customer_id OR NEW.parent_id <> OLD.parent_id
BEGIN SELECT RAISE(ABORT, 'tr_membership_update: a member stays with its team'); END
""",
    """
CREATE TRIGGER tr_transfer_insert BEFORE INSERT ON transfer
WHEN NOT EXISTS (SELECT 1 FROM membership WHERE (customer_id = NEW.from_id AND parent_id = NEW.to_id)
  OR (customer_id = NEW.to_id AND parent_id = NEW.from_id))
BEGIN SELECT RAISE(ABORT, 'tr_transfer_insert: money moves within a team only'); END
""",
    """
CREATE TRIGGER tr_credit_line_update BEFORE UPDATE ON credit_line
BEGIN SELECT RAISE(ABORT, 'tr_credit_line_update: another limit is another line'); END
""",
    """
CREATE TRIGGER tr_credit_line_delete BEFORE DELETE ON credit_line
BEGIN SELECT RAISE(ABORT, 'tr_credit_line_delete: another limit is another line'); END
""",
    """
CREATE TRIGGER tr_statement_update BEFORE UPDATE ON statement
BEGIN SELECT RAISE(ABORT, 'tr_statement_update: a closed statement stands'); END
""",
    """
CREATE TRIGGER tr_statement_delete BEFORE DELETE ON statement
BEGIN SELECT RAISE(ABORT, 'tr_statement_delete: a closed statement stands'); END
""",
    """
CREATE TRIGGER tr_membership_delete BEFORE DELETE ON membership
BEGIN SELECT RAISE(ABORT, 'tr_membership_delete: a member stays with its team'); END
""",
    """
CREATE TRIGGER tr_transfer_update BEFORE UPDATE ON transfer
BEGIN SELECT RAISE(ABORT, 'tr_transfer_update: what moved has moved'); END
""",
    """
CREATE TRIGGER tr_transfer_delete BEFORE DELETE ON transfer
BEGIN SELECT RAISE(ABORT, 'tr_transfer_delete: what moved has moved'); END
""",
    """
CREATE TRIGGER tr_draw_update BEFORE UPDATE ON draw
BEGIN SELECT RAISE(ABORT, 'tr_draw_update: what was drawn is never edited'); END
""",
    """
CREATE TRIGGER tr_draw_delete BEFORE DELETE ON draw
BEGIN SELECT RAISE(ABORT, 'tr_draw_delete: what was drawn is never forgotten'); END
""",
    """
CREATE TRIGGER tr_entry_fee BEFORE INSERT ON entry
WHEN NEW.kind = 'fee' AND NOT EXISTS (SELECT 1 FROM unit_charge
  WHERE customer_id = NEW.customer_id AND entry_seq = NEW.seq AND amount = -NEW.amount)
BEGIN SELECT RAISE(ABORT, 'tr_entry_fee: no units are charged by this'); END
""",
    """
CREATE TRIGGER tr_provision_insert BEFORE INSERT ON provision
WHEN EXISTS (SELECT 1 FROM unit_charge
  WHERE customer_id = NEW.customer_id AND model = NEW.model AND period >= NEW.from_period)
BEGIN SELECT RAISE(ABORT, 'tr_provision_insert: that month is charged already'); END
""",
    """
CREATE TRIGGER tr_provision_update BEFORE UPDATE ON provision
BEGIN SELECT RAISE(ABORT, 'tr_provision_update: other terms are another version'); END
""",
    """
CREATE TRIGGER tr_provision_delete BEFORE DELETE ON provision
BEGIN SELECT RAISE(ABORT, 'tr_provision_delete: a commitment ends with another version'); END
""",
    """
CREATE TRIGGER tr_unit_charge_insert BEFORE INSERT ON unit_charge
WHEN NEW.version IS NOT (SELECT MAX(version) FROM provision
  WHERE customer_id = NEW.customer_id AND model = NEW.model AND from_period <= NEW.period)
BEGIN SELECT RAISE(ABORT, 'tr_unit_charge_insert: another version is in force'); END
""",
    """
CREATE TRIGGER tr_unit_charge_update BEFORE UPDATE ON unit_charge
BEGIN SELECT RAISE(ABORT, 'tr_unit_charge_update: a month is charged once'); END
""",
    """
CREATE TRIGGER tr_unit_charge_delete BEFORE DELETE ON unit_charge
BEGIN SELECT RAISE(ABORT, 'tr_unit_charge_delete: a month is charged once'); END
""",
    """
CREATE TRIGGER tr_unit_use_insert BEFORE INSERT ON unit_use
WHEN NOT EXISTS (SELECT 1 FROM reservation
  WHERE request_id = NEW.request_id AND customer_id = NEW.customer_id AND model = NEW.model
    AND (covered = NEW.frames OR (NEW.frames < 0 AND state = 'settled' AND frames_delivered - covered = NEW.frames)))
BEGIN SELECT RAISE(ABORT, 'tr_unit_use_insert: no request uses or gives back these frames'); END
""",
    """
CREATE TRIGGER tr_unit_use_update BEFORE UPDATE ON unit_use
BEGIN SELECT RAISE(ABORT, 'tr_unit_use_update: what was used is never edited'); END
""",
    """
CREATE TRIGGER tr_unit_use_delete BEFORE DELETE ON unit_use
BEGIN SELECT RAISE(ABORT, 'tr_unit_use_delete: what was used is never forgotten'); END
""",
)

POSTGRESQL = (
    """
CREATE FUNCTION billing_refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  RAISE EXCEPTION USING MESSAGE = TG_NAME || ': ' || TG_ARGV[0], ERRCODE = 'integrity_constraint_violation';
END $$
""",
    """
CREATE FUNCTION billing_check_entries() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF EXISTS (SELECT 1 FROM new_entry WHERE epoch IS DISTINCT FROM (SELECT epoch FROM writer_fence)) THEN
    RAISE EXCEPTION USING MESSAGE = 'tr_entry_epoch: this writer is fenced',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  IF EXISTS (SELECT 1 FROM new_entry WHERE kind = 'refund' AND NOT EXISTS (
    SELECT 1 FROM entry AS debit JOIN reservation ON reservation.request_id = debit.public_id
    WHERE debit.kind = 'debit' AND debit.public_id = new_entry.public_id
      AND debit.customer_id = new_entry.customer_id AND debit.seq < new_entry.seq
      AND reservation.state = 'settled' AND reservation.refunded = new_entry.amount)) THEN
    RAISE EXCEPTION USING
      MESSAGE = 'tr_entry_refund: no earlier debit, or not what its settlement gives back',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  IF EXISTS (SELECT 1 FROM new_entry WHERE balance_after < 0 AND amount < 0 AND balance_after < (
    SELECT floor_mils FROM wallet WHERE wallet.customer_id = new_entry.customer_id)) THEN
    RAISE EXCEPTION USING MESSAGE = 'tr_entry_floor: nothing is spent below the floor',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  IF EXISTS (SELECT 1 FROM new_entry WHERE kind IN ('reversal', 'reinstatement') AND NOT EXISTS (
    SELECT 1 FROM reversal WHERE reversal.customer_id = new_entry.customer_id
      AND reversal.entry_seq = new_entry.seq AND reversal.taken = -new_entry.amount)) THEN
    RAISE EXCEPTION USING MESSAGE = 'tr_entry_reversal: no payment is taken back by this',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  IF EXISTS (SELECT 1 FROM new_entry WHERE kind = 'repayment' AND NOT EXISTS (
    SELECT 1 FROM debt WHERE debt.customer_id = new_entry.customer_id AND debt.entry_seq = new_entry.seq
      AND debt.kind = 'repayment' AND debt.amount = new_entry.amount)) THEN
    RAISE EXCEPTION USING MESSAGE = 'tr_entry_repayment: no debt is repaid by this',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  IF EXISTS (SELECT 1 FROM new_entry WHERE kind IN ('transfer_out', 'transfer_in') AND NOT EXISTS (
    SELECT 1 FROM transfer WHERE transfer.transfer_id = new_entry.public_id
      AND transfer.amount = ABS(new_entry.amount)
      AND ((new_entry.kind = 'transfer_out' AND transfer.from_id = new_entry.customer_id
          AND transfer.from_seq = new_entry.seq)
        OR (new_entry.kind = 'transfer_in' AND transfer.to_id = new_entry.customer_id
          AND transfer.to_seq = new_entry.seq)))) THEN
    RAISE EXCEPTION USING MESSAGE = 'tr_entry_transfer: nothing was transferred by this',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  IF EXISTS (SELECT 1 FROM new_entry WHERE kind = 'fee' AND NOT EXISTS (
    SELECT 1 FROM unit_charge WHERE unit_charge.customer_id = new_entry.customer_id
      AND unit_charge.entry_seq = new_entry.seq AND unit_charge.amount = -new_entry.amount)) THEN
    RAISE EXCEPTION USING MESSAGE = 'tr_entry_fee: no units are charged by this',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN NULL;
END $$
""",
    """
CREATE TRIGGER tr_entry_insert AFTER INSERT ON entry
REFERENCING NEW TABLE AS new_entry FOR EACH STATEMENT EXECUTE FUNCTION billing_check_entries()
""",
    """
CREATE TRIGGER tr_entry_update BEFORE UPDATE ON entry
FOR EACH ROW EXECUTE FUNCTION billing_refuse('entries are never edited')
""",
    """
CREATE TRIGGER tr_entry_delete BEFORE DELETE ON entry
FOR EACH ROW EXECUTE FUNCTION billing_refuse('entries are never deleted')
""",
    """
CREATE TRIGGER tr_entry_truncate BEFORE TRUNCATE ON entry
FOR EACH STATEMENT EXECUTE FUNCTION billing_refuse('entries are never deleted')
""",
    """
CREATE TRIGGER tr_wallet_update BEFORE UPDATE ON wallet FOR EACH ROW
WHEN (NEW.customer_id <> OLD.customer_id OR NEW.seq < OLD.seq)
EXECUTE FUNCTION billing_refuse('a wallet never goes back')
""",
    """
CREATE TRIGGER tr_reservation_update BEFORE UPDATE ON reservation FOR EACH ROW
WHEN (OLD.state = 'settled' OR NEW.request_id <> OLD.request_id OR NEW.customer_id <> OLD.customer_id
  OR NEW.key_id <> OLD.key_id OR NEW.frames <> OLD.frames OR NEW.mils_per_frame <> OLD.mils_per_frame
  OR NEW.amount <> OLD.amount OR NEW.debit_seq <> OLD.debit_seq OR NEW.created_at <> OLD.created_at
  OR NEW.model <> OLD.model OR NEW.per_frames <> OLD.per_frames OR NEW.covered IS DISTINCT FROM OLD.covered)
EXECUTE FUNCTION billing_refuse('a reservation settles once and its terms never change')
""",
    """
CREATE TRIGGER tr_reservation_delete BEFORE DELETE ON reservation
FOR EACH ROW EXECUTE FUNCTION billing_refuse('reservations are never deleted')
""",
    """
CREATE TRIGGER tr_api_key_update BEFORE UPDATE ON api_key FOR EACH ROW
WHEN (OLD.revoked_at IS NOT NULL OR NEW.key_id <> OLD.key_id OR NEW.sha256 <> OLD.sha256
  OR NEW.customer_id <> OLD.customer_id OR NEW.created_seq <> OLD.created_seq)
EXECUTE FUNCTION billing_refuse('a key is revoked once and never becomes another')
""",
    """
CREATE TRIGGER tr_api_key_delete BEFORE DELETE ON api_key
FOR EACH ROW EXECUTE FUNCTION billing_refuse('keys are revoked, never deleted')
""",
    """
CREATE TRIGGER tr_writer_fence_update BEFORE UPDATE ON writer_fence FOR EACH ROW
WHEN (NEW.epoch <= OLD.epoch) EXECUTE FUNCTION billing_refuse('the epoch only grows')
""",
    """
CREATE TRIGGER tr_writer_fence_delete BEFORE DELETE ON writer_fence
FOR EACH ROW EXECUTE FUNCTION billing_refuse('the fence stays')
""",
    """
CREATE FUNCTION billing_check_submission() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF TG_OP = 'DELETE' THEN
    IF EXISTS (SELECT 1 FROM reservation WHERE request_id = OLD.request_id AND state = 'open') THEN
      RAISE EXCEPTION USING
        MESSAGE = 'tr_submission_delete: a request is not forgotten while it is open',
        ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN OLD;
  END IF;
  IF OLD.released_at IS NOT NULL OR NEW.released_at IS NULL OR NEW.request_id <> OLD.request_id
    OR NEW.customer_id <> OLD.customer_id OR NEW.amount <> OLD.amount OR NEW.idempotency_key <> OLD.idempotency_key
    OR NEW.payload_sha256 <> OLD.payload_sha256 OR NEW.created_at <> OLD.created_at
    OR NOT EXISTS (SELECT 1 FROM reservation
      WHERE request_id = OLD.request_id AND state = 'settled' AND frames_delivered = 0) THEN
    RAISE EXCEPTION USING
      MESSAGE = 'tr_submission_update: a key is released once, by a request that kept nothing',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN NEW;
END $$
""",
    """
CREATE TRIGGER tr_submission_update BEFORE UPDATE ON submission
FOR EACH ROW EXECUTE FUNCTION billing_check_submission()
""",
    """
CREATE TRIGGER tr_submission_delete BEFORE DELETE ON submission
FOR EACH ROW EXECUTE FUNCTION billing_check_submission()
""",
    """
CREATE TRIGGER tr_key_terms_update BEFORE UPDATE ON key_terms FOR EACH ROW
WHEN (NEW.key_id <> OLD.key_id OR NEW.budget_id <> OLD.budget_id)
EXECUTE FUNCTION billing_refuse('a key keeps what it has spent')
""",
    """
CREATE TRIGGER tr_budget_use_update BEFORE UPDATE ON budget_use
FOR EACH ROW EXECUTE FUNCTION billing_refuse('what was spent is never edited')
""",
    """
CREATE TRIGGER tr_budget_use_delete BEFORE DELETE ON budget_use
FOR EACH ROW EXECUTE FUNCTION billing_refuse('what was spent is never forgotten')
""",
    """
CREATE TRIGGER tr_quote_update BEFORE UPDATE ON quote
FOR EACH ROW EXECUTE FUNCTION billing_refuse('a quote stands as it was given')
""",
    """
CREATE TRIGGER tr_quote_delete BEFORE DELETE ON quote
FOR EACH ROW EXECUTE FUNCTION billing_refuse('a quote stands as it was given')
""",
    """
CREATE TRIGGER tr_budget_event_update BEFORE UPDATE ON budget_event
FOR EACH ROW EXECUTE FUNCTION billing_refuse('a warning stands as it was given')
""",
    """
CREATE TRIGGER tr_budget_event_delete BEFORE DELETE ON budget_event
FOR EACH ROW EXECUTE FUNCTION billing_refuse('a warning stands as it was given')
""",
    """
CREATE FUNCTION billing_check_payment() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NOT EXISTS (SELECT 1 FROM entry WHERE customer_id = NEW.customer_id AND seq = NEW.credit_seq AND kind = 'credit'
    AND public_id = NEW.public_id AND amount = NEW.granted) THEN
    RAISE EXCEPTION USING MESSAGE = 'tr_payment_insert: a payment is its credit',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN NEW;
END $$
""",
    """
CREATE TRIGGER tr_payment_insert BEFORE INSERT ON payment
FOR EACH ROW EXECUTE FUNCTION billing_check_payment()
""",
    """
CREATE TRIGGER tr_payment_update BEFORE UPDATE ON payment FOR EACH ROW
WHEN (NEW.source <> OLD.source OR NEW.public_id <> OLD.public_id OR NEW.customer_id <> OLD.customer_id
  OR NEW.granted <> OLD.granted OR NEW.credit_seq <> OLD.credit_seq OR NEW.created_at <> OLD.created_at
  OR NEW.reversal_seq IS NULL OR NEW.reversal_seq <= COALESCE(OLD.reversal_seq, 0))
EXECUTE FUNCTION billing_refuse('of a payment only what was taken back changes, by a reversal')
""",
    """
CREATE TRIGGER tr_payment_delete BEFORE DELETE ON payment
FOR EACH ROW EXECUTE FUNCTION billing_refuse('payments are never deleted')
""",
    """
CREATE TRIGGER tr_reversal_update BEFORE UPDATE ON reversal
FOR EACH ROW EXECUTE FUNCTION billing_refuse('reversals are never edited')
""",
    """
CREATE TRIGGER tr_reversal_delete BEFORE DELETE ON reversal
FOR EACH ROW EXECUTE FUNCTION billing_refuse('reversals are never deleted')
""",
    """
CREATE FUNCTION billing_check_debt() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NEW.kind = 'shortage' AND NOT EXISTS (SELECT 1 FROM reversal
    WHERE customer_id = NEW.customer_id AND entry_seq = NEW.entry_seq AND owed = NEW.amount) THEN
    RAISE EXCEPTION USING MESSAGE = 'tr_debt_insert: nothing is owed but what a reversal could not take',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN NEW;
END $$
""",
    """
CREATE TRIGGER tr_debt_insert BEFORE INSERT ON debt
FOR EACH ROW EXECUTE FUNCTION billing_check_debt()
""",
    """
CREATE TRIGGER tr_debt_update BEFORE UPDATE ON debt
FOR EACH ROW EXECUTE FUNCTION billing_refuse('debts are never edited')
""",
    """
CREATE TRIGGER tr_debt_delete BEFORE DELETE ON debt
FOR EACH ROW EXECUTE FUNCTION billing_refuse('debts are never deleted')
""",
    """
CREATE TRIGGER tr_payment_event_update BEFORE UPDATE ON payment_event
FOR EACH ROW EXECUTE FUNCTION billing_refuse('what was taken into account stays so')
""",
    """
CREATE TRIGGER tr_payment_event_delete BEFORE DELETE ON payment_event
FOR EACH ROW EXECUTE FUNCTION billing_refuse('what was taken into account stays so')
""",
    """
CREATE TRIGGER tr_price_update BEFORE UPDATE ON price
FOR EACH ROW EXECUTE FUNCTION billing_refuse('another price is another version')
""",
    """
CREATE TRIGGER tr_price_delete BEFORE DELETE ON price
FOR EACH ROW EXECUTE FUNCTION billing_refuse('prices are never deleted')
""",
    """
CREATE TRIGGER tr_rollout_job_update BEFORE UPDATE ON rollout_job FOR EACH ROW
WHEN (OLD.finished_at IS NOT NULL OR NEW.request_id <> OLD.request_id OR NEW.customer_id <> OLD.customer_id
  OR NEW.amount <> OLD.amount OR NEW.frames <> OLD.frames)
EXECUTE FUNCTION billing_refuse('a job ends once and never becomes another')
""",
    """
CREATE TRIGGER tr_wallet_insert BEFORE INSERT ON wallet FOR EACH ROW
WHEN (NEW.credit_limit_mils <> 0 OR NEW.floor_mils <> 0)
EXECUTE FUNCTION billing_refuse('a wallet begins prepaid')
""",
    """
CREATE FUNCTION billing_check_line() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NOT EXISTS (SELECT 1 FROM credit_line WHERE customer_id = NEW.customer_id
    AND limit_mils = NEW.credit_limit_mils AND floor_mils = NEW.floor_mils
    AND seq = (SELECT MAX(seq) FROM credit_line WHERE customer_id = NEW.customer_id)) THEN
    RAISE EXCEPTION USING MESSAGE = 'tr_wallet_line: the newest credit line says otherwise',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN NEW;
END $$
""",
    """
CREATE TRIGGER tr_wallet_line BEFORE UPDATE ON wallet FOR EACH ROW
WHEN (NEW.credit_limit_mils <> OLD.credit_limit_mils OR NEW.floor_mils <> OLD.floor_mils)
EXECUTE FUNCTION billing_check_line()
""",
    """
CREATE FUNCTION billing_check_membership() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF EXISTS (SELECT 1 FROM membership WHERE customer_id = NEW.parent_id OR parent_id = NEW.customer_id) THEN
    RAISE EXCEPTION USING MESSAGE = 'tr_membership_insert: teams have two levels',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN NEW;
END $$
""",
    """
CREATE TRIGGER tr_membership_insert BEFORE INSERT ON membership
FOR EACH ROW EXECUTE FUNCTION billing_check_membership()
""",
    """
CREATE TRIGGER tr_membership_update BEFORE UPDATE ON membership FOR EACH ROW
WHEN (NEW.customer_id <> OLD.customer_id OR NEW.parent_id <> OLD.parent_id)
EXECUTE FUNCTION billing_refuse('a member stays with its team')
""",
    """
CREATE FUNCTION billing_check_transfer() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NOT EXISTS (SELECT 1 FROM membership WHERE (customer_id = NEW.from_id AND parent_id = NEW.to_id)
    OR (customer_id = NEW.to_id AND parent_id = NEW.from_id)) THEN
    RAISE EXCEPTION USING MESSAGE = 'tr_transfer_insert: money moves within a team only',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN NEW;
END $$
""",
    """
CREATE TRIGGER tr_transfer_insert BEFORE INSERT ON transfer
FOR EACH ROW EXECUTE FUNCTION billing_check_transfer()
""",
    """
CREATE TRIGGER tr_credit_line_update BEFORE UPDATE ON credit_line
FOR EACH ROW EXECUTE FUNCTION billing_refuse('another limit is another line')
""",
    """
CREATE TRIGGER tr_credit_line_delete BEFORE DELETE ON credit_line
FOR EACH ROW EXECUTE FUNCTION billing_refuse('another limit is another line')
""",
    """
CREATE TRIGGER tr_statement_update BEFORE UPDATE ON statement
FOR EACH ROW EXECUTE FUNCTION billing_refuse('a closed statement stands')
""",
    """
CREATE TRIGGER tr_statement_delete BEFORE DELETE ON statement
FOR EACH ROW EXECUTE FUNCTION billing_refuse('a closed statement stands')
""",
    """
CREATE TRIGGER tr_membership_delete BEFORE DELETE ON membership
FOR EACH ROW EXECUTE FUNCTION billing_refuse('a member stays with its team')
""",
    """
CREATE TRIGGER tr_transfer_update BEFORE UPDATE ON transfer
FOR EACH ROW EXECUTE FUNCTION billing_refuse('what moved has moved')
""",
    """
CREATE TRIGGER tr_transfer_delete BEFORE DELETE ON transfer
FOR EACH ROW EXECUTE FUNCTION billing_refuse('what moved has moved')
""",
    """
CREATE TRIGGER tr_draw_update BEFORE UPDATE ON draw
FOR EACH ROW EXECUTE FUNCTION billing_refuse('what was drawn is never edited')
""",
    """
CREATE TRIGGER tr_draw_delete BEFORE DELETE ON draw
FOR EACH ROW EXECUTE FUNCTION billing_refuse('what was drawn is never forgotten')
""",
    """
CREATE FUNCTION billing_check_provision() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF EXISTS (SELECT 1 FROM unit_charge
    WHERE customer_id = NEW.customer_id AND model = NEW.model AND period >= NEW.from_period) THEN
    RAISE EXCEPTION USING MESSAGE = 'tr_provision_insert: that month is charged already',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN NEW;
END $$
""",
    """
CREATE TRIGGER tr_provision_insert BEFORE INSERT ON provision
FOR EACH ROW EXECUTE FUNCTION billing_check_provision()
""",
    """
CREATE TRIGGER tr_provision_update BEFORE UPDATE ON provision
FOR EACH ROW EXECUTE FUNCTION billing_refuse('other terms are another version')
""",
    """
CREATE TRIGGER tr_provision_delete BEFORE DELETE ON provision
FOR EACH ROW EXECUTE FUNCTION billing_refuse('a commitment ends with another version')
""",
    """
CREATE FUNCTION billing_check_unit_charge() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NEW.version IS DISTINCT FROM (SELECT MAX(version) FROM provision
    WHERE customer_id = NEW.customer_id AND model = NEW.model AND from_period <= NEW.period) THEN
    RAISE EXCEPTION USING MESSAGE = 'tr_unit_charge_insert: another version is in force',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN NEW;
END $$
""",
    """
CREATE TRIGGER tr_unit_charge_insert BEFORE INSERT ON unit_charge
FOR EACH ROW EXECUTE FUNCTION billing_check_unit_charge()
""",
    """
CREATE TRIGGER tr_unit_charge_update BEFORE UPDATE ON unit_charge
FOR EACH ROW EXECUTE FUNCTION billing_refuse('a month is charged once')
""",
    """
CREATE TRIGGER tr_unit_charge_delete BEFORE DELETE ON unit_charge
FOR EACH ROW EXECUTE FUNCTION billing_refuse('a month is charged once')
""",
    """
CREATE FUNCTION billing_check_unit_use() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NOT EXISTS (SELECT 1 FROM reservation
    WHERE request_id = NEW.request_id AND customer_id = NEW.customer_id AND model = NEW.model
      AND (covered = NEW.frames
        OR (NEW.frames < 0 AND state = 'settled' AND frames_delivered - covered = NEW.frames))) THEN
    RAISE EXCEPTION USING MESSAGE = 'tr_unit_use_insert: no request uses or gives back these frames',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN NEW;
END $$
""",
    """
CREATE TRIGGER tr_unit_use_insert BEFORE INSERT ON unit_use
FOR EACH ROW EXECUTE FUNCTION billing_check_unit_use()
""",
    """
CREATE TRIGGER tr_unit_use_update BEFORE UPDATE ON unit_use
FOR EACH ROW EXECUTE FUNCTION billing_refuse('what was used is never edited')
""",
    """
CREATE TRIGGER tr_unit_use_delete BEFORE DELETE ON unit_use
FOR EACH ROW EXECUTE FUNCTION billing_refuse('what was used is never forgotten')
""",
)
