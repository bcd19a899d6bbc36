"""The models and their prices; no key needed."""

import asyncio

from fastapi import APIRouter

from billing.money import MILS_PER_USD, usd
from serve_app.catalog import CATALOG, MILS_PER_FRAME, STANDARD_FRAMES, model_spec
from serve_app.context import ActiveSlug, Parts
from serve_app.errors import ModelNotFound
from serve_app.routes.status import queue_status
from serve_app.schemas import Catalog, CatalogEntry, SpecPrice, Specs

router = APIRouter(tags=["catalog"])


@router.get("/v1/models")
async def list_models(parts: Parts, active: ActiveSlug) -> Catalog:
    return Catalog(data=list(await asyncio.gather(*(_entry(parts, slug, active) for slug in CATALOG))))


@router.get("/v1/models/{slug}")
async def get_model(slug: str, parts: Parts, active: ActiveSlug) -> CatalogEntry:
    if slug not in CATALOG:
        raise ModelNotFound(f"{slug} is not in the catalog; see /v1/models")
    return await _entry(parts, slug, active)


@router.get("/v1/specs")
async def list_specs(parts: Parts) -> Specs:
    return Specs(
        specs=[SpecPrice(slug=slug, price_per_frame_usd=await _price_per_frame_usd(parts, slug)) for slug in CATALOG],
        default_price_usd_per_frame=usd(MILS_PER_FRAME),
    )


async def _entry(parts: Parts, slug: str, active: str) -> CatalogEntry:
    """What is known of the model, and of it here: whether this base URL runs it, and on what."""
    entry = CATALOG[slug].model_copy(update={"price_per_frame_usd": await _price_per_frame_usd(parts, slug)})
    model = parts.models.get(slug)
    if model is None:
        return entry
    queue = await queue_status(model)
    attention = queue.attention or None if queue is not None else None
    return entry.model_copy(
        update={"active": slug == active, "spec": entry.spec.model_copy(update={"attention": attention})}
    )


async def _price_per_frame_usd(parts: Parts, slug: str) -> float:
    """Of the standard rollout, at the list price: a customer may have its own."""
    priced = await parts.prices.price(model_spec(CATALOG[slug]), STANDARD_FRAMES)
    return priced.mils_per_frame / (priced.per_frames * MILS_PER_USD)
