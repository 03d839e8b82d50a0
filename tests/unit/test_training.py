"""The application's parts that need no process group: schedule, budget, batches, shares, report."""

import itertools
import math
import os
import signal
import threading
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.distributed.elastic.multiprocessing.api import SignalException

from fsdp_dp import PrivacyConfig, launch
from fsdp_dp.accounting import epsilon
from fsdp_dp.data.corpus import Corpus
from fsdp_dp.data.packing import RowDataset
from fsdp_dp.ledger import Ledger
from fsdp_dp.models.build import parameter_count
from fsdp_dp.models.objective import BITS_PER_BYTE, bits, hits
from fsdp_dp.standing import LedgerError, opened
from fsdp_dp.training.app import as_reported, check_counted, check_extension, explained, lease, prepare
from fsdp_dp.training.batches import endless_permutations
from fsdp_dp.training.budget import MOST_POINTS, Budget, plan_budget
from fsdp_dp.training.evaluate import evenly_spaced
from fsdp_dp.training.fellows import Fellows
from fsdp_dp.training.interrupt import stop_on_signals
from fsdp_dp.training.metrics import RunLog, finite_or_text
from fsdp_dp.training.report import (
    Outcome,
    assumptions,
    claim,
    guarantee,
    headline,
    setup,
    summarize,
    unprotected,
)
from fsdp_dp.training.run_folder import check_folder, last_step, whole_lines, write_config
from fsdp_dp.training.schedule import learning_rate
from fsdp_dp.training.schema import OptimizerConfig, PrivacyOptions, TrainConfig
from fsdp_dp.training.world import check_device, choose_device

PRIVACY = PrivacyConfig(
    max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=10, dataset_size=1000, target_delta=1e-5, steps=200
)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate_warms_up_and_then_never_rises(schedule):
    config = OptimizerConfig(learning_rate=0.1, schedule=schedule, warmup_steps=5)
    rates = [learning_rate(config, step, 50) for step in range(1, 51)]
    assert rates[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[4:]))
    assert rates[-1] > 0
    assert (rates[-1] == 0.1) == (schedule == "constant")


def test_learning_rate_of_runs_shorter_than_the_warm_up():
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=10)
    assert [learning_rate(config, step, 2) for step in (1, 2)] == pytest.approx([0.05, 0.1])
    assert learning_rate(replace(config, warmup_steps=0), 1, 1) > 0


def test_budget_is_an_upper_bound_at_every_step():
    budget = plan_budget(PRIVACY, 1.0, 200)
    assert len(budget.steps) <= MOST_POINTS
    assert budget.epsilon(0) == 0.0
    for step in (1, 7, 100, 199, 200):
        exact = epsilon(noise_multiplier=1.0, sample_rate=0.01, steps=step, delta=1e-5)
        assert exact.lower <= budget.epsilon(step)
        # Bounds at different grids differ by their widths; the table never falls below the number it stands for.
        assert budget.epsilon(step) >= exact.estimate
    assert budget.cap == budget.epsilon(200)
    shown = [budget.epsilon(step) for step in range(201)]
    assert shown == sorted(shown)


def test_a_run_of_one_step_has_a_budget():
    assert plan_budget(PRIVACY, 1.0, 1).steps == (1,)


