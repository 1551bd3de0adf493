"""The same work on a Ray cluster. Ray is no requirement: it is imported when a command is given
`--executor ray`.

Source and output folders must be seen by all machines under the same paths.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron_vita.errors import PlatformError, VitaError

TASKS_PER_CORE = 2


def run_on_ray(run_one: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """(number, result) of each task, as they end, from the cluster that RAY_ADDRESS or `ray start`
    names.

    PlatformError if Ray is missing or no cluster runs; the first VitaError of a task is raised
    here.
    """
    ray = _connected()

    def run_there(task: Any) -> Any:
        return run_one(task)

    remote = ray.remote(num_cpus=1, max_retries=2)(run_there)
    room = max(1, int(TASKS_PER_CORE * ray.cluster_resources().get("CPU", 1)))
    running: dict[Any, int] = {}
    for number, task in enumerate(tasks):
        running[remote.remote(task)] = number
        while len(running) >= room:
            yield _next_result(ray, running)
    while running:
        yield _next_result(ray, running)


def _next_result(ray: Any, running: dict[Any, int]) -> tuple[int, Any]:
    (reference, *_), _ = ray.wait(list(running), num_returns=1)
    try:
        return running.pop(reference), ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, VitaError):
            raise error.cause from None
        raise


def _connected() -> Any:
    try:
        import ray
    except ImportError:
        raise PlatformError(
            "--executor ray: the package ray is not installed; pip install ray"
        ) from None
    try:
        ray.init(address="auto", ignore_reinit_error=True, log_to_driver=False)
    except ConnectionError as error:
        raise PlatformError(
            f"--executor ray: no Ray cluster runs here ({error}); ray start --head"
        ) from error
    return ray
