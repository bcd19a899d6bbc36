"""`python -m deployments.world_model.checkpoint convert SRC DST`: make a checkpoint of published files."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from deployments.world_model.checkpoint.convert import convert
from deployments.world_model.config import EMBODIMENTS, PRESETS, WorldModelConfig
from deployments.world_model.errors import CheckpointError

MODELS = [name for name in PRESETS if name.startswith("dreamdojo")]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m deployments.world_model.checkpoint", description=__doc__)
    command = parser.add_subparsers(required=True).add_parser("convert", help="make a checkpoint of published files")
    command.add_argument("source", type=Path, help="a distributed checkpoint's directory, or a .pt file")
    command.add_argument("destination", type=Path, help="directory to write; a stopped conversion goes on from there")
    command.add_argument("--model", choices=MODELS, default=MODELS[0])
    command.add_argument("--robot", choices=list(EMBODIMENTS), default="gr1", help="whose post-training it is")
    command.add_argument("--config", type=Path, help="a model's configuration as JSON, in place of --model and --robot")
    command.add_argument("--tokenizer", type=Path, help="Wan2.1_VAE.pth")
    command.add_argument("--text", type=Path, help="the empty prompt's embedding; left out, the text is zeros")
    arguments = parser.parse_args(argv)
    try:
        convert(
            _config(arguments.config, arguments.model, arguments.robot),
            arguments.source,
            arguments.destination,
            tokenizer=arguments.tokenizer,
            text=arguments.text,
        )
    except (CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: the same command goes on from here")


def _config(path: Path | None, model: str, robot: str) -> WorldModelConfig:
    if path is None:
        return replace(PRESETS[model], name=f"{model}-{robot}", embodiment=EMBODIMENTS[robot])
    try:
        return WorldModelConfig.from_json(json.loads(path.read_bytes()))
    except OSError as error:
        raise CheckpointError(str(path), f"cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(str(path), f"does not describe a model ({error})") from error


if __name__ == "__main__":
    main()
