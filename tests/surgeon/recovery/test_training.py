"""Training: its objective, optimizers, budget, trials of learning rates, and mean of the weights."""

import math

import pytest
import torch
import torch.nn.functional as F

from llm_surgeon.config.recover import RecoverConfig
from llm_surgeon.curvature.estimate import estimate_curvature
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.distributed import Ranks
from llm_surgeon.errors import InputError, NumericalError
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.models.passes import mean_loss
from llm_surgeon.progress import Progress
from llm_surgeon.recovery import training
from llm_surgeon.recovery.objective import Distillation, TokenLoss, block_distance, distillation_loss
from llm_surgeon.recovery.optimizers import NaturalGradient, Preconditioner, adamw, preconditioners
from llm_surgeon.recovery.recover import recover
from llm_surgeon.recovery.training import share_of_peak, train
from llm_surgeon.recovery.zeros import zero_masks, zeros_kept
from tests.surgeon.half_zero import HELD_OUT, OPTIONS, WINDOWS, half_zero, weights
from tests.surgeon.tiny_models import build

FULL = OPTIONS | {"method": "full", "learning_rate": 1e-2}


def test_the_gradient_of_the_divergence_is_autograds(monkeypatch):
    """In chunks, too, and with tokens that do not count."""
    student, teacher = torch.randn(2, 5, 7).unbind()
    counted = torch.tensor([True, True, False, True, False])
    student.requires_grad_()
    p, q = (F.log_softmax(x[counted] / 2.0, -1) for x in (teacher, student))
    expected = 4.0 * F.kl_div(q, p, log_target=True, reduction="batchmean")
    (wanted,) = torch.autograd.grad(3.0 * expected, student)
    for chunk in (1 << 24, 14, 1):
        monkeypatch.setattr("llm_surgeon.recovery.objective.CHUNK", chunk)
        loss = distillation_loss(student, teacher, 2.0, counted)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(3.0 * loss, student)[0], wanted)


def test_block_distance_is_relative_to_every_tokens_own_norm():
    target = torch.randn(2, 3, 4)
    target[:, 0] *= 1000
    scales = torch.tensor([1.0, 1.5, 0.5])  # by which each token's state is off: squares 0, 1/4, 1/4
    h = target * scales[:, None]
    torch.testing.assert_close(block_distance(h, target, None), torch.tensor(0.5 / 3))
    mask = torch.tensor([[False, True, True], [True, True, False]])
    torch.testing.assert_close(block_distance(h, target, mask), torch.tensor(0.75 / 4))


def test_the_objective_sums_its_parts():
    model, teacher = half_zero("llama"), build("llama")
    ids, settings = WINDOWS[:4], {"temperature": 2.0}

    def loss(**options):
        return float(Distillation(model, teacher, RecoverConfig(**settings | options))(model, ids, None).detach())

    with torch.no_grad():
        outputs = [m(ids) for m in (model, teacher)]
        divergence = float(distillation_loss(*(o.logits.flatten(0, 1) for o in outputs), 2.0))
        labels = float(TokenLoss()(model, ids, None))
        blocks = []
        for m in (model, teacher):
            states = []
            handles = [b.register_forward_hook(lambda _, __, y, s=states: s.append(y)) for b in find_decoder(m).blocks]
            m(ids)
            blocks.append(states)
            for handle in handles:
                handle.remove()
        distance = sum(float(block_distance(*pair, None)) for pair in zip(*blocks, strict=True)) / len(blocks[0])
    assert loss() == pytest.approx(divergence, rel=1e-5)
    assert loss(label_weight=0.25) == pytest.approx(0.75 * divergence + 0.25 * labels, rel=1e-5)
    assert loss(block_weight=3.0) == pytest.approx(divergence + 3.0 * distance, rel=1e-5)
    assert not any(module._forward_hooks for m in (model, teacher) for module in m.modules())


def test_blocks_that_differ_are_not_compared():
    small = build("llama")
    del small.model.layers[-1]
    small.config.num_hidden_layers -= 1
    with pytest.raises(InputError, match="block_weight needs a teacher of as many blocks"):
        recover(small, WINDOWS, HELD_OUT, teacher=build("llama"), block_weight=1.0, **FULL)
    for name in ("block_weight", "label_weight"):
        with pytest.raises(InputError, match=f"{name} means nothing without a teacher"):
            recover(half_zero("llama"), WINDOWS, HELD_OUT, **FULL | {name: 0.5})


