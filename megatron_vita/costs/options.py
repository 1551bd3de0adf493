"""Command line options of the dry run: number and kind of devices."""

import argparse

from megatron_vita.costs.devices import DEVICES, H100, H200, Device, find_device
from megatron_vita.costs.fitting import Room
from megatron_vita.costs.memory.memory import GIB
from megatron_vita.errors import ConfigError

HOST_GIB_A_RANK = 125
"""Default host memory per rank."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the dry run's group of options to a command."""
    dry = parser.add_argument_group("dry run")
    dry.add_argument(
        "--dry-run",
        action="store_true",
        help="show and check what the run would be, on this machine alone",
    )
    dry.add_argument(
        "--suggest",
        action="store_true",
        help="list the recipe's fastest layouts for the given devices, with memory levers that fit",
    )
    dry.add_argument(
        "--world-size",
        "--gpus",
        type=int,
        default=0,
        help="ranks of the run; default: those of one replica",
    )
    known = ", ".join(device.name for device in DEVICES)
    dry.add_argument(
        "--device",
        default="",
        help=f"GPU of the run, to predict the step time: {known}; default: this machine's, if any",
    )
    dry.add_argument("--ranks-per-node", type=int, default=8, help="ranks per node")
    dry.add_argument(
        "--device-memory-gib",
        type=float,
        default=0,
        help="memory of a GPU; default: that of --device. A run estimated to need more is refused",
    )
    dry.add_argument(
        "--host-memory-gib",
        type=float,
        default=0,
        help=(
            "memory of a node for the run's processes and offloaded activations; default: "
            f"{HOST_GIB_A_RANK} GiB per rank"
        ),
    )
    dry.add_argument(
        "--without-data", action="store_true", help="do not read the plan or any packs"
    )


def chosen_device(options: argparse.Namespace, *, here: str = "") -> Device | None:
    """Return the device that the options name, or `here`; None if its rates are unknown.

    Raises:
        ConfigError: an unknown --device.
    """
    device = find_device(options.device or here)
    if options.device and device is None:
        known = ", ".join(device.name for device in DEVICES)
        raise ConfigError(
            f"--device {options.device}: its rates are not known; known: {known}. "
            "--device-memory-gib alone checks memory"
        )
    return device


def likely_device(options: argparse.Namespace, *, here: str = "") -> Device:
    """Return the device that the options name, or else the one whose memory they give."""
    chosen = chosen_device(options, here=here)
    if chosen is not None:
        return chosen
    if options.device_memory_gib > H100.memory_gib + 10:
        return H200
    return H100


def chosen_room(options: argparse.Namespace, device: Device | None, *, here: int = 0) -> Room:
    """Return a rank's memory by the options, else the device's, else `here` in bytes; 0 if
    unknown."""
    of_device = options.device_memory_gib
    if not of_device and device is not None:
        of_device = device.memory_gib
    node = options.host_memory_gib or HOST_GIB_A_RANK * options.ranks_per_node
    return Room(device=int(of_device * GIB) or here, host=int(node * GIB / options.ranks_per_node))
