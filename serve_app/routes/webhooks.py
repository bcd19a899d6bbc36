"""What a customer verifies its webhooks with."""

from fastapi import APIRouter, Depends, Response

from deployments.errors import KeyNotAllowed
from deployments.webhook_store import SigningSecret
from serve_app.context import Caller, Parts, authenticate
from serve_app.schemas import WebhookSecret, WebhookSecrets


def may_see_secrets(caller: Caller, response: Response) -> None:
    if caller.terms.scope != "spend":
        raise KeyNotAllowed("this key may read and not see secrets")
    response.headers["Cache-Control"] = "no-store"


router = APIRouter(tags=["webhooks"], dependencies=[Depends(authenticate), Depends(may_see_secrets)])


@router.get("/v1/webhooks/secret")
async def get_secret(parts: Parts, caller: Caller) -> WebhookSecrets:
    """What the caller's webhooks are signed with, the newest first; made when it is first asked for."""
    return _answer(await parts.ask(parts.jobs.outbox.secrets, caller.customer_id))


@router.post("/v1/webhooks/secret/rotate")
async def rotate_secret(parts: Parts, caller: Caller) -> WebhookSecrets:
    """A new secret. For 24 hours webhooks are signed with the one before it too."""
    return _answer(await parts.ask(parts.jobs.outbox.rotate, caller.customer_id))


def _answer(secrets: list[SigningSecret]) -> WebhookSecrets:
    return WebhookSecrets(secrets=[WebhookSecret(secret=each.secret, created=each.created_at) for each in secrets])
