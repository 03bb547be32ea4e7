"""Training: it reaches known optima, repeats, resumes bit for bit, and stops with a clear word."""

import errno
import math

import pytest
import torch
from torch.optim import LBFGS, SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, OneCycleLR, ReduceLROnPlateau

from guides import Linear, MeanField, TiedMeanField
from inference import ELBO, AnalyticELBO, AnalyticKLELBO, fit
from zoo import PPCA, LinearVAE, Scaled, digits, linear_gaussian

QUIET = {"progress": False}


def lbfgs(parameters):
    return LBFGS(
        parameters,
        max_iter=100,
        history_size=50,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-13,
        tolerance_change=1e-16,
    )


def adam(rate):
    return lambda parameters: Adam(parameters, lr=rate)


def decay(steps):
    return lambda optimizer: ExponentialLR(optimizer, 0.01 ** (1 / steps))


@torch.no_grad()
def analytic_elbo(model, guide, x):
    return AnalyticELBO().per_datum(model, guide, x).mean().item()


@torch.no_grad()
def mean_evidence(model, x):
    return model.log_evidence(x).mean().item()


def linear_pair(x, latent_dim, guide=Linear):
    model = LinearVAE(x.shape[1], latent_dim).double().standardise_by(x)
    if guide is TiedMeanField:
        return model, TiedMeanField(model)
    return model, guide(x.shape[1], latent_dim).double().standardise_by(x)


@pytest.fixture(scope="module", params=["raw", "divided by 16"])
def digit_rows(request):
    data = digits(test_size=0) if request.param == "raw" else digits(test_size=0, transform=Scaled(16.0))
    return data.train, mean_evidence(PPCA.from_data(data.train, 8), data.train)


def start(pair, x, maximum):
    """Print the ELBO of the random start, and make sure that there is something to learn."""
    first = analytic_elbo(*pair, x)
    print(f"start {first:.4f}, maximum {maximum:.8f} nats per datum")
    assert first < maximum - 10


def test_adam_on_the_analytic_elbo_reaches_the_ppca_maximum(digit_rows):
    x, maximum = digit_rows
    pair = linear_pair(x, 8)
    start(pair, x, maximum)
    fit(*pair, x, steps=5000, objective=AnalyticELBO(), optimizer=adam(0.05), scheduler=decay(5000), **QUIET)
    print(f"short of it by {maximum - analytic_elbo(*pair, x):.2e}")
    assert 0 <= maximum - analytic_elbo(*pair, x) < 2e-3


def test_lbfgs_on_the_analytic_elbo_reaches_the_ppca_maximum(digit_rows):
    x, maximum = digit_rows
    pair = linear_pair(x, 8)
    start(pair, x, maximum)
    fit(*pair, x, steps=40, objective=AnalyticELBO(), optimizer=lbfgs, **QUIET)
    print(f"short of it by {maximum - analytic_elbo(*pair, x):.2e}")
    assert -1e-9 < maximum - analytic_elbo(*pair, x) < 1e-6


def test_lbfgs_with_the_tied_guide_reaches_the_ppca_maximum(digit_rows):
    x, maximum = digit_rows
    pair = linear_pair(x, 8, TiedMeanField)
    start(pair, x, maximum)
    fit(*pair, x, steps=40, objective=AnalyticELBO(), optimizer=lbfgs, **QUIET)
    print(f"short of it by {maximum - analytic_elbo(*pair, x):.2e}")
    assert abs(maximum - analytic_elbo(*pair, x)) < 1e-9


@pytest.mark.parametrize("objective", [ELBO(), AnalyticKLELBO()], ids=["ELBO", "AnalyticKLELBO"])
def test_the_stochastic_elbo_reaches_the_ppca_maximum(digit_rows, objective):
    x, maximum = digit_rows
    pair = linear_pair(x, 8)
    start(pair, x, maximum)
    options = {"optimizer": adam(0.05), "scheduler": decay(6000), "batch_size": 512, "seed": 0}
    fit(*pair, x, steps=6000, objective=objective, **options, **QUIET)
    print(f"short of it by {maximum - analytic_elbo(*pair, x):.2e}")
    assert 0 <= maximum - analytic_elbo(*pair, x) < 0.05


def test_columns_align_with_well_separated_principal_components():
    data = linear_gaussian(2000, 10, 3, sigma=0.5, spectrum=torch.tensor([16.0, 6.0, 2.0]))
    x = data.train
    pair = linear_pair(x, 3)
    fit(*pair, x, steps=40, objective=AnalyticELBO(), optimizer=lbfgs, **QUIET)
    columns = torch.nn.functional.normalize(pair[0].linear_gaussian.W.detach(), dim=0)
    components = torch.linalg.eigh(torch.cov(x.mT, correction=0))[1].flip(-1)[:, :3]
    cosines = (components.mT @ columns).abs()
    assert cosines.amax(1).min() > math.cos(0.01)
    off_diagonal = (columns.mT @ columns).fill_diagonal_(0)
    assert off_diagonal.abs().max() < 0.01


