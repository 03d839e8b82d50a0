"""The privacy ledger: which releases of a run count as spent, written before they are made, in a file that only grows.

Releases are reserved in *leases*: a line, on the disk before the first release it covers, says how far the run may go. The
process that holds the lease can give the rest of it back when it ends; what a crash leaves of it counts as spent. So no
step waits for a disk, and nothing is released uncounted.

Each line is a JSON record that carries the SHA-256 of the chain up to it; checkpoints keep the chain's length and head.
`python -m fsdp_dp.ledger verify|show RUN` reads it. No torch here.

Records: `open` (mechanism, budget), `lease` (released so far, reserved until), `close` (released: the rest of the lease is
given back), `resume` (another process goes on; a larger budget extends the run). A record after a line that was cut short
carries the SHA-256 of what was left of it.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import secrets
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fsdp_dp import accounting
from fsdp_dp.config import PrivacyConfig, require_integer
from fsdp_dp.standing import FORMAT, LedgerError, Standing, after, counted_at_resume, mechanism_of, opened

LEDGER_FILE = "ledger.jsonl"
# The checkpoints in a run's folder, and what each says of itself, its anchor in the ledger included.
CHECKPOINTS, STATE_FILE = "checkpoints/step-*", "state.json"
UNDETECTED = (
    "Not detected: an old copy of the whole run put in its place (ledger and checkpoints together), lines cut off after "
    "the newest checkpoint, a chain computed anew, and two runs that went on from copies of one folder, each with its own "
    "ledger. Those releases add up, and nobody here counts them."
)
EXTENDED = (
    "The budget was raised after releases had been made. The epsilon above is that of all releases as one run; it is a "
    "guarantee only if going on did not depend on what had been seen. Otherwise it is the reading of a privacy odometer: a "
    "filter (Whitehouse et al. 2023, arXiv 2203.05481) would need its limit fixed before the first release."
)


class Anchor(NamedTuple):
    """How long the chain was, and its last link: what a checkpoint remembers of the ledger."""

    length: int
    head: str


# The file


class Chain(NamedTuple):
    """A ledger as read: its records, their links, and what is left of a line that was cut short (mostly nothing)."""

    records: list[dict[str, Any]]
    links: list[str]
    torn: bytes

    @property
    def anchor(self) -> Anchor:
        return Anchor(len(self.links), self.links[-1] if self.links else "")

    def standing(self) -> Standing:
        """Raises LedgerError if the records contradict each other."""
        standing = None
        for number, record in enumerate(self.records, start=1):
            try:
                standing = opened(record) if standing is None else after(standing, record)
            except (KeyError, TypeError) as error:
                raise LedgerError(f"record {number} is not one of a ledger: {error!r}") from error
            except LedgerError as error:
                raise LedgerError(f"record {number}: {error}") from error
        if standing is None:
            raise LedgerError("the ledger holds no record")
        return standing

    @property
    def counted(self) -> int:
        """Releases that count as spent, a line that was cut short included."""
        return counted_at_resume(self.standing(), torn=bool(self.torn))

    def check(self, anchor: Anchor) -> None:
        """Raises LedgerError unless the chain goes through `anchor`."""
        length, head = anchor
        if length > len(self.links) or (length and self.links[length - 1] != head):
            raise LedgerError(
                f"the checkpoint was written when the ledger had {length} records, the last {head[:12]}..., and this ledger "
                f"({len(self.links)} records) does not go through it: it was cut, or belongs to another run. Bring back the "
                "ledger of this run; without it, count the whole budget as spent"
            )


def link(before: str, record: Mapping[str, Any]) -> str:
    """The next link of the chain."""
    text = json.dumps({name: value for name, value in record.items() if name != "chain"}, sort_keys=True)
    return hashlib.sha256((before + text).encode()).hexdigest()


def read(path: Path) -> Chain:
    """Read a ledger and check its chain.

    Raises:
        LedgerError: a whole line does not continue the chain, so that the file was changed after it was written. A line
            that was cut short at the end is no error: it comes back in `torn`. Two that end in a newline are one: at most
            the last was being written, so the first is no line that a crash cut.
    """
    records: list[dict[str, Any]] = []
    links: list[str] = []
    torn: list[bytes] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        record = _parsed(line)
        if record is None:
            torn += [line] if line else []
            continue
        expected = link(links[-1] if links else "", record)
        if record["chain"] != expected or record.get("torn") != (_digest(b"\n".join(torn)) if torn else None):
            raise LedgerError(
                f"{path}: line {number} does not continue the chain: it, or a line before it, was changed after it was "
                "written. Bring back an unchanged copy; without one, count the whole budget as spent"
            )
        records.append(record)
        links.append(expected)
        torn = []
    ended = torn[:-1] if lines[-1] and torn else torn
    if len(ended) > 1:
        raise LedgerError(
            f"{path}: its last {len(torn)} lines are no records, and a crash cuts one: they were changed after they were "
            "written. Bring back an unchanged copy; without one, count the whole budget as spent"
        )
    return Chain(records, links, b"\n".join(torn))


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The record on a line, or None for a line that was cut short."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("chain"), str) else None


def _digest(torn: bytes) -> str:
    return hashlib.sha256(torn).hexdigest()


class Ledger:
    """The ledger as its one writer has it: rank 0 of a run.

    **Formal guarantee.** `standing.counted` is at least the number of releases made by all processes that ever held this
    file, provided that each made release n only after `hold(n)`, that a disk keeps what `fsync` reported as written, and
    that nobody restores an old copy of the file (`UNDETECTED`).

    Raises:
        LedgerError: the file was changed after it was written (`read`), or another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _hold(path)
        self._chain = read(path) if path.exists() else Chain([], [], b"")
        self.standing = self._chain.standing() if self._chain.records else None
        self._size = _size(path)
        self._turn = threading.RLock()
        self._broken = False

    @property
    def anchor(self) -> Anchor:
        return self._chain.anchor

    @property
    def counted(self) -> int:
        """Releases that count as spent, a line that was cut short included."""
        return 0 if self.standing is None else counted_at_resume(self.standing, torn=bool(self._chain.torn))

    def check(self, anchor: Anchor) -> None:
        """Raises LedgerError unless this ledger goes through a checkpoint's `anchor`."""
        self._chain.check(anchor)

    def begin(self, privacy: PrivacyConfig, noise_multiplier: float, *, lease: int) -> Standing:
        """Open the ledger of a new run, or go on with the run that is there: what a crash left of its lease is spent.

        Args:
            privacy: the mechanism, which has to be the run's, and `steps`, the budget; a larger one extends the run.
            lease: the most releases to reserve at a time: what a crash may cost.

        Raises:
            LedgerError: the mechanism is another one, or the budget smaller than what the run committed to.
            OSError: the disk is full or gone.
        """
        require_integer("lease", lease, at_least=1)
        mechanism = mechanism_of(privacy, noise_multiplier)
        options = {"target_delta": privacy.target_delta, "accountant": privacy.accountant}
        seeded = privacy.seed is not None
        common = {"budget": privacy.steps, "lease": lease, "options": options, "seeded": seeded}
        if self.standing is None:
            return self._append(
                {"kind": "open", "format": FORMAT, "run": secrets.token_hex(8), "mechanism": mechanism} | common
            )
        _check_mechanism(self.standing.mechanism, json.loads(json.dumps(mechanism)))
        if self.standing.budget is not None and (privacy.steps is None or privacy.steps < self.standing.budget):
            raise LedgerError(
                f"steps={privacy.steps} is less than the {self.standing.budget} releases that this run committed to; give at "
                "least as many. A run may end early, but its epsilon stays that of its budget"
            )
        if privacy.steps is not None and privacy.steps < self.counted:
            raise LedgerError(
                f"steps={privacy.steps} is less than the {self.counted} releases of this run that count as spent; give at "
                "least as many"
            )
        return self._append({"kind": "resume", "counted": self.counted} | common)

    def covers(self, release: int) -> bool:
        """Whether release number `release` may be made: it is reserved on the disk."""
        return self.standing is not None and self.standing.running and release <= self.standing.counted

    def hold(self, release: int) -> None:
        """See that release number `release` may be made; waits for the disk only where no lease covers it yet.

        Raises:
            LedgerError: the budget has no such release left.
            OSError: the disk is full or gone.
        """
        if not self.covers(release):
            self.reserve(release - 1)
        if not self.covers(release):
            assert self.standing is not None
            raise LedgerError(
                f"{self.path}: release {release} is past the last one, {self.standing.limit}, that the budget of this run "
                "has left: end training here, save and close; or start again with a larger budget, accounted as a whole"
            )

    def reserve(self, released: int) -> None:
        """Reserve the releases after `released`, as many as a lease holds and the budget has; returns when they are safe.

        A checkpoint's lease may come after that of a later step, from another thread: then it is held already.
        """
        with self._turn:
            assert self.standing is not None
            until = int(min(released + self.standing.lease, self.standing.limit))
            if until > self.standing.counted:
                self._append({"kind": "lease", "released": released, "until": until})

    def close(self, released: int) -> None:
        """Give back the rest of the lease: exactly `released` releases were made, and this process makes no more."""
        self._append({"kind": "close", "released": released})

    def _append(self, record: dict[str, Any]) -> Standing:
        """Write one record through to the disk; `standing` and `anchor` change only when it is there."""
        with self._turn:
            if self._broken:
                raise LedgerError(f"{self.path}: the last write failed; start the run again to go on with its ledger")
            records, links, torn = self._chain
            if torn:
                record = record | {"torn": _digest(torn)}
            standing = opened(record) if self.standing is None else after(self.standing, record)
            record["chain"] = link(self.anchor.head, record)
            self._broken = True
            self._check_only_writer()
            _write_through(self.path, json.dumps(record, sort_keys=True).encode())
            self._size = _size(self.path)
            self._broken = False
            self._chain = Chain([*records, record], [*links, record["chain"]], b"")
            self.standing = standing
            return standing

    def _check_only_writer(self) -> None:
        """No lock keeps one process from opening a ledger twice, nor works on every network file system."""
        if _size(self.path) != self._size:
            raise LedgerError(
                f"{self.path}: it has {_size(self.path)} bytes, where this writer left {self._size}: another one went on "
                "with the run, or the file was changed. End this one; a ledger has one writer, and one Ledger in a process"
            )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check_mechanism(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise LedgerError(
                f"{name} was {before.get(name)!r} when this run began and is {now.get(name)!r} now: its releases are one "
                "mechanism's, and its budget was fixed for that. Use the old value, or start another run and add up both "
                "epsilons"
            )


def _write_through(path: Path, line: bytes) -> None:
    """Append a line, on one of its own even after one that was cut short, and wait until the disk has it."""
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(file).st_size
        ends_in_newline = size == 0 or os.pread(file, 1, size - 1) == b"\n"
        _write_all(file, (b"" if ends_in_newline else b"\n") + line + b"\n")
        os.fsync(file)
    finally:
        os.close(file)
    if size == 0:
        sync_folder(path.parent)


def _write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hold(path: Path) -> int:
    """The lock of a ledger, until this process ends. A lock of lockf's kind: workers that are forked do not keep it."""
    lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(lock, 1000, 0).decode(errors="replace").strip()
        os.close(lock)
        raise LedgerError(
            f"{path.parent} is the folder of a run that another process works on ({holder}): wait for it, or end it. Two "
            "writers would release more than the ledger counts"
        ) from error
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return lock


# For people


def check_run(folder: Path) -> Chain:
    """The ledger of a run, after checking it and what the run's checkpoints remember of it. Raises LedgerError."""
    chain = read(folder / LEDGER_FILE)
    chain.standing()
    for checkpoint in sorted(folder.glob(CHECKPOINTS)):
        try:
            chain.check(anchor_in(checkpoint))
        except LedgerError as error:
            raise LedgerError(f"{checkpoint.name}: {error}") from error
    return chain


def anchor_in(checkpoint: Path) -> Anchor:
    """What a checkpoint remembers of the ledger. Raises LedgerError where it says nothing."""
    path = checkpoint / STATE_FILE
    try:
        length, head = json.loads(path.read_text(encoding="utf-8"))["ledger"]
        return Anchor(int(length), str(head))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LedgerError(
            f"{STATE_FILE} does not tell which ledger this checkpoint belongs to ({type(error).__name__}: {error}). Remove "
            "the checkpoint, and go on from the one before it: what was released since counts all the same"
        ) from error


def verdict(chain: Chain) -> str:
    """What `verify` says of a ledger that holds together."""
    torn = ", a last line that was cut short and counts as one more lease" if chain.torn else ""
    return f"ok: {len(chain.links)} records, unbroken{torn}; {chain.counted} releases count as spent"


def describe(chain: Chain) -> Iterator[str]:
    """What a ledger says, line by line."""
    standing = chain.standing()
    budget = "no budget" if standing.budget is None else f"a budget of {standing.budget}"
    yield f"run {standing.run}: {chain.counted} releases count as spent, of {budget}"
    if standing.running:
        yield f"  no end was written (a process works, or crashed): {standing.released} are settled, the rest is its lease"
    if standing.lost:
        yield f"  {standing.lost} of them were lost: leases that crashes left, releases after the last checkpoint"
    if chain.torn:
        yield "  the last line was cut short: it counts as one more lease"
    yield f"  {standing.sessions} start(s) of the run"
    for name, value in standing.mechanism.items():
        yield f"  {name} = {value}"
    delta = standing.options["target_delta"]
    yield f"epsilon <= {standing.epsilon(chain.counted).upper:.6g} at delta = {delta:g} for what is counted"
    if standing.budget is not None:
        yield f"epsilon <= {standing.epsilon(standing.budget).upper:.6g} for the whole budget: what a run reports"
    if standing.extended:
        yield EXTENDED
    if standing.seeded:
        yield "Seed fixed: no privacy guarantee."


def main(arguments: list[str] | None = None) -> int:
    """`python -m fsdp_dp.ledger verify|show RUN`; 1 if the ledger does not hold together."""
    parser = argparse.ArgumentParser(prog="python -m fsdp_dp.ledger", description="Reads the privacy ledger of a run.")
    parser.add_argument(
        "command",
        choices=("verify", "show"),
        help="verify: do chain and checkpoints hold together (exit status 0 or 1); show: what counts, and epsilon of it",
    )
    parser.add_argument("run", type=Path, help="the folder of the run")
    asked = parser.parse_args(arguments)
    try:
        chain = check_run(asked.run)
        lines = list(describe(chain)) if asked.command == "show" else [verdict(chain)]
    except FileNotFoundError as error:
        where = f"{asked.run} holds no ledger ({error.filename})"
        print(f"fsdp_dp.ledger: {where}. Name the folder that fsdp_dp.train wrote (output_dir)", file=sys.stderr)
        return 1
    except (LedgerError, accounting.AccountingError, OSError) as error:
        print(f"fsdp_dp.ledger: {error}", file=sys.stderr)
        return 1
    print(*lines, UNDETECTED, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
