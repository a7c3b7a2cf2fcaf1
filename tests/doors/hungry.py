"""klein on a pipeline that can run out of memory: `bentoml serve tests.doors.hungry:Klein`."""

import time

from starlette.responses import Response

import service
from klein.app.generator import Generated
from klein.output.delivery import Bucket
from service import Klein
from tests.support import fakes

json_response = service.json_response


def slow_response(generated: Generated, bucket: Bucket | None) -> Response:
    """The answer, for "slow" as late as if a bucket were slow to take the image."""
    if generated.result.params.prompt == "slow":
        time.sleep(3)
    return json_response(generated, bucket)


Klein.inner.load = staticmethod(fakes.HungryPipeline)
service.json_response = slow_response