def test_float32_training_agrees_with_float64_to_float32_accuracy():
    x = digits().train
    pairs = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        model, guide = LinearVAE(64, 4).standardise_by(x), Linear(64, 4).standardise_by(x)
        pair = model.to(dtype), guide.to(dtype)
        fit(*pair, x.to(dtype), steps=100, objective=AnalyticELBO(), optimizer=adam(0.03), **QUIET)
        pairs.append(tuple(half.double() for half in pair))
    a, b = (analytic_elbo(*pair, x) for pair in pairs)
    assert abs(a - b) < 1e-4 * abs(b)


# --- repeatability -----------------------------------------------------------------------------------------------


def small_run(**options):
    torch.manual_seed(7)
    x = linear_gaussian(50, 5, 2).train
    pair = LinearVAE(5, 2).double(), MeanField(5, 2, hidden=(8,)).double()
    options = {"steps": 30, "optimizer": adam(0.01), "batch_size": 16, "seed": 3, **options}
    history = fit(*pair, x, **options, **QUIET)
    return history, [p.detach().clone() for half in pair for p in half.parameters()]


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_a_seed_repeats_a_run_bit_for_bit_and_another_seed_does_not():
    (first, a), (second, b), (_, c) = small_run(), small_run(), small_run(seed=4)
    assert first.loss == second.loss
    assert same(a, b)
    assert not same(a, c)


def test_a_seeded_run_leaves_the_global_random_state_alone():
    x = linear_gaussian(20, 5, 2).train
    torch.manual_seed(0)
    before = torch.get_rng_state()
    pair = linear_pair(x, 2)
    state = torch.get_rng_state()
    fit(*pair, x, steps=3, seed=1, **QUIET)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(before, state)


def test_an_epoch_shows_every_datum_once():
    seen = []

    class Spy(ELBO):
        def bound(self, draw):
            seen.append(draw.call.args[0][:, 0].clone())
            return super().bound(draw)

    x = torch.arange(23.0).double().unsqueeze(1).repeat(1, 5)
    fit(LinearVAE(5, 2).double(), Linear(5, 2).double(), x, steps=6, batch_size=8, objective=Spy(), seed=0, **QUIET)
    assert [len(batch) for batch in seen] == [8, 8, 7] * 2
    first, second = torch.cat(seen[:3]), torch.cat(seen[3:])
    assert torch.equal(first.sort()[0], x[:, 0])
    assert torch.equal(second.sort()[0], x[:, 0])
    assert not torch.equal(first, second)


# --- resuming ----------------------------------------------------------------------------------------------------

VALIDATION = linear_gaussian(30, 5, 2, seed=1).train
RESUMABLE = {
    "Adam": {},
    "momentum, float loss per epoch": {"optimizer": lambda p: SGD(p, lr=1e-3, momentum=0.9)},
    "LBFGS": {
        "optimizer": lambda p: LBFGS(p, max_iter=3, line_search_fn="strong_wolfe"),
        "batch_size": None,
        "objective": AnalyticELBO(),
    },
    "exponential schedule": {"scheduler": decay(30)},
    "cosine schedule": {"scheduler": lambda o: CosineAnnealingLR(o, 30)},
    "one-cycle schedule": {"scheduler": lambda o: OneCycleLR(o, 0.02, total_steps=40)},
    "validation": {"validation": VALIDATION, "evaluate_every": 4},
}


def interrupting(optimizer, at):
    """Raises what Ctrl-C raises at the end of one update, in the midst of a step."""

    def make(parameters):
        made, updates = optimizer(parameters), []

        def after(*_):
            updates.append(1)
            if len(updates) == at:
                raise KeyboardInterrupt

        made.register_step_post_hook(after)
        return made

    return make


