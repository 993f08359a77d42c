"""Forms of predictors on a synthetic MLP whose truth is known, and integers in place of floats."""

import itertools
import sys

import pytest
import torch
from fuzz import fuzz
from hypothesis import given
from hypothesis import strategies as st
from kernel_flat import flat_reference as reference

from vllm_dejavu.predictor import Predictor, quantize
from vllm_dejavu.predictor_training import forms
from vllm_dejavu.predictor_training.collect import Moments
from vllm_dejavu.predictor_training.forms import FORMS, FittedMlp, Form, MlpTask
from vllm_dejavu.predictor_training.samples import Rows
from vllm_dejavu.predictor_training.train import LayerWeights, fit_mlp

HIDDEN, FFN, RANK = 24, 96, 6


class Synthetic:
    """fc1 is a matrix of rank RANK and noise. One token in ten is very long and lies in three directions, as
    some do in OPTs: least squares spends its rank on those, though their signs are easy.

    Args:
        loud: how much longer fc2's rows are of the first quarter of the neurons.
    """

    def __init__(self, tokens=12_000, seed=0, noise=0.5, loud=1.0):
        g = torch.Generator().manual_seed(seed)
        self.weight = (
            torch.randn(FFN, RANK, generator=g) @ torch.randn(RANK, HIDDEN, generator=g) * RANK**-0.5
        )
        self.weight = (self.weight + noise * torch.randn(FFN, HIDDEN, generator=g)).double()
        self.bias = torch.full((FFN,), -3.0).double()
        self.fc2_norms = torch.ones(FFN).double()
        self.fc2_norms[: FFN // 4] *= loud
        usual = torch.randn(2 * tokens, HIDDEN, generator=g) @ (
            torch.eye(HIDDEN) + 0.1 * torch.randn(HIDDEN, HIDDEN, generator=g)
        )
        far = (
            20 * torch.randn(2 * tokens, 3, generator=g) @ torch.randn(3, HIDDEN, generator=g) * HIDDEN**-0.5
        )
        self.x = torch.where(torch.rand(2 * tokens, 1, generator=g) < 0.1, far, usual).half()
        self.z = self.x.double() @ self.weight.T + self.bias
        self.active = self.z > 0
        self.train, self.test = slice(0, tokens), slice(tokens, 2 * tokens)

    def task(self, rank=RANK, **changes) -> MlpTask:
        x = self.x[self.train].double()
        mean, cov = x.mean(0), x.T.cov(correction=0)
        energy = self.energy(self.train)
        return MlpTask(
            **{
                "rank": rank,
                "x_mean": mean,
                "x_cov": cov,
                "m_mean": mean,
                "m_cov": cov,
                "xm_cov": cov,
                "weight": self.weight,
                "bias": self.bias,
                "fc2_norms": self.fc2_norms,
                "norm_weight": None,
                "norm_bias": None,
                "activation_rate": self.active[self.train].double().mean(0),
                "energy": (energy**2).double().mean(0),
                "samples": self.samples,
                **changes,
            }
        )

    def energy(self, part):
        return (self.z[part].clamp_min(0) * self.fc2_norms).float()

    def samples(self):
        for start in range(self.train.start, self.train.stop, 4096):
            part = slice(start, min(start + 4096, self.train.stop))
            count = part.stop - part.start
            yield Rows(
                self.x[part], self.active[part], self.energy(part).half(), self.x[part], torch.zeros(count, 1)
            )

    def scores(self, fitted: FittedMlp, part=None):
        x = self.x[part or self.test].double()
        return x @ fitted.down.double().T @ fitted.up.double().T + fitted.bias.double()

    def auc(self, fitted: FittedMlp) -> float:
        """Chance that an active neuron scores higher than an inactive one, over all held-out tokens and
        neurons.
        """
        scores, active = self.scores(fitted).flatten(), self.active[self.test].flatten()
        ranks = torch.empty_like(scores)
        ranks[scores.argsort()] = torch.arange(1.0, len(scores) + 1, dtype=torch.float64)
        positives = int(active.sum())
        return float(
            (ranks[active].sum() - positives * (positives + 1) / 2) / (positives * (len(active) - positives))
        )

    def loss(self, fitted: FittedMlp, scale=1.0, margin=0.0) -> float:
        """The paper's: cross-entropy, inactive neurons weighing as much as there are active ones."""
        active = self.active[self.test].double()
        weight = torch.where(active > 0, 1.0, active.mean())
        return float(
            torch.nn.functional.binary_cross_entropy_with_logits(
                scale * self.scores(fitted) + margin, active, weight
            )
        )

    def recall(self, fitted: FittedMlp, neurons: slice) -> float:
        """Of these neurons' activations, at the margin at which as many neurons are selected as are
        active.
        """
        scores, active = self.scores(fitted), self.active[self.test]
        cut = scores.flatten().kthvalue(int((1 - float(active.double().mean())) * scores.numel())).values
        chosen = (scores > cut) & active
        return float(chosen[:, neurons].sum() / active[:, neurons].sum())


@pytest.fixture(scope="module")
def synthetic():
    return Synthetic()


def test_closed_form_at_full_rank_is_least_squares(synthetic):
    """The input says all about z, so z comes back, but for the ridge: every score is z in one unit a
    neuron.
    """
    fitted = forms.closed_form(synthetic.task(rank=HIDDEN))
    scores, z = synthetic.scores(fitted), synthetic.z[synthetic.test]
    unit = (scores * z).sum(0) / (z * z).sum(0)
    assert ((scores / unit - z).pow(2).mean(0).sqrt() / z.std(0)).max() < 1e-2
    assert fitted.explained > 0.99


def test_closed_form_scores_are_in_residual_standard_deviations(synthetic):
    """What is left of z, in the unit of the score, has a standard deviation of 1; the unit is var(z
    explained) / its deviation.
    """
    fitted = forms.closed_form(synthetic.task())
    scores, z = synthetic.scores(fitted, synthetic.train), synthetic.z[synthetic.train]
    centred = scores - scores.mean(0)
    # scores are `unit` times the best linear prediction of z
    unit = (centred**2).sum(0) / (centred * z).sum(0)
    assert (unit * z - scores).std(0).sub(1).abs().max() < 0.02


def test_closed_form_finds_the_subspace(synthetic):
    assert (
        forms.closed_form(synthetic.task(rank=RANK)).explained
        > 0.9
        > 0.8
        > forms.closed_form(synthetic.task(rank=RANK // 3)).explained
    )


def test_closed_form_spends_its_rank_on_the_undecided(synthetic):
    """A neuron that never fires needs no precision: it takes none from the others."""
    z, half = synthetic.z[synthetic.test], FFN // 2

    def explained(first, second):
        """Share of the first neurons' variance that their scores explain, when so many tokens activate the
        first and the second half.
        """
        rate = torch.tensor([first] * half + [second] * half, dtype=torch.float64)
        scores = synthetic.scores(forms.closed_form(synthetic.task(rank=2, activation_rate=rate)))
        return float(
            torch.stack(
                [torch.corrcoef(torch.stack([scores[:, i], z[:, i]]))[0, 1] ** 2 for i in range(half)]
            ).mean()
        )

    assert explained(0.5, 0.0) > 1.01 * explained(0.5, 0.5) and explained(0.5, 0.5) > 1.01 * explained(
        0.0, 0.5
    )


def test_closed_form_needs_no_samples(synthetic):
    forms.closed_form(synthetic.task(samples=lambda: pytest.fail("samples were read")))


def test_finetuned_is_better_than_the_closed_form_it_starts_from(synthetic):
    """On held-out tokens, by the loss at the best scale and margin that the closed form could be given, and
    by order.
    """
    closed, tuned = forms.closed_form(synthetic.task()), forms.finetuned(synthetic.task())
    scales, margins = (0.5, 0.7, 1, 1.4, 1.7, 2, 3), (0, 0.5, 1, 1.5, 2, 3)
    assert synthetic.loss(tuned) < 0.995 * min(
        synthetic.loss(closed, s, m) for s, m in itertools.product(scales, margins)
    )
    assert synthetic.auc(tuned) > synthetic.auc(closed)


def test_finetuned_starts_from_the_closed_form(synthetic, monkeypatch):
    """Without a step nothing changes but the scale of scores."""
    monkeypatch.setattr(forms, "FINETUNED", (1, 512, 0.0))
    closed, tuned = forms.closed_form(synthetic.task()), forms.finetuned(synthetic.task())
    assert torch.allclose(synthetic.scores(tuned), 1.7 * synthetic.scores(closed), atol=1e-3)


def test_paper_learns(synthetic):
    assert synthetic.auc(forms.paper(synthetic.task())) > 0.85


@pytest.mark.parametrize("name", ["closed_form", "finetuned", "paper"])
def test_the_seed_decides(synthetic, name):
    first, again = (FORMS[name].fit(synthetic.task()) for _ in range(2))
    assert all(torch.equal(getattr(first, k), getattr(again, k)) for k in ("down", "up", "bias"))
    other = FORMS[name].fit(synthetic.task(seed=1))
    assert torch.equal(first.up, other.up) == (name == "closed_form")


@pytest.mark.parametrize("name", ["closed_form", "finetuned"])
def test_energy_loss_prefers_what_adds_much(name):
    """A quarter of the neurons has fc2 rows 8 times as long: of their activations fewer are missed, of the
    others' more.
    """
    data = Synthetic(loud=8.0, noise=0.5)
    plain, weighed = (FORMS[name].fit(data.task(energy_loss=on)) for on in (False, True))
    loud, quiet = slice(0, FFN // 4), slice(FFN // 4, FFN)
    assert data.recall(weighed, loud) > data.recall(plain, loud) + 0.01
    assert data.recall(weighed, quiet) < data.recall(plain, quiet)


@pytest.mark.parametrize("name", ["finetuned", "paper"])
def test_gradient_forms_say_what_they_lack(synthetic, name):
    with pytest.raises(ValueError, match="none were collected"):
        FORMS[name].fit(synthetic.task(samples=None))
    with pytest.raises(ValueError, match="--max-disk"):
        FORMS[name].fit(synthetic.task(samples=lambda: iter(())))


def test_svd_uses_the_norm_only():
    """It takes LayerNorm's output to be white: scale and bias say all. Where that is so it finds what the
    data say.
    """
    data = Synthetic()
    g = torch.Generator().manual_seed(3)
    scale, shift = torch.rand(HIDDEN, generator=g).double() + 0.5, torch.randn(HIDDEN, generator=g).double()
    data.x = (torch.randn(len(data.x), HIDDEN, generator=g) * scale + shift).half()
    data.z = data.x.double() @ data.weight.T + data.bias
    data.active = data.z > 0
    nonsense = {
        k: torch.full_like(getattr(data.task(), k), torch.nan)
        for k in ("x_mean", "x_cov", "m_mean", "m_cov", "xm_cov")
    }
    found = forms.svd(data.task(norm_weight=scale, norm_bias=shift, samples=None, **nonsense))
    assert data.auc(found) == pytest.approx(data.auc(forms.closed_form(data.task())), abs=0.01)
    assert data.auc(found) > 0.8


def test_svd_refuses_what_it_cannot_do(synthetic):
    with pytest.raises(ValueError, match="needs a LayerNorm"):
        forms.svd(synthetic.task())
    h, names = (
        4,
        ("mlp_input.second", "mlp_input.sum", "previous.second", "previous.sum", "previous.mlp_input"),
    )
    tensors = {f"layers.1.{n}": torch.ones(h) if n.endswith("sum") else torch.eye(h) for n in names}
    moments = Moments({k: v.double() for k, v in tensors.items()}, 1)
    weights = LayerWeights(
        torch.ones(8, h).double(),
        torch.zeros(8).double(),
        torch.ones(8).double(),
        torch.ones(h).double(),
        torch.zeros(h).double(),
    )
    with pytest.raises(ValueError, match="'svd' is for lookahead 'self' only, found 'previous'"):
        fit_mlp(moments, 1, weights, "previous", 2, FORMS["svd"])


class TestNames:
    @pytest.fixture
    def module(self, tmp_path, monkeypatch):
        (tmp_path / "my_forms.py").write_text(
            "from vllm_dejavu.predictor_training.forms import Form, closed_form\n"
            "OWN = Form('own', lambda task: closed_form(task), needs_samples=True)\nNOT_ONE = 7\n"
        )
        (tmp_path / "broken_forms.py").write_text("import no_such_module_anywhere\n")
        monkeypatch.syspath_prepend(tmp_path)
        yield
        for name in ("my_forms", "broken_forms"):
            sys.modules.pop(name, None)

    def test_a_users_own(self, module, synthetic):
        form = forms.get("my_forms:OWN")
        assert isinstance(form, Form) and (form.name, form.needs_samples) == ("own", True)
        assert torch.equal(form.fit(synthetic.task()).up, forms.closed_form(synthetic.task()).up)

    @pytest.mark.parametrize("name", sorted(FORMS))
    def test_ours(self, name):
        assert forms.get(name).name == name

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (
                "clsoed_form",
                (
                    r"'clsoed_form' is unknown: expected one of \['closed_form', 'finetuned', 'paper',"
                    r" 'svd'\], or module:attribute"
                ),
            ),
            ("no_such_forms:X", "No module named 'no_such_forms'.*Expected an importable module:attribute"),
            ("my_forms:MISSING", "has no attribute 'MISSING'"),
            ("my_forms:NOT_ONE", "expected a vllm_dejavu.predictor_training.forms.Form, found int"),
            ("broken_forms:X", "No module named 'no_such_module_anywhere'"),
            (":X", "--form :X: Empty module name. Expected an importable"),
            ("my_forms:", "--form my_forms:: "),
        ],
    )
    def test_errors(self, module, name, message):
        with pytest.raises(ValueError, match=message):
            forms.get(name)


def predictor(seed=0, hidden=40, units=200, rank=12, heads=False):
    g = torch.Generator().manual_seed(seed)
    if heads:
        made = {"weight": torch.randn(units, hidden, generator=g) * hidden**-0.5}
    else:
        made = {
            "down": torch.randn(rank, hidden, generator=g) * hidden**-0.5,
            "up": torch.randn(units, rank, generator=g) * rank**-0.5,
        }
        # neurons and directions of very different sizes: each has a step of its own
        made = {
            "down": made["down"] * torch.logspace(-3, 3, rank)[:, None],
            "up": made["up"] * torch.logspace(3, -3, rank) * torch.logspace(-4, 4, units)[:, None],
        }
    bias = torch.randn(units, generator=g) * (torch.logspace(-4, 4, units) if not heads else 1)
    return {**made, "bias": bias, "activation_rate": torch.rand(units, generator=g)}


def exact_scores(t, x):
    x = x.double()
    return (x @ t["down"].double().T @ t["up"].double().T if "down" in t else x @ t["weight"].double().T) + t[
        "bias"
    ].double()


@pytest.mark.parametrize("heads", [False, True], ids=["neurons", "heads"])
class TestIntegers:
    def test_selections_are_those_of_float64(self, heads):
        """Away from 0 none differs; near it few do: rounding moves a score by a hundredth of its unit's
        spread.
        """
        made = predictor(heads=heads)
        x = torch.randn(500, 40, generator=torch.Generator().manual_seed(9))
        exact = exact_scores(made, x)
        spread = exact.std(0)
        found = Predictor(quantize(made, 8)).scores(x)
        wrong = (found > 0) != (exact > 0)
        assert not (wrong & (exact.abs() > 0.05 * spread)).any()
        assert 0 < int(wrong.sum()) < 0.01 * wrong.numel()

    @pytest.mark.parametrize(("bits", "largest"), [(8, 127), (4, 7), (2, 1)])
    def test_weights_are_integers_of_so_many_bits(self, heads, bits, largest):
        """Each row reaches the largest, so no bit is wasted; -128 is not used."""
        made = quantize(predictor(heads=heads), bits)
        for name in ("weight",) if heads else ("down", "up"):
            assert made[name].dtype == torch.int8
            assert made[name].int().abs().amax(1).eq(largest).all()

    def test_the_bias_carries_the_scale(self, heads):
        """Integer scores are the true ones in units of the step by which the unit's row was divided."""
        made = predictor(heads=heads)
        integers = quantize(made, 8)
        step = made["bias"].double() / integers["bias"].double()
        x = torch.randn(50, 40, generator=torch.Generator().manual_seed(9))
        exact = exact_scores(made, x)
        assert (
            step.min() > 0 and ((exact_scores(integers, x) * step - exact) / exact.std(0)).abs().max() < 0.05
        )
        assert (
            torch.equal(integers["activation_rate"], made["activation_rate"])
            and integers["bias"].dtype == torch.float32
        )

    def test_rows_of_zeros(self, heads):
        made = predictor(heads=heads)
        for name in ("weight",) if heads else ("up", "down"):
            made[name][3] = 0
        made["bias"][3:5] = torch.tensor([-2.0, 0.0])
        integers = quantize(made, 8)
        assert all(torch.isfinite(t.float()).all() for t in integers.values())
        x = torch.randn(20, 40, generator=torch.Generator().manual_seed(9))
        scores = Predictor(integers).scores(x)
        assert torch.isfinite(scores).all() and scores[:, 3].lt(0).all(), (
            "a unit without weights is decided by its bias"
        )
        nothing = quantize({k: torch.zeros_like(v) for k, v in made.items()}, 8)
        assert Predictor(nothing).scores(x).eq(0).all()

    def test_references_take_them(self, heads):
        """As the floats of the same values, bit by bit, whatever the activations' type."""
        integers = quantize(predictor(heads=heads), 8)
        floats = {k: v.float() for k, v in integers.items()}
        lens = torch.tensor([3, 0, 5], dtype=torch.int32)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x = torch.randn(3, 40, generator=torch.Generator().manual_seed(9)).to(dtype)
            if heads:
                args = (integers["weight"], integers["bias"]), (floats["weight"], floats["bias"])
                a, b = (reference.score_heads(x, *t, lens) for t in args)
                assert torch.equal(a, b)
            else:
                a, b = (
                    reference.select_neurons(x, t["down"], t["up"], t["bias"], lens, True)
                    for t in (integers, floats)
                )
                assert all(torch.equal(p, q) for p, q in zip(a[:3], b[:3], strict=True)) and a[2].any()


@fuzz(50)
@given(
    seed=st.integers(0, 10**6),
    hidden=st.integers(1, 40),
    units=st.integers(1, 60),
    rank=st.integers(1, 20),
    bits=st.integers(2, 8),
)
def test_integers_of_any_shape(seed, hidden, units, rank, bits):
    made = predictor(seed, hidden, units, rank)
    integers = quantize(made, bits)
    largest = 2 ** (bits - 1) - 1
    assert {k: v.shape for k, v in integers.items()} == {k: v.shape for k, v in made.items()}
    assert all(
        integers[k].dtype == torch.int8 and integers[k].int().abs().max() <= largest for k in ("down", "up")
    )
    assert torch.equal(integers["bias"] > 0, made["bias"] > 0)
