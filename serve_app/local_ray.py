"""What a process must set before it imports Ray, to start or to join a cluster on this machine."""

import os
from pathlib import Path

from serve_app.signing import load_secret

RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray then takes 127.0.0.1 for this node's address, so nothing of it is reachable from outside.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # HTTP is back 4 s after the proxy dies instead of 30 s.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "2",
    # Without it the proxy buffers whatever a slow reader does not take.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_app.send_window:proxy_middlewares",
    # Serve looks at its replicas ten times a second otherwise, which is half of what an idle cluster costs.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
    # Ray runs its workers at nice 15: whatever else this machine does would come before the service.
    "RAY_worker_niceness": "0",
}


def prepare_ray_environment(data_dir: Path) -> None:
    """Processes that share `data_dir` share a cluster: only they hold the token that its Ray asks for.

    What the operator set wins, but for RAY_ADDRESS: only the address that we name is ever connected to.
    """
    token_path = data_dir.resolve() / "ray-token"
    load_secret(token_path)
    settings = RAY_ENVIRONMENT | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_path)}
    os.environ.update({name: value for name, value in settings.items() if name not in os.environ})
    os.environ.pop("RAY_ADDRESS", None)
