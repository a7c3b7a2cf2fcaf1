"""klein on a pipeline that can run out of memory: `bentoml serve tests.doors.hungry:Klein`."""

import time

from starlette.responses import Response

from klein.core import GenerationResult
from service import Klein
from tests import fakes

_as_json = Klein.inner._as_json


def _deliver(service: object, result: GenerationResult) -> Response:
    """The answer, for "slow" as late as if a bucket were slow to take the picture."""
    if result.params.prompt == "slow":
        time.sleep(3)
    return _as_json(service, result)


Klein.inner.load = staticmethod(lambda loras: fakes.HungryPipeline())
Klein.inner._as_json = _deliver
