"""Positions of the ranks of a job that hangs, and the rank that holds up the others."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

PRESSURE = 20.0
"""Percent of time lost to waiting for memory, above which a host is said to swap."""
READING_AHEAD = "reading ahead"
"""Description of the groups in which ranks agree on packs before the step asks for them."""
_STATES = {"T": "is stopped (SIGSTOP)", "t": "is stopped by a debugger", "Z": "has died"}
_NO_ANSWER = "does not answer: native code holds its interpreter"
_DOING = {
    "starting": "has not begun its first step",
    "loading": "waits for its loader: samples or their file system do not answer",
    "saving": "saves: the file system of the checkpoints does not answer",
    "restoring": "restores a checkpoint: the file system of the checkpoints does not answer",
}


@dataclass(kw_only=True)
class RankView:
    """State of a rank at the time when a hang is noticed."""

    rank: int
    host: str
    pid: int
    state: dict[str, Any] = field(default_factory=dict)  # its last message
    silent: float = 0.0  # seconds since it
    is_silent: bool = False
    pending: list[dict[str, Any]] = field(default_factory=list)  # collectives it waits for
    inspected: dict[str, Any] = field(default_factory=dict)  # of a silent one, by another process
    place: str = ""  # innermost frames of its main thread
    stacks: str = ""

    @property
    def idle(self) -> float:
        """Seconds since it has entered its phase."""
        return float(self.state.get("idle", 0.0)) + self.silent

    @property
    def where(self) -> str:
        """Step, micro-batch and phase, with the collective that it waits for."""
        text = f"step {self.state.get('step')}"
        if self.state.get("held_out"):
            text += ", validation"
        if self.state.get("micro_batch"):
            text += f", micro-batch {self.state['micro_batch']}"
        text += f", {self.state.get('phase')}"
        if self.collective is not None:
            text += f", in {describe_collective(self.collective)}"
        return text

    @property
    def collective(self) -> dict[str, Any] | None:
        """Collective that the main thread waits in: the oldest that is not completed, since the
        later ones of its group are queued behind it; None outside of any."""
        waits_for_pack = self.state.get("phase") == "loading"
        for collective in self.pending:
            # Another thread reads packs ahead; its waits hold up the step only where that waits.
            if waits_for_pack or not collective["group"].endswith(READING_AHEAD):
                return collective
        return None


@dataclass(frozen=True, kw_only=True)
class Culprit:
    """A rank that holds up the others, and why."""

    rank: int
    reason: str


def find_culprits(views: Sequence[RankView]) -> list[Culprit]:
    """Return the ranks that the others wait for.

    Silent ones first; or else those that are in no collective; or else those whose collectives are
    not the others'.
    """
    if silent := [view for view in views if view.is_silent]:
        return [Culprit(rank=view.rank, reason=_reason_for_silence(view)) for view in silent]
    busy = [view for view in views if view.collective is None]
    if busy:
        longest = max(view.idle for view in busy)
        # A rank that has just gone on is not the one: it is on its way to the collective.
        stuck = [view for view in busy if view.idle > longest / 2]
        return [Culprit(rank=view.rank, reason=_reason_outside(view)) for view in stuck]
    return list(_find_disagreement(views))


def _reason_for_silence(view: RankView) -> str:
    state = view.inspected.get("state")
    if state == "":
        return "is gone"
    if state in _STATES:
        return _STATES[state]
    pressure = view.inspected.get("pressure", 0.0)
    if pressure > PRESSURE:
        return f"does not answer: its host waits for memory {pressure:.0f} % of the time, it swaps"
    if state == "D":
        return "does not answer: it waits for a disk or a file system"
    if state is None:
        return "does not answer, nor does any rank of its host"
    return _NO_ANSWER


def _reason_outside(view: RankView) -> str:
    phase = str(view.state.get("phase"))
    return f"{_DOING.get(phase, f'stays in {phase}')} (at {view.place})"


def _find_disagreement(views: Sequence[RankView]) -> Iterator[Culprit]:
    """Find ranks whose collective is not the one that the rest of its group is in."""
    by_group: dict[str, list[tuple[RankView, dict[str, Any]]]] = defaultdict(list)
    for view in views:
        assert view.collective is not None, "ranks outside of collectives are reported before"
        by_group[view.collective["group"]].append((view, view.collective))
    for members in by_group.values():
        # What most are in is right; of two, what the lower rank is in.
        signatures = Counter(_signature(collective) for _, collective in members)
        most = signatures.most_common(1)[0][0]
        awaited = next(c for _, c in members if _signature(c) == most)
        for view, collective in members:
            if _signature(collective) != most:
                reason = f"is in {describe_collective(collective)} while others are in {describe_collective(awaited)}"
                yield Culprit(
                    rank=view.rank, reason=f"{reason}: it has skipped one, or has one more"
                )
        yield from _find_absent(awaited, views=views, present={view.rank for view, _ in members})


def _find_absent(
    collective: dict[str, Any], *, views: Sequence[RankView], present: set[int]
) -> Iterator[Culprit]:
    for view in views:
        if view.rank in collective["ranks"] and view.rank not in present:
            assert view.collective is not None, "ranks outside of collectives are reported before"
            yield Culprit(
                rank=view.rank,
                reason=f"is in {describe_collective(view.collective)} while others wait for it in "
                f"{describe_collective(collective)}",
            )


def _signature(collective: dict[str, Any]) -> tuple[Any, ...]:
    return collective["name"], collective["number"], str(collective["sizes"])


def describe_collective(collective: dict[str, Any]) -> str:
    """Describe a collective: name, number in its group, shapes, group, as far as they are known."""
    parts = [collective["name"]]
    if collective["number"] is not None:
        parts.append(str(collective["number"]))
    parts += [str(list(size)) for size in collective["sizes"]]
    if collective["group"]:
        parts.append(f"of {collective['group']}")
    return " ".join(parts)


def unrecorded_wait(place: str) -> list[dict[str, Any]]:
    """Return the communication that a main thread waits in by its frames, where torch records none.

    place: innermost frames, as `Beacon` describes them; torch does not record gloo's messages
        between two ranks.
    """
    innermost = place.split(" < ")[0]
    if "distributed/distributed_c10d.py" not in innermost:
        return []
    return [
        {"name": innermost.split(" ")[0], "number": None, "sizes": [], "group": "", "ranks": []}
    ]


def summarize(views: Sequence[RankView], *, seconds: float) -> str:
    """Say in one line which rank holds up the job, where it is, and the samples of its pack."""
    culprits = find_culprits(views)
    by_rank = {view.rank: view for view in views}
    if not culprits:
        first = views[0]
        return f"no progress for {seconds:.0f} s, and no rank differs: all are in {first.where}"
    lines = []
    for culprit in culprits[:4]:
        view = by_rank[culprit.rank]
        samples = ", ".join(view.state.get("keys", [])[:3])
        text = f"rank {view.rank} on {view.host} {culprit.reason}; {view.where}"
        lines.append(f"{text}; samples {samples}" if samples else text)
    more = f"; {len(culprits) - 4} more ranks" if len(culprits) > 4 else ""
    return f"no progress for {seconds:.0f} s: {'; '.join(lines)}{more}"


def write_report(views: Sequence[RankView], *, seconds: float) -> str:
    """Return the report of a hang: the summary, a line for each rank, samples and stacks."""
    lines = [summarize(views, seconds=seconds), ""]
    for view in views:
        lines.append(
            f"rank {view.rank} on {view.host}, process {view.pid}: {view.where}, {view.idle:.1f} s"
        )
        if view.is_silent:
            lines.append(f"  silent for {view.silent:.1f} s: {_reason_for_silence(view)}")
        if view.place:
            lines.append(f"  at {view.place}")
    for view in views:
        lines += ["", f"rank {view.rank}: samples of its pack"]
        lines += [f"  {key}" for key in view.state.get("keys", [])] or ["  none"]
        lines += [f"rank {view.rank}: collectives not completed"]
        lines += [f"  {describe_collective(c)}" for c in view.pending] or ["  none"]
        lines += [f"rank {view.rank}: stacks", view.stacks or "  none: it does not answer"]
    return "\n".join(lines) + "\n"