@pytest.mark.parametrize("options", RESUMABLE.values(), ids=RESUMABLE)
def test_an_interrupted_run_resumes_to_the_same_bits(options, tmp_path):
    optimizer = options.get("optimizer", adam(0.01))
    files = {"checkpoint": tmp_path / "run.safetensors", "checkpoint_every": 7}
    straight, expected = small_run(**options)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        small_run(**{**options, "optimizer": interrupting(optimizer, 20)}, **files)
    assert interrupt.value.history.loss == straight.loss[:19]
    resumed, got = small_run(**options, **files)
    assert resumed.loss == straight.loss
    assert resumed.validation == straight.validation
    assert same(got, expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.safetensors"]


def test_a_finished_run_can_be_prolonged(tmp_path):
    file = tmp_path / "run.safetensors"
    _, expected = small_run(steps=40)
    small_run(steps=25, checkpoint=file)
    history, got = small_run(steps=40, checkpoint=file)
    assert history.steps == 40
    assert same(got, expected)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    file = tmp_path / "run.safetensors"
    small_run(checkpoint=file)
    with pytest.raises(ValueError, match=r"expected a checkpoint of this run.*batch_size"):
        small_run(checkpoint=file, batch_size=8)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all"])
def test_a_damaged_checkpoint_is_refused_and_kept(content, tmp_path):
    file = tmp_path / "run.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.safetensors is damaged"):
        small_run(checkpoint=file)
    assert file.read_bytes() == content


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path, monkeypatch):
    file = tmp_path / "run.safetensors"
    small_run(checkpoint=file)
    before = file.read_bytes()

    def half_written(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", half_written)
    with pytest.raises(OSError, match=r"cannot read or write .*run\.safetensors: No space left on device"):
        small_run(checkpoint=file, steps=40)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


# --- stopping ----------------------------------------------------------------------------------------------------


def test_early_stopping_keeps_the_best_parameters():
    torch.manual_seed(0)
    x, validation = linear_gaussian(15, 5, 2).train, linear_gaussian(200, 5, 2, seed=1).train
    pair = LinearVAE(5, 2).double(), MeanField(5, 2).double()
    options = {"objective": AnalyticELBO(), "optimizer": adam(0.02), "evaluate_every": 10, "patience": 4}
    history = fit(*pair, x, steps=3000, validation=validation, **options, **QUIET)
    losses = dict(history.validation)
    assert history.stopped_early
    assert history.steps < 3000
    assert losses[history.best_step] == min(losses.values())
    assert history.steps - history.best_step == 40
    assert -analytic_elbo(*pair, validation) == pytest.approx(min(losses.values()), abs=1e-12)


def test_the_pair_is_left_in_eval_mode():
    pair = LinearVAE(5, 2).double(), MeanField(5, 2).double()
    fit(*pair, torch.randn(9, 5).double(), steps=1, **QUIET)
    assert not any(half.training for half in pair)


def test_a_loss_that_breaks_down_names_the_step():
    x = linear_gaussian(20, 5, 2).train
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) at step \d+"):
        fit(*linear_pair(x, 2), x, steps=200, optimizer=lambda p: SGD(p, lr=1e4), **QUIET)


X = torch.zeros(8, 5).double()
BAD = {
    "no steps": ({"steps": 0}, ValueError, "expected steps to be at least 1, got 0"),
    "steps not whole": ({"steps": 1.5}, TypeError, "expected steps to be an integer, got 1.5"),
    "batch size zero": ({"batch_size": 0}, ValueError, "expected batch_size to be at least 1, got 0"),
    "patience alone": ({"patience": 2}, ValueError, "expected validation data for patience, got none"),
    "plateau schedule": ({"scheduler": ReduceLROnPlateau}, TypeError, "got ReduceLROnPlateau"),
    "LBFGS on batches": ({"optimizer": LBFGS, "batch_size": 4}, ValueError, "expected the full batch for LBFGS"),
    "NaN in validation": ({"validation": X * math.nan}, ValueError, "expected argument 0 to be finite|x to be finite"),
    "wrong D in validation": ({"validation": X[:, :3]}, ValueError, r"expected x of shape \(N, 5\), got \(8, 3\)"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD.values(), ids=BAD)
def test_bad_options_are_refused_before_anything_runs(options, error, message):
    runs = []
    model = LinearVAE(5, 2).double()
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    with pytest.raises(error, match=message):
        fit(model, Linear(5, 2).double(), X, **{"steps": 1, **options}, **QUIET)
    assert not runs


def test_a_pair_without_parameters_is_refused():
    model = PPCA(5, 2).double().requires_grad_(False)
    with pytest.raises(ValueError, match="expected a pair with at least one trainable parameter, got none"):
        fit(model, TiedMeanField(model), X, steps=1, **QUIET)


@pytest.mark.gpu
def test_training_on_a_gpu_reaches_the_same_optimum():
    x = digits().train
    pair = linear_pair(x, 8)
    fit(*pair, x, steps=40, objective=AnalyticELBO(), optimizer=lbfgs, device="cuda", **QUIET)
    maximum = mean_evidence(PPCA.from_data(x, 8), x)
    assert maximum - analytic_elbo(*pair, x.cuda()) < 1e-6
