"""`dream-admin serve` with stand-in models: the real cluster, whose faults a test can ask for."""

from serve_app.launch import run
from serve_app.settings import Limits, ModelArgs, Settings

if __name__ == "__main__":
    settings = Settings()
    runner = "tests.support.models:StandInModel"
    run(
        settings,
        settings.cluster_args().model_copy(
            update={
                "models": (
                    ModelArgs(slug="tiny-pusher", checkpoint="", runner=runner, num_cpus=0.5),
                    ModelArgs(slug="dreamdojo-2b-gr1", checkpoint="", runner=runner, num_cpus=0.5),
                ),
                "limits": Limits(queue_timeout_s=30.0, chunk_timeout_s=30.0, send_timeout_s=3.0),
            }
        ),
    )
