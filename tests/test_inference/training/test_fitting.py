"""Training: it reaches known optima, repeats, resumes bit for bit, and stops with a clear word."""

import errno
import math

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from torch.optim import LBFGS, SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, OneCycleLR, ReduceLROnPlateau

from guides import Linear, MeanField, TiedMeanField
from inference import ELBO, AnalyticELBO, AnalyticKLELBO, BetaELBO, fit
from inference.core.files import locked
from inference.core.storage import load_tree, save_tree
from zoo import IMAVAE, PPCA, DeepGaussianVAE, Laplace, LinearVAE, OptimalNoise, Scaled, digits, linear_gaussian

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


@pytest.fixture(scope="module", params=[pytest.param("raw", marks=pytest.mark.slow), "divided by 16"])
def digit_rows(request):
    data = digits(test_size=0) if request.param == "raw" else digits(test_size=0, transform=Scaled(16.0))
    return data.train, mean_evidence(PPCA.from_data(data.train, 8), data.train)


def start(pair, x, maximum):
    """Print the ELBO of the random start, and make sure that there is something to learn."""
    first = analytic_elbo(*pair, x)
    print(f"start {first:.4f}, maximum {maximum:.8f} nats per datum")
    assert first < maximum - 10


@pytest.mark.slow
def test_adam_on_the_analytic_elbo_reaches_the_ppca_maximum(digit_rows):
    x, maximum = digit_rows
    pair = linear_pair(x, 8)
    start(pair, x, maximum)
    fit(*pair, x, steps=5000, objective=AnalyticELBO(), optimizer=adam(0.05), scheduler=decay(5000), **QUIET)
    print(f"short of it by {maximum - analytic_elbo(*pair, x):.2e}")
    assert 0 <= maximum - analytic_elbo(*pair, x) < 2e-3


@pytest.mark.slow
def test_lbfgs_on_the_analytic_elbo_reaches_the_ppca_maximum(digit_rows):
    x, maximum = digit_rows
    pair = linear_pair(x, 8)
    start(pair, x, maximum)
    fit(*pair, x, steps=40, objective=AnalyticELBO(), optimizer=lbfgs, **QUIET)
    print(f"short of it by {maximum - analytic_elbo(*pair, x):.2e}")
    assert -1e-9 < maximum - analytic_elbo(*pair, x) < 1e-6


@pytest.mark.slow
def test_lbfgs_with_the_tied_guide_reaches_the_ppca_maximum(digit_rows):
    x, maximum = digit_rows
    pair = linear_pair(x, 8, TiedMeanField)
    start(pair, x, maximum)
    fit(*pair, x, steps=40, objective=AnalyticELBO(), optimizer=lbfgs, **QUIET)
    print(f"short of it by {maximum - analytic_elbo(*pair, x):.2e}")
    assert abs(maximum - analytic_elbo(*pair, x)) < 1e-9


@pytest.mark.slow
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


OTHERS = {
    "objective's setting": ({"objective": BetaELBO(1.0)}, {"objective": BetaELBO(4.0)}, r"objective\..*"),
    "particles": ({"objective": ELBO(1)}, {"objective": ELBO(2)}, "objective.num_particles: expected 1, got 2"),
    "schedule": ({"scheduler": decay(30)}, {"scheduler": decay(31)}, "schedule.gamma"),
    "no schedule": ({"scheduler": decay(30)}, {}, "schedule"),
    "optimiser": ({"optimizer": adam(0.01)}, {"optimizer": lambda p: SGD(p, lr=0.01)}, "optimizer"),
    "validation": ({"validation": VALIDATION}, {"validation": VALIDATION + 1}, "validation"),
    "no validation": ({"validation": VALIDATION}, {}, "validation"),
    "evaluations": (
        {"validation": VALIDATION, "evaluate_every": 5},
        {"validation": VALIDATION, "evaluate_every": 6},
        r"validation\[1\]: expected 5, got 6",
    ),
    "fewer steps": ({}, {"steps": 20}, "holds 30 steps already, more than steps=20"),
}


