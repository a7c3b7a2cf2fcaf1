"""`klein serve`: several GPUs of this machine behind one address, by Ray Serve."""

import argparse
import os
import socket
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
    gpus = len(machine.gpus)
    replicas = max(1, gpus) if args.replicas is None else args.replicas
    if replicas < 1:
        raise BadSetting(f"--replicas: {replicas} draw nothing: at least 1", field="--replicas")
    if ray.needs_gpu(settings) and replicas > gpus:
        raise BadSetting(
            f"--replicas: {replicas} replicas take a GPU each, and this machine has {gpus}",
            field="--replicas",
        )
    require_port(args.host, args.port)
    build.loader(settings, os.environ)
    ray.run(replicas, args.host, args.port)
    return OK


def require_port(host: str, port: int) -> None:
    """Raise BadSetting if nobody can listen there; Ray would share a port with another Ray."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family):
            return
    except (OSError, OverflowError) as error:
        raise BadSetting(
            f"--port: klein cannot listen on {host}:{port} ({error}): end what does, or choose "
            "another --port",
            field="--port",
        ) from None
