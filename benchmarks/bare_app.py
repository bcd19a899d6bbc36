"""The least that a two-deployment Serve application can be: the baseline of the control plane."""

from typing import Any

from fastapi import FastAPI, Request, Response
from ray import serve


class BareDeployment:
    async def run(self, body: bytes) -> bytes:
        return body[:5000]


@serve.ingress()
class BareIngress:
    def __init__(self, second: Any) -> None:
        self._second = second

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = FastAPI()

        @app.post("/")
        async def run(request: Request) -> Response:
            return Response(await self._second.run.remote(await request.body()), media_type="video/mp4")

        return app


def bare_application() -> serve.Application:
    options: dict[str, Any] = {"max_ongoing_requests": 1000, "ray_actor_options": {"num_cpus": 0.1}}
    second = serve.deployment(BareDeployment, name="second").options(**options)
    return serve.deployment(BareIngress, name="first").options(**options).bind(second.bind())