@pytest.mark.parametrize(("first", "second", "message"), OTHERS.values(), ids=OTHERS)
def test_a_run_that_differs_in_one_thing_is_refused(first, second, message, tmp_path):
    file = tmp_path / "run.safetensors"
    small_run(checkpoint=file, **first)
    small_run(checkpoint=file, **first)
    with pytest.raises(ValueError, match=f"expected a checkpoint of this run, but .*{message}"):
        small_run(checkpoint=file, **second)


def noisy(sigma):
    """A function pair, whose networks are its closure's."""
    torch.manual_seed(0)
    decoder, encoder = torch.nn.Linear(2, 5).double(), torch.nn.Linear(5, 2).double()

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), float(sigma)).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))

    return model, guide


PAIRS = {
    "precision": [
        lambda g=g: (IMAVAE(5, 2, gamma2=g, hidden=(8,)).double(), MeanField(5, 2).double()) for g in (25.0, 1e4)
    ],
    "prior": [
        lambda p=p: (DeepGaussianVAE(5, 2, hidden=(8,), prior=p).double(), MeanField(5, 2).double())
        for p in (None, Laplace(2))
    ],
    "function's constant": [lambda s=s: noisy(s) for s in (1.0, 0.5)],
    "what a function reads": [lambda s=s: noisy(Box(s)) for s in (1.0, 0.5)],
}


class Box:
    """A number that does not show in its description, only in what a model makes of it."""

    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value

    def __float__(self):
        return self.value


@pytest.mark.parametrize("makes", PAIRS.values(), ids=PAIRS)
def test_a_run_of_another_pair_is_refused_and_leaves_it_alone(makes, tmp_path):
    x, options = linear_gaussian(20, 5, 2).train, {"steps": 3, "seed": 0, "checkpoint": tmp_path / "run.safetensors"}
    first = fit(*makes[0](), x, **options, **QUIET)
    assert fit(*makes[0](), x, **options, **QUIET).loss == first.loss
    other = makes[1]()
    before = [t.clone() for half in other if isinstance(half, torch.nn.Module) for t in half.state_dict().values()]
    with pytest.raises(ValueError, match=r"expected a checkpoint of this run, but .* belongs to another one"):
        fit(*other, x, **options, **QUIET)
    after = [t for half in other if isinstance(half, torch.nn.Module) for t in half.state_dict().values()]
    assert same(before, after)


def test_less_patience_than_the_file_took_is_refused(tmp_path):
    options = {"validation": VALIDATION + 3, "evaluate_every": 1, "optimizer": adam(0.3)}
    small_run(checkpoint=tmp_path / "run.safetensors", **options)
    stopped, _ = small_run(patience=1, **options)
    assert stopped.steps < 30
    with pytest.raises(ValueError, match=f"patience=1 ends the run after {stopped.steps}"):
        small_run(checkpoint=tmp_path / "run.safetensors", patience=1, **options)


def test_a_longer_run_has_no_trace_of_the_shorter_ones_end(tmp_path):
    options = {"validation": VALIDATION, "evaluate_every": 10}
    straight, expected = small_run(steps=40, **options)
    short, _ = small_run(steps=25, checkpoint=tmp_path / "run.safetensors", **options)
    assert [step for step, _ in short.validation] == [10, 20, 25]
    longer, got = small_run(steps=40, checkpoint=tmp_path / "run.safetensors", **options)
    assert longer.validation == straight.validation
    assert same(got, expected)


def test_a_run_of_millions_of_steps_is_saved(tmp_path):
    file = tmp_path / "run.safetensors"
    small_run(steps=5, checkpoint=file)
    tree = load_tree(file)
    tree["loss"], tree["state"]["steps"] = torch.zeros(6_000_000, dtype=torch.float64), 6_000_000
    save_tree(file, tree)
    history, _ = small_run(steps=6_000_000, checkpoint=file)
    assert history.steps == 6_000_000


def test_two_runs_on_one_checkpoint_at_once_are_refused(tmp_path):
    file = tmp_path / "run.safetensors"
    with locked(file), pytest.raises(ValueError, match=r"run\.safetensors for this run alone"):
        small_run(checkpoint=file)


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


