"""`dream-admin serve` with two replicas of the causal student and nothing else."""

from serve_app.catalog import STUDENT
from serve_app.launch import run
from serve_app.settings import ModelArgs, Settings

if __name__ == "__main__":
    settings = Settings()
    student = ModelArgs(slug=STUDENT, num_cpus=0.5, min_replicas=2, max_replicas=2, torch_threads=1)
    run(settings, settings.cluster_args().model_copy(update={"models": (student,), "default_model": STUDENT}))