def test_permutations_hold_each_row_once_an_epoch():
    order = endless_permutations(7, seed=3)
    epochs = [[next(order) for _ in range(7)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    again = endless_permutations(7, seed=3)
    assert [next(again) for _ in range(7)] == epochs[0]


def test_evenly_spaced_rows():
    assert evenly_spaced(50, 3).tolist() == [0, 24, 49]
    assert evenly_spaced(50, 80).tolist() == list(range(50))


def test_bits_are_of_predicted_targets_in_rows_that_count():
    """Seen to fail when rows that do not count are added all the same."""
    targets = torch.tensor([[1, 2, -100, -100], [1, 2, 3, 4], [1, 2, 3, 4]])
    losses, counts = torch.tensor([0.5, 1.0, 9.0]), torch.tensor([True, True, False])
    found = bits(torch.zeros(3, 4, 5), targets, losses, counts)
    assert found.tolist() == pytest.approx([6.0 / math.log(2), 6])
    assert bits(torch.zeros(0, 4, 5), targets[:0], losses[:0], counts[:0]).tolist() == [0.0, 0.0]


def test_hits_are_rows_of_the_right_class():
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    counts = torch.tensor([True, True, True, False])
    assert hits(logits, torch.tensor([1, 0, 0, 0]), torch.zeros(4), counts).tolist() == [2.0, 3.0]


def test_parameters_are_counted_without_building_them():
    assert parameter_count(TrainConfig().model) == 141_056


def test_ctrl_c_is_noted_and_its_echo_ignored():
    before = signal.getsignal(signal.SIGINT)
    with stop_on_signals() as stop:
        assert not stop.made
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.made
        stop.at -= 10
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_sigterm_is_noted_and_usr1_asks_for_another_start():
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.made and not stop.requeue
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.requeue


def test_metrics_of_an_interrupted_run_go_on(tmp_path):
    """A line that a crash cut short goes, and so does what was written of steps that were not reached."""
    values = {"score": math.nan, "rows_per_second": 1.0, "useful_rows": 0.5}
    log = RunLog(tmp_path, 10)
    for step in (1, 2, 3):
        log.step(step, 0.1 * step, 0.01, values)
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "eps')
    log = RunLog(tmp_path, 10, done=2)
    log.step(3, 0.3, 0.01, values)
    log.close()
    assert [record["step"] for record in whole_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    steps, shown = log.series("training_bits_per_byte")
    assert steps == [1, 2, 3] and all(map(math.isnan, shown))
    assert log.mean("useful_rows") == 0.5


def test_without_diagnostics_no_clock_runs(tmp_path, capsys):
    """Seen to fail: TensorBoard had the time of each step, the progress bar its speed; both tell how many rows were drawn."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pages = []
    for number, seconds in enumerate((0.0, 0.02)):
        (tmp_path / str(number)).mkdir()
        log = RunLog(tmp_path / str(number), 5, diagnostics=False)
        for step in range(1, 6):
            time.sleep(seconds)
            log.step(step, 0.1 * step, 0.01, {"score": 2.5 + seconds, "rows_per_second": 1.0, "useful_rows": 0.5})
        log.close()
        board = accumulator.EventAccumulator(str(tmp_path / str(number) / "tensorboard")).Reload()
        assert board.Tags()["scalars"] == ["epsilon", "learning_rate"]
        times = [[event.wall_time for event in board.Scalars(name)] for name in board.Tags()["scalars"]]
        assert times == [[1.0, 2.0, 3.0, 4.0, 5.0]] * 2
        pages.append((capsys.readouterr().err, (tmp_path / str(number) / "metrics.jsonl").read_text()))
    assert pages[0] == pages[1] and "5/5" in pages[0][0] and "ε=0.500" in pages[0][0]


def test_diagnostics_are_marked_where_they_are_shown(tmp_path, capsys):
    """Seen to fail: on the terminal and at the head of report.md, scores stood beside epsilon as if it covered them."""
    log = RunLog(tmp_path, 1)
    log.step(1, 0.1, 0.01, {"score": 2.5, "rows_per_second": 1.0, "useful_rows": 0.5})
    log.close()
    assert "not private: bits per byte=2.500" in capsys.readouterr().err
    assert "3.500" in headline(OUTCOME) and "bits per byte (not private)" in headline(OUTCOME)
    lines = summarize(OUTCOME, tmp_path).splitlines()
    assert [line.endswith("not private") for line in lines if "held-out" in line] == [True]


def test_a_run_that_was_stopped_says_how_to_go_on(tmp_path):
    """Seen to fail: after Ctrl-C the last line was torchrun's, and resume=true was in the help alone."""
    whole = replace(OUTCOME, steps=OUTCOME.config.steps)
    assert "resume=true" not in summarize(whole, tmp_path)
    stopped = summarize(replace(whole, steps=whole.steps - 1), tmp_path)
    assert stopped.endswith(f"resume=true output_dir={tmp_path}")


def test_a_launcher_that_was_signalled_ends_without_a_traceback(monkeypatch):
    """Seen to bury what rank 0 said last under torchrun's SignalException."""

    def signalled(arguments: list[str]) -> None:
        raise SignalException("Process 1 got signal: 2", sigval=signal.SIGINT)

    before = signal.getsignal(signal.SIGUSR1)
    monkeypatch.setattr(launch, "torchrun", signalled)
    try:
        assert launch.main([]) == 130
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_without_diagnostics_no_report_says_how_long_it_took(tmp_path):
    """Seen to fail: the time of all steps tells how many rows they drew."""
    for seconds in (60.0, 7000.0):
        timed = replace(OUTCOME, seconds=seconds)
        assert f"{seconds:.0f} s" in summarize(timed, tmp_path) and f"{seconds:.0f} s" in setup(timed)
        silent = replace(timed, config=replace(timed.config, diagnostics=False))
        assert f"{seconds:.0f} s" not in summarize(silent, tmp_path) + setup(silent) + headline(silent) + unprotected(
            silent
        )


def test_diagnostics_that_are_written_are_not_called_off(tmp_path):
    """Seen to fail: a run that went on with diagnostics=false kept the losses, and its report said it wrote down none."""
    config = TrainConfig(output_dir=str(tmp_path), resume=True, privacy=PrivacyOptions(mechanism="none"))
    write_config(config, tmp_path)
    silent = replace(config, diagnostics=False)
    for metrics, is_said in (('{"training_bits_per_byte": 2}', True), ("{}", False)):
        (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "outside_the_guarantee": {metrics}}}\n')
        check_folder(config)
        with pytest.raises(ValueError, match="wrote down what epsilon does not cover") if is_said else nullcontext():
            check_folder(silent)


def test_the_first_failure_is_everybodys(monkeypatch):
    """Seen to fail when the second failure takes the place of the first."""
    monkeypatch.setattr("fsdp_dp.training.fellows.SECONDS_BETWEEN_LOOKS", 0.01)
    store = torch.distributed.HashStore()
    ranks = [Fellows(store, rank) for rank in range(12)]
    heard = []
    with ranks[0].watched(heard.append), ranks[1].watched(heard.append):
        assert ranks[1].first_failure("ValueError: no luck") is None
        time.sleep(0.1)
    assert heard == ["rank 1: ValueError: no luck"]
    assert ranks[11].first_failure("RuntimeError: lost") == "rank 1: ValueError: no luck"


class SlowStore:
    """Whose host takes its time to answer."""

    def __init__(self):
        self.asked, self.answered = threading.Event(), threading.Event()

    def check(self, keys):
        self.asked.set()
        time.sleep(0.3)
        self.answered.set()
        return False


def test_no_look_at_the_store_outlives_the_run(monkeypatch):
    """Seen to fail: the thread was left behind in its look, and could abort a run that had ended well as Python went down."""
    monkeypatch.setattr("fsdp_dp.training.fellows.SECONDS_BETWEEN_LOOKS", 0.01)
    store = SlowStore()
    with Fellows(store, 0).watched(lambda message: None):
        assert store.asked.wait(5)
    assert store.answered.is_set()
    assert not any(thread.name == "fellows" and thread.is_alive() for thread in threading.enumerate())


def run_config(folder, **changes):
    return TrainConfig(output_dir=str(folder), **changes)


def test_a_folder_is_taken_unless_its_run_goes_on(tmp_path):
    check_folder(run_config(tmp_path / "new"))
    check_folder(run_config(tmp_path, resume=True))
    write_config(run_config(tmp_path), tmp_path)
    (tmp_path / "ledger.jsonl").touch()
    with pytest.raises(ValueError, match="already holds a run: go on with it by resume=true"):
        check_folder(run_config(tmp_path))
    # Sharding, microbatches and the length may change; what is trained on what may not.
    check_folder(run_config(tmp_path, resume=True, microbatch_size=7, steps=900))
    with pytest.raises(ValueError, match=r"batch_size was 512 when the run in .* began and is 100 now"):
        check_folder(run_config(tmp_path, resume=True, batch_size=100))
    with pytest.raises(ValueError, match=r"model\.width was 64 when the run in .* began and is 32 now"):
        check_folder(run_config(tmp_path, resume=True, model=replace(TrainConfig().model, width=32)))
    with pytest.raises(ValueError, match=r"optimizer\.name was adamw"):
        check_folder(run_config(tmp_path, resume=True, optimizer=OptimizerConfig(name="sgd")))
    (tmp_path / "config.yaml").unlink()
    check_folder(run_config(tmp_path, resume=True, batch_size=100))  # killed before it had written its configuration
    with pytest.raises(ValueError, match="resume=true needs output_dir"):
        TrainConfig(resume=True)


@pytest.mark.parametrize("left", ["metrics.jsonl", "checkpoints/step-00000004"])
def test_a_run_without_its_ledger_does_not_go_on(left, tmp_path):
    """Seen to go on from the initial weights, with a new ledger that counts from 0."""
    write_config(run_config(tmp_path), tmp_path)
    (tmp_path / left).mkdir(parents=True)
    with pytest.raises(
        ValueError, match=r"a private run without its ledger\.jsonl: .* count the whole budget as spent"
    ):
        check_folder(run_config(tmp_path, resume=True))
    with pytest.raises(ValueError, match="already holds a run"):
        check_folder(run_config(tmp_path))
    plain = PrivacyOptions(mechanism="none", target_epsilon=None)
    write_config(run_config(tmp_path, privacy=plain), tmp_path)
    check_folder(run_config(tmp_path, resume=True, privacy=plain))


def test_metrics_show_that_a_ledger_was_cut(tmp_path):
    """A step is written down after its release, and its release counted before: no metrics are ahead of their ledger."""
    ledger = Ledger(tmp_path / "ledger.jsonl")
    check_counted(ledger, 0)
    with pytest.raises(
        LedgerError, match=r"ledger.jsonl counts 0 releases, and metrics.jsonl beside it tells of step 1"
    ):
        check_counted(ledger, 1)
    ledger.begin(PRIVACY, 1.0, lease=5)
    ledger.reserve(0)
    check_counted(ledger, 5)
    with pytest.raises(LedgerError, match="counts 5 releases"):
        check_counted(ledger, 6)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 6}\n\0\xff')
    assert last_step(tmp_path) == 6


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_metrics_outlive_a_full_disk(tmp_path):
    """Seen to fail when the file is written anew in its place."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "metrics.jsonl.new").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        RunLog(tmp_path, 10, done=1)
    assert whole_lines(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_an_extension_says_what_it_costs():
    """Seen to fail when a longer run keeps the epsilon that its noise was calibrated for."""
    privacy = replace(PRIVACY, noise_multiplier=None, target_epsilon=2.0)
    check_extension(privacy, 2.0, 1.0)
    with pytest.raises(
        ValueError, match=r"steps=200 releases .* cost epsilon 2\.5, more than privacy.target_epsilon=2"
    ):
        check_extension(privacy, 2.5, 1.0)
    check_extension(PRIVACY, 99.0, 1.0)


def test_errors_say_what_to_do():
    note = ValueError("broken")
    note.add_note("this was row 7")
    assert explained(note) == "ValueError: broken; this was row 7"
    assert "Lower microbatch_size" in explained(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**46)
    assert "Lower microbatch_size" in explained(caught.value)
    assert explained(RuntimeError("Connection closed by peer [::1]")).startswith("lost another rank")
    gone = torch.distributed.DistNetworkError("Broken pipe\nException raised from here\nframe #0")
    assert explained(gone).endswith("whose machine is gone (DistNetworkError: Broken pipe)")


@pytest.mark.parametrize(("count", "device", "message"), [(0, "cuda", "finds no GPU"), (2, "auto", "torch finds 2")])
def test_a_gpu_that_is_not_there_is_said_before_the_data_is_read(monkeypatch, count, device, message):
    """Seen to end in a traceback of torch's where it was found out by taking the GPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=message):
        prepare(TrainConfig(device=device))
    with pytest.raises(ValueError, match=message):
        choose_device(device)
    check_device("cpu")


def test_a_lease_lasts_longer_than_the_way_to_the_next_checkpoint():
    assert [lease(every) for every in (1, 2, 4, 50)] == [2, 3, 5, 62]


STANDING = opened({"kind": "open", "format": 1, "run": "x", "mechanism": {}, "options": {}, "budget": 200, "lease": 5,
                   "seeded": False})  # fmt: skip


def test_lost_releases_are_in_the_report():
    text = guarantee(replace(OUTCOME, standing=replace(STANDING, lost=7)))
    assert "200 of 200, 7 of which were lost" in text


def test_an_earlier_start_is_in_the_report():
    """A seed that a start was given voids the run; a budget that was raised is said. Seen to fail without `as_reported`."""
    standing = replace(STANDING, seeded=True, extended=True)
    outcome = replace(OUTCOME, privacy=as_reported(PRIVACY, standing), standing=standing)
    assert claim(outcome).startswith("NO PRIVACY GUARANTEE: seed fixed")
    assert "The budget was raised after releases had been made" in guarantee(outcome)
    assert as_reported(PRIVACY, STANDING) == PRIVACY and as_reported(None, None) is None
    assert "raised" not in guarantee(replace(OUTCOME, standing=STANDING))


def test_cut_draws_are_in_the_report():
    text = guarantee(replace(OUTCOME, privacy=replace(PRIVACY, max_batch_size=30, accountant="pld")))
    assert "zeroing out one row" in text and "more than 30 rows is cut" in text
    assert "75% of the rows run were no padding" in unprotected(OUTCOME)


def test_json_has_no_infinities():
    assert finite_or_text({"a": math.inf, "b": {"c": math.nan, "d": 1.5}, "e": None}) == {
        "a": "inf",
        "b": {"c": "nan", "d": 1.5},
        "e": None,
    }


ROWS = RowDataset(torch.zeros(3, 5, dtype=torch.uint8))
OUTCOME = Outcome(
    config=TrainConfig(),
    privacy=PRIVACY,
    corpus=Corpus(train=ROWS, held_out=ROWS, score=BITS_PER_BYTE, baseline=4.7, unit="one packed row of 5 bytes"),
    noise_multiplier=1.0,
    budget=Budget(steps=(200,), epsilons=(2.5,)),
    standing=None,
    steps=200,
    nonfinite_rows=0,
    useful_rows=0.75,
    held_out=3.5,
    parameters=141_056,
    ranks=2,
    device="cpu",
    seconds=10.0,
)


def test_the_report_states_the_mechanism_and_its_unit():
    text = guarantee(OUTCOME)
    for part in (
        "2.5",
        "1e-05",
        "one packed row",
        "adding or removing one row",
        "Poisson",
        "0.01",
        "σ = 1",
        "200 of 200",
    ):
        assert part in text
    assert "stopped after" not in text
    assert claim(OUTCOME) == "epsilon = 2.5 at delta = 1e-05"


def test_a_run_that_stopped_early_reports_the_cap():
    stopped = replace(OUTCOME, steps=120)
    assert "| epsilon | 2.5 (upper bound, for the 200 releases fixed at the start) |" in guarantee(stopped)
    assert "stopped after 120 of 200 releases" in guarantee(stopped)


def test_a_seed_or_no_noise_is_said_loudly():
    seeded = replace(OUTCOME, privacy=replace(PRIVACY, seed=1))
    assert claim(seeded).startswith("NO PRIVACY GUARANTEE: seed fixed")
    assert "Seed fixed: no privacy guarantee" in assumptions(seeded)
    silent = replace(
        OUTCOME,
        noise_multiplier=0.0,
        budget=Budget(steps=(200,), epsilons=(math.inf,)),
        privacy=replace(PRIVACY, noise_multiplier=0.0),
    )
    assert claim(silent).startswith("NO PRIVACY GUARANTEE: no noise")
    assert "epsilon is infinite" in claim(silent)


def test_plain_training_claims_nothing():
    plain = replace(OUTCOME, privacy=None, noise_multiplier=None, budget=None)
    assert claim(plain).startswith("NOT PRIVATE")
    assert guarantee(plain) == assumptions(plain) == ""


def test_what_no_epsilon_covers_is_listed():
    text = unprotected(OUTCOME) + assumptions(OUTCOME)
    for part in (
        "Training loss",
        "Held-out",
        "how many rows",
        "hyper-parameters",
        "memory dump",
        "privacy=none",
        "Norms",
    ):
        assert part in text


def test_nominal_numerics_and_shuffling_are_named():
    assert "Nominal numerics" in assumptions(replace(OUTCOME, privacy=replace(PRIVACY, numerics="nominal")))
    shuffled = guarantee(replace(OUTCOME, privacy=replace(PRIVACY, sampling="shuffle")))
    assert "zeroing out one row" in shuffled and "without amplification" in shuffled


def test_a_rank_that_failed_has_its_say_before_it_is_ended():
    """Seen to fail when the handlers are put back after an exception: SIGTERM cut what a rank had to say."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        with pytest.raises(RuntimeError, match="lost"), stop_on_signals():
            raise RuntimeError("lost")
        assert signal.getsignal(signal.SIGINT) is before[signal.SIGINT]
        assert signal.getsignal(signal.SIGTERM) is not before[signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    with stop_on_signals():
        pass
    assert before == {number: signal.getsignal(number) for number in before}
