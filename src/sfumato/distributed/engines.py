"""The choice of how processes share a network, by the memory that each of them needs."""

from __future__ import annotations

from dataclasses import dataclass

from sfumato.distributed.sharding import Engine, EngineName, Sharded
from sfumato.distributed.world import World
from sfumato.errors import ConfigError

SHARE = 0.5  # of a process's memory that weights and all that goes with them may take; the rest is for activations
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a training holds besides activations, in float32.

    Attributes:
        parameters: of the network.
        trained: those that are trained.
        averages: how many averages of the weights are kept.
        largest_unit: parameters of the largest unit, which is gathered as a whole.
    """

    parameters: int
    trained: int
    averages: int
    largest_unit: int

    def gib(self, shards: int = 1) -> float:
        """Return the memory of a process, if so many of them share a network: weights, and for those
        that are trained gradients, two moments and averages; and one whole unit with its gradient.
        """
        held = self.parameters + (3 + self.averages) * self.trained
        gathered = 2 * self.largest_unit if shards > 1 else 0
        return 4 * (held / shards + gathered) / GIB


def size_text(gib: float) -> str:
    """Return a size in GiB, or in MiB if it is small."""
    return f"{gib:.2f} GiB" if gib >= 1 else f"{1024 * gib:.1f} MiB"


def choose_name(
    name: EngineName, footprint: Footprint, *, memory_gib: float, size: int, per_machine: int
) -> EngineName:
    """Return `name`, or for `auto` the engine that needs the least communication and fits.

    Args:
        memory_gib: of one process.
        size, per_machine: processes, of all machines and of one.
    """
    if name != "auto":
        return name
    if footprint.gib() <= SHARE * memory_gib:
        return "replicate"
    several_machines = per_machine < size
    return (
        "hybrid"
        if several_machines and footprint.gib(per_machine) <= SHARE * memory_gib
        else "shard"
    )


def copies_of(name: EngineName, *, size: int, per_machine: int) -> int:
    """Return how many copies of the network an engine keeps.

    Raises:
        ConfigError: if the machines have unequal numbers of processes.
    """
    if name == "replicate":
        return size
    if name == "shard":
        return 1
    if size % per_machine:
        raise ConfigError(
            f"{size} processes are not a multiple of the {per_machine} of this machine",
            where="distributed=hybrid",
            hint="start equally many processes on each machine, or set distributed=shard",
        )
    return size // per_machine


def make_engine(name: EngineName, world: World, *, per_machine: int) -> Engine:
    """Return the engine of a name other than `auto`; one process holds all of a network."""
    copies = copies_of(name, size=world.size, per_machine=per_machine)
    return Engine(world) if copies == world.size else Sharded(world, copies=copies)


def describe_engine(name: EngineName, footprint: Footprint, *, size: int, per_machine: int) -> str:
    """Return one line about how processes share a network, and the memory that it takes."""
    shards = size // copies_of(name, size=size, per_machine=per_machine)
    held = {
        "replicate": "each holds the whole network",
        "shard": f"each holds 1/{shards} of the network",
        "hybrid": f"each holds 1/{shards} of the network, of which there are {size // shards} copies",
    }[name]
    return (
        f"{size} processes: {held} (distributed={name}); weights, gradients, moments and averages take "
        f"{size_text(footprint.gib(shards))} in each, activations not counted"
    )