def with_gradient(bad, at):
    """A pair whose gradient is bad at one step, under a finite loss."""
    torch.manual_seed(0)
    calls, model = [], LinearVAE(5, 2).double()

    def hook(gradient):
        calls.append(1)
        return gradient * bad if len(calls) == at else gradient

    next(model.parameters()).register_hook(hook)
    return model, MeanField(5, 2).double()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"validation": VALIDATION, "evaluate_every": 10}], ids=["plain", "validation"])
def test_a_bad_gradient_is_an_error_and_the_run_can_go_on(bad, options, tmp_path):
    x, file = linear_gaussian(20, 5, 2).train, tmp_path / "run.safetensors"
    options = {"steps": 40, "seed": 0, **options, **QUIET}
    straight = fit(*with_gradient(1.0, 0), x, **options)
    pair = with_gradient(bad, 40)
    with pytest.raises(FloatingPointError, match="a parameter or buffer is NaN or infinite after steps") as error:
        fit(*pair, x, **options)
    assert all(p.isfinite().all() for half in pair for p in half.parameters())
    assert not any(half.training for half in pair)
    assert error.value.history.loss == straight.loss[: error.value.history.steps]
    with pytest.raises(FloatingPointError, match="after steps 10 to 19"):
        fit(*with_gradient(bad, 20), x, checkpoint=file, checkpoint_every=10, **options)
    assert fit(*with_gradient(1.0, 0), x, checkpoint=file, **options).loss == straight.loss


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, RuntimeError])
def test_an_error_leaves_the_last_good_or_the_best_parameters(error):
    taken = []

    def schedule(optimizer):
        def rate(step):
            taken.append(step)
            if step == 27:
                raise error
            return 1.0

        return torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    x, pair = linear_gaussian(20, 5, 2).train, with_gradient(1.0, 0)
    options = {"seed": 0, "validation": VALIDATION, "evaluate_every": 10, **QUIET}
    with pytest.raises(error) as caught:
        fit(*pair, x, steps=40, scheduler=schedule, **options)
    best = with_gradient(1.0, 0)
    fit(*best, x, steps=20, **options)
    assert caught.value.history.best_step == 20
    assert same([p for h in pair for p in h.parameters()], [p for h in best for p in h.parameters()])
    assert not any(half.training for half in pair)


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


@pytest.mark.parametrize("objective", [None, pyro.infer.Trace_ELBO(), pyro.infer.TraceMeanField_ELBO()])
def test_swapped_halves_are_refused_under_any_objective(objective):
    model, guide = LinearVAE(5, 2), MeanField(5, 2)
    with pytest.raises(ValueError, match=r"expected a model that observes data, .* the guide observes \['x'\]"):
        fit(guide, model, torch.zeros(8, 5), steps=1, objective=objective, progress=False)
    fit(model, guide, torch.zeros(8, 5), steps=1, objective=objective, progress=False)


@pytest.mark.parametrize(
    ("device", "error", "message"),
    [
        ("gpu", ValueError, r"expected device to be 'auto' or one of \['cpu'.*\], got 'gpu'"),
        ("cuda:99", ValueError, r"expected device to be 'auto' or one of \['cpu'.*\], got 'cuda:99'"),
        (torch.device("cuda", 99), ValueError, "got 'cuda:99'"),
        (0.5, TypeError, r"expected device to be a name or a torch\.device, got 0\.5"),
    ],
)
def test_a_device_that_is_not_there_is_refused(device, error, message):
    x = torch.randn(4, 3).double()
    with pytest.raises(error, match=message):
        fit(*linear_pair(x, 1), x, steps=1, device=device, **QUIET)


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


def test_a_run_goes_on_after_its_pair_was_frozen(tmp_path):
    x, file = linear_gaussian(20, 5, 2).train, tmp_path / "run.safetensors"

    def pair():
        torch.manual_seed(0)
        model = DeepGaussianVAE(5, 2, hidden=(8,), noise=OptimalNoise()).double()
        return model, MeanField(5, 2, hidden=(8,)).double()

    straight = fit(*pair(), x, steps=6, seed=0, **QUIET)
    model, guide = pair()
    fit(model, guide, x, steps=3, seed=0, checkpoint=file, **QUIET)
    model.freeze(guide, x, num_samples=10)
    assert fit(model, guide, x, steps=6, seed=0, checkpoint=file, **QUIET).loss == straight.loss
