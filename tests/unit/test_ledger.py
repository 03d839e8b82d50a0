"""The ledger counts every release before it is made, whatever a crash leaves of the file, and notices what it can.

Docstrings say what was broken on purpose to see a test fail.
"""

import json
import random
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fsdp_dp import ledger as ledger_module
from fsdp_dp.accounting import epsilon
from fsdp_dp.config import PrivacyConfig
from fsdp_dp.ledger import LEDGER_FILE, UNDETECTED, Anchor, Ledger, main, read
from fsdp_dp.standing import LedgerError

PRIVACY = PrivacyConfig(
    max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=10, dataset_size=1000, target_delta=1e-5, steps=100
)
LEASE = 12


def begin(path: Path, privacy: PrivacyConfig = PRIVACY, lease: int = LEASE) -> Ledger:
    """A process that takes the run over; the one before it is gone, whatever it wrote."""
    ledger = Ledger(path)
    ledger.begin(privacy, 1.0, lease=lease)
    return ledger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / LEDGER_FILE


def test_a_lease_is_given_back_by_the_process_that_ends(path):
    ledger = begin(path)
    assert not ledger.covers(1)
    ledger.reserve(0)
    assert ledger.covers(12) and not ledger.covers(13)
    ledger.reserve(9)
    assert ledger.covers(21) and not ledger.covers(22)
    ledger.close(15)
    assert not ledger.covers(16)
    standing = read(path).standing()
    assert (standing.counted, standing.released, standing.lost, standing.running) == (15, 15, 0, False)
    assert begin(path).standing.counted == 15


def test_what_a_crash_leaves_of_a_lease_is_spent(path):
    """Seen to fail when a resume starts from what the last lease's line says was released."""
    begin(path).reserve(0)
    second = begin(path)
    assert (second.standing.counted, second.standing.lost) == (12, 12)
    second.reserve(12)
    assert second.standing.counted == 24


def test_leases_never_pass_the_budget(path):
    ledger = begin(path)
    for released in range(0, 100, 10):
        ledger.reserve(released)
    ledger.reserve(100)
    assert ledger.standing.counted == 100
    assert not ledger.covers(101)
    with pytest.raises(
        LedgerError, match=r"release 101 is past the last one, 100, that the budget of this run has left"
    ):
        ledger.hold(101)
    ledger.close(100)
    with pytest.raises(LedgerError, match="release 101 is past the last one"):
        begin(path).hold(101)


def test_no_budget_is_no_limit(path):
    ledger = begin(path, replace(PRIVACY, steps=None))
    for released in range(0, 1000, 10):
        ledger.reserve(released)
    assert ledger.covers(1002) and not ledger.covers(1003)
    with pytest.raises(LedgerError, match="a lease from 2000 until 2012, where 1002 were counted"):
        ledger.reserve(2000)


@pytest.mark.parametrize("last", ["open", "lease", "close"])
def test_a_line_cut_short_anywhere_counts_as_one_more_lease(path, last):
    """Seen to fail when a torn line counts nothing, and when the next record does not tell what was torn."""
    ledger = begin(path)
    if last != "open":
        ledger.reserve(0)
    if last == "close":
        ledger.close(7)
    whole = path.read_bytes()
    start = whole[:-1].rfind(b"\n") + 1
    counted = {"open": 0, "lease": 0, "close": 12}[last]
    for cut in range(start + 1, len(whole) - 1, 7):
        path.write_bytes(whole[:cut])
        resumed = begin(path)
        expected = 0 if last == "open" else counted + LEASE
        assert resumed.standing.counted == expected, cut
        resumed.reserve(resumed.standing.counted)
        assert read(path).standing() == resumed.standing
    path.write_bytes(whole[:-1])  # all of the record is there, without its newline
    assert begin(path).standing.counted == {"open": 0, "lease": 12, "close": 7}[last]


def test_a_repair_that_is_cut_short_is_repaired(path):
    begin(path).reserve(0)
    with path.open("ab") as file:
        file.write(b'{"kind": "lea')
    first = path.read_bytes()
    begin(path)
    repair = path.read_bytes()[len(first) :]
    for cut in range(1, len(repair) - 1, 11):
        path.write_bytes(first + repair[:cut])
        assert begin(path).standing.counted == 24, cut
        assert begin(path).standing.counted == 24, cut


def test_no_crash_loses_a_release(path):
    """Processes that die at random, most of them in the middle of a line: what is counted is never less than what was made.

    Seen to fail when `covers` is true before the line is on the disk.
    """
    random.seed(7)
    made: set[int] = set()
    while True:
        ledger = begin(path, lease=random.choice([1, 3, 8]))
        start = ledger.standing.counted
        assert start >= max(made, default=0)
        if start >= 100:
            break
        ledger.reserve(start)
        release, life = start, random.randrange(12)
        for _ in range(life):
            if release + 1 > ledger.standing.limit:
                break
            ledger.hold(release + 1)
            release += 1
            made.add(release)
        if random.random() < 0.2:
            ledger.close(release)
        elif random.random() < 0.5:
            with path.open("ab") as file:
                file.write(random.choice([b"{", b'\n{"chain": "12', b"\0\0\0"]))
    assert max(made) <= 100
    assert read(path).standing().counted == 100