class _SecondRank(Ranks):
    """Rank 1 of three, which notes what it was sent: ones."""

    index, count = 1, 3

    def __init__(self):
        self.sent = 0

    def broadcast_(self, tensor, owner=0):
        self.sent += 1
        return tensor.fill_(1.0)


@pytest.mark.parametrize("held_out", [None, Calibration(HELD_OUT)])
def test_ranks_that_train_by_themselves_take_the_weights_of_the_first(held_out):
    """Those of two windows a step on three ranks; those of three windows share them, and add up gradients."""
    settings = RecoverConfig(**FULL | {"steps": 2, "eval_every": 2, "batch_size": 2})
    model, ranks = build("llama"), _SecondRank()
    train(model, Calibration(WINDOWS, ranks=ranks), held_out, settings)
    parameters = len(list(model.parameters()))
    # Before the training, after it, and at its end.
    assert ranks.sent == parameters * (1 if held_out is None else 3)
    assert all(torch.equal(weight, torch.ones_like(weight)) for weight in weights(model).values())
    sharing = _SecondRank()
    settings = RecoverConfig(**FULL | {"steps": 2, "eval_every": 2, "batch_size": 3})
    train(build("llama"), Calibration(WINDOWS, ranks=sharing), held_out, settings)
    assert sharing.sent == 0


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_the_natural_gradient_lowers_the_loss_and_keeps_every_zero(name):
    model = half_zero(name)
    masks = zero_masks(find_decoder(model))
    report = recover(model, WINDOWS, HELD_OUT, optimizer="natural", **FULL)
    assert report.loss_after < report.loss_before - 0.1
    assert all(torch.equal(module.weight == 0, mask) for module, mask in masks.items())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_preconditioners_divide_by_the_damped_curvature(name):
    """``(G + 0.1 mean(diag G) I) D' (A + 0.1 mean(diag A) I) = ∇``, D' before it is masked."""
    model = half_zero(name)
    decoder, data = find_decoder(model), Calibration(WINDOWS)
    found = preconditioners(model, decoder, data, 16, None, seed=3)
    curvature = estimate_curvature(model, decoder, data, batch_size=16, fisher="sampled", seed=3)
    assert len(found) == len(decoder.linears)
    for linear in decoder.linears:
        each = found[linear.module.weight]
        G, A = curvature.factors(linear)
        A = A[: linear.columns, : linear.columns]
        for factor in (G, A):
            factor.diagonal().add_(0.1 * factor.diagonal().mean())
        gradient = torch.randn(linear.rows, linear.columns)
        solved = torch.linalg.solve(A, torch.linalg.solve(G, gradient), left=False)
        stored = gradient.T if each.transposed else gradient
        direction = each.direction(stored)
        direction = direction.T if each.transposed else direction
        wanted = solved * (linear.weight != 0)
        torch.testing.assert_close(direction, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_natural_steps_are_as_long_as_adamws_and_in_proportion():
    parameters = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(2, 4))]
    before = [p.detach().clone() for p in parameters]
    zero = [torch.zeros(3, 4, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool).triu()]
    identities = [
        Preconditioner(torch.eye(len(p)), torch.eye(4), z, False) for p, z in zip(parameters, zero, strict=True)
    ]
    optimizer = NaturalGradient(dict(zip(parameters, identities, strict=True)), lr=0.5)
    for p, size in zip(parameters, (1.0, 3.0), strict=True):
        p.grad = torch.full_like(p, size)
    optimizer.step()
    moved = [b - p.detach() for p, b in zip(parameters, before, strict=True)]
    kept = torch.cat([m[~z] for m, z in zip(moved, zero, strict=True)])
    assert float(kept.square().mean().sqrt()) == pytest.approx(0.5 * 0.2, rel=1e-5)
    assert float(moved[1][1, 0] / moved[0][0, 0]) == pytest.approx(3.0, rel=1e-5)
    assert torch.equal(moved[1][zero[1]], torch.zeros(int(zero[1].sum())))


