"""Attacks on jobs and webhooks. Ann's request `held` reserved 50 mils for 10 frames."""

from tests.billing.attacks import Attack


def job(
    *,
    request: str = "'held'",
    amount: int = 50,
    state: str = "queued",
    owner: str = "",
    delivered: int = 0,
    captured: int = 0,
    error_code: str = "",
    finished_at: str = "NULL",
) -> str:
    return (
        "INSERT INTO rollout_job (request_id, customer_id, key_id, model, seed, num_steps, guidance, frames, amount,"
        " payload_sha256, start_frame_resized, score, base_url, webhook_url, state, owner, owned_until, attempts,"
        " not_before, created_at, delivered, captured, infer_ms, error_code, error, finished_at)"
        f" VALUES ({request}, :ann, :ann_key, 'm', 0, 1, 0, 10, {amount}, '', 0, 0, '', '', '{state}', '{owner}', 0, 0,"
        f" 0, 1, {delivered}, {captured}, 0, '{error_code}', '', {finished_at})"
    )


def delivery(*, request: str = "'held'", state: str = "pending", finished_at: str = "NULL") -> str:
    return f"INSERT INTO webhook_delivery VALUES ('msg', {request}, :ann, 'u', '{state}', 0, 1, 1, {finished_at})"


ATTEMPT = "INSERT INTO webhook_attempt (delivery_id, attempt, at, took_ms, problem) VALUES ('msg', 1, 1, 1, '')"


def secret(customer: str = ":ann", version: int = 1) -> str:
    return f"INSERT INTO webhook_secret VALUES ({customer}, {version}, 's', 1)"


ENDED = job(state="canceled", finished_at="1")

JOB_ATTACKS = [
    Attack("two jobs of one request", "pk_rollout_job", [job(), job()]),
    Attack("a job that nobody paid for", "fk_rollout_job_reservation", [job(request="'nobody'")]),
    Attack("a job at another price", "fk_rollout_job_reservation", [job(amount=49)]),
    Attack("a job in no known state", "ck_rollout_job_state", [job(state="lost", finished_at="1")]),
    Attack("a queued job with an owner", "ck_rollout_job_owner", [job(owner="own_1")]),
    Attack("a running job without one", "ck_rollout_job_owner", [job(state="running")]),
    Attack("a queued job that has ended", "ck_rollout_job_finished", [job(finished_at="1")]),
    Attack("an ended job without an end", "ck_rollout_job_finished", [job(state="canceled")]),
    Attack("more frames than were asked for", "ck_rollout_job_delivered", [job(delivered=11)]),
    Attack("more kept than was reserved", "ck_rollout_job_captured", [job(captured=51)]),
    Attack("a failure without a reason", "ck_rollout_job_error", [job(state="failed", finished_at="1")]),
    Attack("a reason without a failure", "ck_rollout_job_error", [job(error_code="ENGINE_FAILED")]),
    Attack(
        "a job that ends twice",
        "tr_rollout_job_update",
        [ENDED, "UPDATE rollout_job SET state = 'succeeded' WHERE request_id = 'held'"],
    ),
    Attack("a job that grows", "tr_rollout_job_update", [job(), "UPDATE rollout_job SET frames = 11"]),
    Attack("two webhooks of one name", "pk_webhook_delivery", [ENDED, delivery(), delivery()]),
    Attack("a webhook of no job", "fk_webhook_delivery_job", [delivery()]),
    Attack("a webhook in no known state", "ck_webhook_delivery_state", [ENDED, delivery(state="x", finished_at="1")]),
    Attack("a pending webhook that has ended", "ck_webhook_delivery_finished", [ENDED, delivery(finished_at="1")]),
    Attack("one attempt twice", "pk_webhook_attempt", [ENDED, delivery(), ATTEMPT, ATTEMPT]),
    Attack("an attempt at nothing", "fk_webhook_attempt_delivery", [ATTEMPT]),
    Attack("two secrets of one version", "pk_webhook_secret", [secret(), secret()]),
    Attack("a secret of nobody", "fk_webhook_secret_wallet", [secret("'nobody'")]),
    Attack("a secret before the first", "ck_webhook_secret_version", [secret(version=0)]),
]
