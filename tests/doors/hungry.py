"""klein on a pipeline that can run out of memory: `bentoml serve tests.doors.hungry:Klein`."""

import time
from typing import Any

from klein.output import response
from service import Klein
from tests.support import fakes

to_json = response.to_json


def slow_to_json(result: Any, *rest: Any) -> dict[str, Any]:
    """The answer, for "slow" as late as if a bucket were slow to take the image."""
    if result.params.prompt == "slow":
        time.sleep(3)
    return to_json(result, *rest)


inner: Any = Klein.inner  # type: ignore[attr-defined]
inner.load = staticmethod(fakes.HungryPipeline)
response.to_json = slow_to_json  # type: ignore[assignment]