def test_norms_and_biases_do_not_decay():
    model = build("opt")
    groups = adamw(model.parameters(), RecoverConfig(method="full", weight_decay=0.1)).param_groups
    assert {group["weight_decay"]: {p.dim() for p in group["params"]} for group in groups} == {0.1: {2}, 0.0: {1}}
    counted = sum(len(group["params"]) for group in groups)
    assert counted == len(list(model.parameters()))  # the tied embedding once


def test_tied_embeddings_stay_tied():
    model = half_zero("gpt2")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    before = model.get_input_embeddings().weight.detach().clone()
    recover(model, WINDOWS, HELD_OUT, **FULL)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert not torch.equal(model.get_input_embeddings().weight, before)


class Clock:
    """A clock that a step moves on by a second, and an evaluation by two."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(training.time, "perf_counter", lambda: self.now)
        for name, seconds in (("_take_step", 1.0), ("_evaluate", 2.0)):
            monkeypatch.setattr(training._Training, name, self._slowly(getattr(training._Training, name), seconds))

    def _slowly(self, method, seconds):
        def slow(*arguments):
            method(*arguments)
            self.now += seconds

        return slow


def test_the_schedule_follows_the_clock_and_ends_in_time(monkeypatch):
    clock = Clock(monkeypatch)
    config = RecoverConfig(minutes=1.0, patience=100, **{**FULL, "steps": None, "eval_every": None})
    log = train(half_zero("llama"), Calibration(WINDOWS), Calibration(HELD_OUT), config, seconds=60.0)
    assert 60.0 <= clock.now <= 60.0 + 1.0 + 2.0  # a step under way and the last evaluation
    assert len(log) == 10 and log[-1]["step"] == 60 - 2 * 9
    # The step before the last evaluation began after 59 of 60 seconds; the rise takes a twentieth.
    share = 0.5 * (1 + math.cos(math.pi * (59 / 60 - 0.05) / 0.95))
    assert log[-1]["learning_rate"] == pytest.approx(1e-2 * share, rel=1e-4)


def test_no_step_begins_that_would_not_end_in_time(monkeypatch):
    clock = Clock(monkeypatch)
    config = RecoverConfig(minutes=1.0, patience=100, **{**FULL, "steps": None, "eval_every": 10**9})
    log = train(half_zero("llama"), Calibration(WINDOWS), Calibration(HELD_OUT), config, seconds=7.5)
    # Five steps and, half-way, a held-out loss take seven seconds: no step fits the half that is left.
    assert [entry["step"] for entry in log] == [4, 5] and clock.now == 7 + 2


def test_steps_that_are_done_before_the_time_is_over_end_it(monkeypatch):
    clock = Clock(monkeypatch)
    config = RecoverConfig(minutes=10.0, **FULL)
    log = train(half_zero("llama"), Calibration(WINDOWS), Calibration(HELD_OUT), config, seconds=600.0)
    assert log[-1]["step"] == 12 and clock.now == 12 + 3 * 2


def test_minutes_count_held_out_losses_too(monkeypatch):
    """A training ends when its steps and three held-out losses, before, at the end and after, have taken the time."""
    given = {}

    def noting(*arguments, seconds, **options):
        given["seconds"] = seconds
        return [{"step": 3}]

    ticks = iter([100.0, 104.0, 200.0])  # begun, after the first held-out loss, at the end
    monkeypatch.setattr("llm_surgeon.recovery.recover.train", noting)
    monkeypatch.setattr("llm_surgeon.recovery.recover.time.perf_counter", lambda: next(ticks))
    report = recover(half_zero("llama"), WINDOWS, HELD_OUT, minutes=1.0, method="full", batch_size=4)
    assert given["seconds"] == 60.0 - 3 * 4.0 and report.seconds == 100.0
    assert (report.steps, report.tokens) == (3, 3 * 4 * 16)


def test_a_mean_of_the_weights_takes_a_held_out_loss_more(monkeypatch):
    ticks = iter([0.0, 4.0, 200.0])
    monkeypatch.setattr("llm_surgeon.recovery.recover.train", lambda *_, seconds, **__: [{"step": int(seconds)}])
    monkeypatch.setattr("llm_surgeon.recovery.recover.time.perf_counter", lambda: next(ticks))
    report = recover(half_zero("llama"), WINDOWS, HELD_OUT, minutes=1.0, method="full", batch_size=4, ema=0.9)
    assert report.steps == 60 - 4 * 4


def test_trials_take_a_quarter_of_the_time_and_the_schedule_the_rest(monkeypatch):
    clock = Clock(monkeypatch)
    measure = training._Training._held_out_loss

    def slowly(self, held_out):
        clock.now += 2.0
        return measure(self, held_out)

    monkeypatch.setattr(training._Training, "_held_out_loss", slowly)
    monkeypatch.setattr(training._Training, "_evaluate", lambda self, rate: self._log.append({"step": self._step}))
    config = RecoverConfig(minutes=1.0, trial_steps=1000, **{**FULL, "steps": None, "eval_every": None})
    taken = []
    step = training._Training._take_step

    def noting(self, rate):
        taken.append((clock.now, rate))
        step(self, rate)

    monkeypatch.setattr(training._Training, "_take_step", noting)
    log = train(half_zero("llama"), Calibration(WINDOWS), Calibration(HELD_OUT), config, seconds=120.0)
    # A loss of two seconds at the start; then of every trial 120 / 4 / 3 seconds, the last two for its loss.
    begun = 2.0 + 3 * (8.0 + 2.0)
    assert [time for time, _ in taken] == [*(2.0 + 10.0 * n + t for n in range(3) for t in range(8)), *range(32, 120)]
    assert clock.now == 120.0 and log[-1]["step"] == 88
    best = min((entry for entry in log if "trial_rate" in entry), key=lambda entry: entry["trial_loss"])["trial_rate"]
    rates = {time: rate for time, rate in taken if time >= begun}
    assert rates[begun] == 0.0
    assert rates[76.0] == pytest.approx(best * 0.5 * (1 + math.cos(math.pi * (0.5 - 0.05) / 0.95)), rel=1e-4)


def test_a_time_too_short_for_trials_has_none(caplog):
    config = RecoverConfig(minutes=1.0, trial_steps=5, **FULL)
    log = train(half_zero("llama"), Calibration(WINDOWS), Calibration(HELD_OUT), config, seconds=1e-6)
    assert not log and "the time is too short for trials of learning rates" in caplog.text


def test_trials_share_the_preconditioners(monkeypatch):
    made = []

    def counting(*arguments):
        made.append(preconditioners(*arguments))
        return made[-1]

    monkeypatch.setattr(training, "preconditioners", counting)
    model = half_zero("llama")
    report = recover(model, WINDOWS, HELD_OUT, optimizer="natural", trial_steps=3, **FULL)
    assert len(made) == 1 and sum("trial_loss" in entry for entry in report.log) == 3
    best = min((entry for entry in report.log if "trial_rate" in entry), key=lambda entry: entry["trial_loss"])
    alone = half_zero("llama")
    recover(alone, WINDOWS, HELD_OUT, optimizer="natural", **FULL | {"learning_rate": best["trial_rate"]})
    assert all(torch.equal(p, weights(alone)[name]) for name, p in model.named_parameters())


def test_time_goes_on_where_it_was(tmp_path, monkeypatch):
    """What trials took is not taken again from the time of a training that is resumed."""
    clock = Clock(monkeypatch)
    config = RecoverConfig(minutes=2.0, trial_steps=4, patience=99, **{**FULL, "steps": 1000, "eval_every": 100})
    data, held_out = Calibration(WINDOWS), Calibration(HELD_OUT)

    class Stop(Progress):
        def step(self, done, total, what=""):
            if what == "seconds" and total == 102 and done > 50:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(half_zero("llama"), data, held_out, config, tmp_path, seconds=120.0, progress=Stop())
    clock.now = 1000.0
    log = train(half_zero("llama"), data, held_out, config, tmp_path, seconds=120.0, resume=True)
    # Four steps and an evaluation of each trial; the state is that of an evaluation before the end, at 48 seconds.
    assert sum("trial_loss" in entry for entry in log) == 3
    assert 1000.0 + 102 - 48 - 11 <= clock.now <= 1000.0 + 102 - 48 + 11


@pytest.mark.parametrize("trial_steps", [0, 2])
def test_too_few_minutes_are_one_sentence(trial_steps):
    with pytest.raises(InputError, match=r"^minutes 1e-06 are over before the first step of the training: give more$"):
        recover(half_zero("llama"), WINDOWS, HELD_OUT, minutes=1e-6, method="full", trial_steps=trial_steps)


def test_the_learning_rate_is_found_by_trials_from_the_same_start():
    model = half_zero("llama")
    settings = FULL | {"learning_rate": 1e-1}  # too high: a third is better
    report = recover(model, WINDOWS, HELD_OUT, trial_steps=6, **settings)
    trials = {entry["trial_rate"]: entry["trial_loss"] for entry in report.log if "trial_rate" in entry}
    assert list(trials) == pytest.approx([1e-1 / 3, 1e-1, 3e-1])
    best = min(trials, key=trials.get)
    alone = half_zero("llama")
    again = recover(alone, WINDOWS, HELD_OUT, **settings | {"learning_rate": best})
    assert all(torch.equal(p, weights(alone)[name]) for name, p in model.named_parameters())
    assert again.loss_after == report.loss_after and report.steps == again.steps == 12


@pytest.mark.parametrize(
    "settings, error",
    [({"ema": 0.9}, KeyboardInterrupt), ({"ema": 0.9}, NumericalError), ({"trial_steps": 2}, KeyboardInterrupt)],
)
def test_what_ends_a_training_finds_the_weights_of_the_last_step(monkeypatch, settings, error):
    model, measured = half_zero("llama"), []
    before, count = weights(model), 2 if "trial_steps" in settings else 3  # those at the start are measured, too

    def fails(*_):
        measured.append(weights(model))
        if len(measured) == count:  # with the mean of the weights, or after the second trial
            raise error
        return 1.0

    monkeypatch.setattr(training, "mean_loss", fails)
    with pytest.raises(error):
        recover(model, WINDOWS, HELD_OUT, **FULL, **settings)
    last = before if "trial_steps" in settings else measured[-2]
    assert not all(torch.equal(p, measured[-1][name]) for name, p in model.named_parameters())
    assert all(torch.equal(p, last[name]) for name, p in model.named_parameters())


def test_a_trial_that_diverges_is_passed_over(monkeypatch):
    evaluate = training._Training._evaluate

    def diverges(self, rate):
        if self._config.learning_rate > 0.05 and self._config.steps == 2:
            raise self._no_number("loss")
        evaluate(self, rate)

    monkeypatch.setattr(training._Training, "_evaluate", diverges)
    report = recover(half_zero("llama"), WINDOWS, HELD_OUT, trial_steps=2, **FULL | {"learning_rate": 0.06})
    assert ["trial_loss" in entry for entry in report.log[:3]] == [True, False, False]
    assert "Infinity" not in report.to_json()
    assert max(entry["learning_rate"] for entry in report.log[3:]) <= 0.02


@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_the_mean_of_the_weights_is_kept_where_it_is_better(decay):
    model = half_zero("llama")
    masks = zero_masks(find_decoder(model))
    report = recover(model, WINDOWS, HELD_OUT, ema=decay, **FULL | {"learning_rate": 3e-2, "steps": 40})
    losses = [entry[name] for entry in report.log for name in ("eval_loss", "average_loss")]
    assert report.loss_after == pytest.approx(min(losses), rel=1e-4)
    assert all(torch.equal(module.weight == 0, mask) for module, mask in masks.items())


def test_the_mean_is_an_exponential_one(monkeypatch):
    model, seen = half_zero("llama"), []

    class Watching(Progress):
        def step(self, done, total, what=""):
            seen.append(model.lm_head.weight.detach().clone())

    kept = {}
    evaluate = training._Training._evaluate

    def keeping(self, rate):
        kept["average"] = self._average["lm_head.weight"].clone()
        evaluate(self, rate)

    monkeypatch.setattr(training._Training, "_evaluate", keeping)
    mean = model.lm_head.weight.detach().clone()
    recover(model, WINDOWS, HELD_OUT, ema=0.3, progress=Watching(), **FULL)
    for step, weight in enumerate(seen[:12], 1):
        decay = min(0.3, step / (step + 10))
        mean = decay * mean + (1 - decay) * weight
    torch.testing.assert_close(kept["average"], mean)


def test_accumulated_gradients_are_those_of_the_batch():
    trained = []
    for micro in (4, 2, 1):
        model = half_zero("llama")
        settings = RecoverConfig(**FULL | {"micro_batch_size": micro, "steps": 3, "eval_every": 3, "warmup_steps": 0})
        with zeros_kept(zero_masks(find_decoder(model)), model):
            trained.append((train(model, Calibration(WINDOWS), Calibration(HELD_OUT), settings), weights(model)))
    (log, wanted), *others = trained
    for other_log, other in others:
        assert other_log[-1]["loss"] == pytest.approx(log[-1]["loss"], rel=1e-4)
        for name, weight in wanted.items():
            torch.testing.assert_close(other[name], weight, rtol=1e-2, atol=1e-4)


def test_windows_are_gone_through_in_rounds():
    order = training._Order(6, seed=1)
    rows = torch.cat([order.rows(step, 4) for step in range(6)])
    rounds = rows.view(4, 6)
    assert all(row.sort().values.tolist() == list(range(6)) for row in rounds)
    assert len({tuple(row.tolist()) for row in rounds}) > 1
    assert torch.equal(training._Order(6, seed=1).rows(5, 4), rows[20:])  # from any step on


def test_a_loss_that_is_not_a_number_is_one_sentence():
    with pytest.raises(
        NumericalError, match=r"^the (eval_)?loss is not a number after \d+ steps: lower learning_rate$"
    ):
        recover(half_zero("llama"), WINDOWS, HELD_OUT, **FULL | {"learning_rate": 1e30, "warmup_steps": 0})


@pytest.mark.parametrize("options", [{}, {"optimizer": "natural"}, {"ema": 0.5}])
def test_training_goes_on_where_it_was(tmp_path, options):
    data, held_out, config = Calibration(WINDOWS), Calibration(HELD_OUT), RecoverConfig(**FULL | options)

    class Stop(Progress):
        def step(self, done, total, what=""):
            if done == 6:
                raise KeyboardInterrupt

    def run(model, **more):
        with zeros_kept(zero_masks(find_decoder(model)), model):
            return train(model, data, held_out, config, tmp_path, **more)

    whole, stopped = half_zero("llama"), half_zero("llama")
    with zeros_kept(zero_masks(find_decoder(whole)), whole):
        log = train(whole, data, held_out, config)
    with pytest.raises(KeyboardInterrupt):
        run(stopped, progress=Stop())
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4.pt"]
    resumed = half_zero("llama")
    assert run(resumed, resume=True) == log
    assert all(torch.equal(p, weights(whole)[name]) for name, p in resumed.named_parameters())


def test_the_share_of_the_peak_rises_straight_and_falls_along_a_cosine():
    config = RecoverConfig(steps=100, warmup_steps=10)
    shares = [share_of_peak(done, config) for done in (0, 5, 10, 55, 100)]
    assert shares == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0])


def test_overfitting_is_stopped_and_the_best_state_kept():
    model = half_zero("llama")
    held_out = Calibration(HELD_OUT)
    options = FULL | {"steps": 60, "eval_every": 3, "patience": 3, "learning_rate": 0.02}
    report = recover(model, WINDOWS[:2].flip(1), HELD_OUT, **options)
    losses = [entry["eval_loss"] for entry in report.log]
    assert len(losses) < 20 and losses[-1] > min(losses)
    assert mean_loss(model, held_out, 8) == pytest.approx(min(report.loss_before, *losses), rel=1e-4)


def test_a_training_that_only_harms_changes_nothing():
    model = half_zero("llama")
    before = weights(model)
    report = recover(model, WINDOWS, HELD_OUT, **FULL | {"learning_rate": 10.0})
    assert min(entry["eval_loss"] for entry in report.log) > report.loss_before
    assert report.loss_after == pytest.approx(report.loss_before, rel=1e-6)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_products_in_bfloat16_are_of_the_weights_of_each_step(monkeypatch):
    """Autocast keeps none of an earlier step: the losses follow those in float32."""
    losses = []
    for dtype in (None, torch.bfloat16):
        monkeypatch.setattr(training, "dtype_of_products", lambda _, dtype=dtype: dtype)
        report = recover(half_zero("llama"), WINDOWS, HELD_OUT, teacher=build("llama"), **FULL | {"eval_every": 12})
        losses.append((report.log[-1]["loss"], report.loss_after))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
