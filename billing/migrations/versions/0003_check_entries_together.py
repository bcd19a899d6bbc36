"""PostgreSQL checks the new entries of a statement together: per row it was a third of what an entry costs."""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    if op.get_context().dialect.name == "postgresql":
        for statement in POSTGRESQL:
            op.execute(statement)


POSTGRESQL = (
    "DROP TRIGGER tr_entry_insert ON entry",
    "DROP FUNCTION billing_check_entry()",
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
  RETURN NULL;
END $$
""",
    """
CREATE TRIGGER tr_entry_insert AFTER INSERT ON entry
REFERENCING NEW TABLE AS new_entry FOR EACH STATEMENT EXECUTE FUNCTION billing_check_entries()
""",
)