def test_any_change_to_a_whole_line_is_noticed(path):
    """Seen to fail when the chain covers only the record's own line."""
    ledger = begin(path)
    for released in (0, 10, 20):
        ledger.reserve(released)
    lines = path.read_text().splitlines(keepends=True)
    for number, line in enumerate(lines):
        changed = json.loads(line)
        changed["until" if number else "budget"] = 1
        for broken in (
            [json.dumps(changed) + "\n"],
            [],
            ["{}\n"] if number + 1 < len(lines) else [json.dumps(changed)],
        ):
            text = "".join(lines[:number] + broken + lines[number + 1 :])
            if number + 1 == len(lines) and not broken:
                continue  # a line missing from the end is for the anchors of checkpoints
            path.write_text(text)
            with pytest.raises(LedgerError, match=r"does not continue the chain"):
                read(path)


def test_a_checkpoint_notices_a_ledger_that_was_cut_or_replaced(path, tmp_path):
    ledger = begin(path)
    ledger.reserve(0)
    anchor = ledger.anchor
    ledger.reserve(10)
    read(path).check(anchor)
    read(path).check(Anchor(0, ""))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0])
    with pytest.raises(LedgerError, match=r"2 records.*this ledger \(1 records\)"):
        read(path).check(anchor)
    other = begin(tmp_path / "other" / LEDGER_FILE)
    other.reserve(0)
    with pytest.raises(LedgerError, match="belongs to another run"):
        other.check(anchor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_grad_norm": 2.0}, "max_grad_norm was 1.0 when this run began and is 2.0 now"),
        ({"expected_batch_size": 20}, "expected_batch_size was 10"),
        ({"sampling": "shuffle"}, "sampling was 'poisson'"),
        ({"steps": 99}, "steps=99 is less than the 100 releases"),
        ({"steps": None}, "steps=None is less"),
    ],
)
def test_another_mechanism_or_a_smaller_budget_is_refused(path, change, message):
    begin(path)
    with pytest.raises(LedgerError, match=message):
        begin(path, replace(PRIVACY, **change))
    with pytest.raises(LedgerError, match=r"noise_multiplier was 1.0"):
        Ledger(path).begin(PRIVACY, 1.0000001, lease=LEASE)


def test_an_extended_run_is_accounted_as_a_whole(path, capsys):
    ledger = begin(path)
    for released in range(0, 100, 10):
        ledger.reserve(released)
    ledger.close(100)
    extended = begin(path, replace(PRIVACY, steps=150, target_delta=1e-6))
    extended.reserve(100)
    assert extended.standing.extended and extended.standing.limit == 150
    assert main(["show", str(path.parent)]) == 0
    shown = capsys.readouterr().out
    whole = epsilon(noise_multiplier=1.0, sample_rate=0.01, steps=150, delta=1e-6).upper
    assert f"epsilon <= {whole:.6g} for the whole budget" in shown
    assert "odometer" in shown and UNDETECTED in shown


def test_shuffling_counts_the_epochs_that_each_process_touched(path):
    """A new process starts a new epoch, so a row of a broken one may come again. 10 releases an epoch, 5 epochs."""
    privacy = PrivacyConfig(
        max_grad_norm=1.0,
        noise_multiplier=1.0,
        expected_batch_size=10,
        dataset_size=100,
        target_delta=1e-5,
        steps=50,
        sampling="shuffle",
    )
    first = begin(path, privacy, lease=4)
    for released in (0, 4, 8):
        first.reserve(released)
    assert (first.standing.counted, first.standing.epochs) == (12, 2)
    second = begin(path, privacy, lease=4)
    assert (second.standing.epochs, second.standing.limit) == (2, 42)
    second.reserve(12)
    assert second.standing.epochs == 3
    expected = epsilon(noise_multiplier=1.0, sample_rate=1.0, steps=3, delta=1e-5).upper
    assert second.standing.epsilon().upper == pytest.approx(expected)


def test_a_checkpoints_lease_may_come_after_that_of_a_later_step(path, monkeypatch):
    """A step that the lease does not cover waits for the disk; the thread of the checkpoint before it comes second.

    Seen to fail when what to reserve is settled before it is this thread's turn to write.
    """
    ledger = begin(path)
    ledger.reserve(0)
    write, others = ledger_module._write_through, []

    def slow(*arguments):
        late = threading.Thread(target=lambda: others.append(outcome(lambda: ledger.reserve(8))))
        late.start()
        time.sleep(0.2)  # the late one is under way by now, and waits for its turn
        write(*arguments)
        monkeypatch.setattr("fsdp_dp.ledger._write_through", write)
        others.append(late)

    monkeypatch.setattr("fsdp_dp.ledger._write_through", slow)
    ledger.reserve(12)
    others[0].join()
    assert others[1:] == [None]
    assert (ledger.standing.released, ledger.standing.counted) == (12, 24)


