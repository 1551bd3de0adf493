"""Execution of tasks on a Ray cluster.

Ray is optional: it is imported for `--executor ray`. All hosts must see source and output folders
under the same paths.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron_vita.errors import PlatformError, VitaError

TASKS_PER_CORE = 2  # submitted at a time, so that a core never waits for the next task


def run_on_ray(run_one: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """Yield (number, result) of each task, in order of completion, from a Ray cluster.

    The cluster is that of RAY_ADDRESS or `ray start`.

    Raises:
        PlatformError: Ray is not installed, or no cluster runs.
        VitaError: the first error of a task.
    """
    ray = _connected()

    # A plain function, since Ray takes no partial.
    def run_there(task: Any) -> Any:
        return run_one(task)

    remote = ray.remote(num_cpus=1, max_retries=2)(run_there)
    room = max(1, int(TASKS_PER_CORE * ray.cluster_resources().get("CPU", 1)))
    running: dict[Any, int] = {}
    for number, task in enumerate(tasks):
        running[remote.remote(task)] = number
        # Results are taken as they come: a million tasks at once would fill the scheduler.
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
            # Ray wraps an error in one of its own, whose message is a traceback.
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
