"""`klein serve`: several GPUs of this machine behind one address, by Ray Serve."""

import argparse
import os
from importlib.util import find_spec

from klein.app import build
from klein.entrypoints.cli.exit_codes import OK
from klein.errors import BadSetting
from klein.models.machine import Machine
from klein.settings import Settings


def serve(args: argparse.Namespace) -> int:
    """Serve until interrupted; raises BadSetting for what cannot work here."""
    if find_spec("ray") is None:
        raise BadSetting(
            "klein serve runs on Ray, which is not installed: pip install 'klein[ray]'. One GPU "
            "needs none: bentoml serve service:Klein"
        )
    from klein.entrypoints import ray

    settings, machine = Settings.from_env(os.environ), Machine.probe(os.environ)
    build.loader(settings, os.environ)
    gpus = len(machine.gpus)
    replicas = args.replicas or max(1, gpus)
    if ray.needs_gpu(settings) and replicas > gpus:
        raise BadSetting(
            f"--replicas: {replicas} replicas take a GPU each, and this machine has {gpus}",
            field="--replicas",
        )
    ray.run(replicas, args.host, args.port)
    return OK