def outcome(call):
    """What a call raised."""
    try:
        call()
    except Exception as error:
        return error


def test_a_failed_write_ends_the_ledger(path, monkeypatch):
    ledger = begin(path)

    def full(file: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.write", full)
        with pytest.raises(OSError, match="No space left"):
            ledger.reserve(0)
    assert not ledger.covers(1)
    with pytest.raises(LedgerError, match="the last write failed"):
        ledger.reserve(0)


def test_the_second_writer_is_refused(path):
    """Seen to fail without the lock."""
    holder = begin(path)
    code = f"from pathlib import Path; from fsdp_dp.ledger import Ledger; Ledger(Path({str(path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "another process works on (process " in done.stderr
    assert holder.standing.counted == 0


def test_a_second_writer_of_the_same_process_ends_the_first(path):
    """The lock does not tell them apart. What the first may still release is counted by the second as spent.

    Seen to fail without the check of the file's size: both went on, and each counted its own.
    """
    writers = [begin(path)]
    writers[0].reserve(0)
    writers.append(begin(path))
    made = 0
    with pytest.raises(LedgerError, match="another one went on with the run"):
        for release in range(1, 101):
            writers[0].hold(release)
            made += 1
    for release in range(writers[1].standing.session_start + 1, 101):
        writers[1].hold(release)
        made += 1
    assert made <= 100 == read(path).standing().counted


def test_a_first_budget_is_no_smaller_than_what_is_spent(path):
    """Seen to fail when only an earlier budget is a floor: `show` then had an epsilon of 5 releases as the run's."""
    begin(path, replace(PRIVACY, steps=None)).reserve(0)
    with pytest.raises(LedgerError, match="steps=5 is less than the 12 releases of this run that count as spent"):
        begin(path, replace(PRIVACY, steps=5))
    assert begin(path, replace(PRIVACY, steps=12)).standing.budget == 12


def test_verify_says_whether_ledger_and_checkpoints_agree(path, capsys):
    ledger = begin(path)
    ledger.reserve(0)
    state = path.parent / "checkpoints" / "step-00000003" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"ledger": ledger.anchor}))
    assert main(["verify", str(path.parent)]) == 0
    assert capsys.readouterr().out == f"ok: 2 records, unbroken; 12 releases count as spent\n{UNDETECTED}\n"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    assert main(["verify", str(path.parent)]) == 1
    assert "step-00000003: the checkpoint was written when the ledger had 2 records" in capsys.readouterr().err
    for damaged in ('{"ledger": null}', '{"step"', "[]"):
        state.write_text(damaged)
        assert main(["verify", str(path.parent)]) == 1
        assert "step-00000003: state.json does not tell which ledger" in capsys.readouterr().err
    state.unlink()
    assert main(["show", str(path.parent)]) == 1
    assert main(["show", str(path.parent / "nowhere")]) == 1


def test_verify_says_which_folder_it_wants(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path} holds no ledger" in said and "output_dir" in said and "Errno" not in said


def test_lines_at_the_end_that_were_changed_never_lower_the_count(path, capsys):
    """One counts as one more lease for `verify` too; more than one is refused, since a crash cuts no more.

    Seen to fail when `verify` counts whole lines only, and when lines at the end that are no records count as one.
    """
    ledger = begin(path)
    for release in range(1, 3 * LEASE + 1):
        ledger.hold(release)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][1:])
    assert main(["verify", str(path.parent)]) == 0
    assert "36 releases count as spent" in capsys.readouterr().out
    for tail in (b"", b"{"):
        path.write_bytes(b"".join(lines[:-2]) + lines[-2][1:] + lines[-1][1:] + tail)
        assert main(["verify", str(path.parent)]) == 1
        assert "lines are no records, and a crash cuts one" in capsys.readouterr().err
        with pytest.raises(LedgerError, match="count the whole budget as spent"):
            Ledger(path)


def test_show_says_what_is_not_settled(path, capsys):
    begin(path, replace(PRIVACY, seed=1)).reserve(0)
    with path.open("ab") as file:
        file.write(b"{")
    main(["show", str(path.parent)])
    shown = capsys.readouterr().out
    for part in (
        "24 releases count as spent, of a budget of 100",
        f"epsilon <= {epsilon(noise_multiplier=1.0, sample_rate=0.01, steps=24, delta=1e-5).upper:.6g} at",
        "0 are settled",
        "cut short",
        "Seed fixed",
        "sampling = ",
    ):
        assert part in shown
