"""Labels, and activations stored as bits: what goes in comes out, and never more bytes than allowed."""

import itertools
import math

import pytest
import tiny
import torch
from fuzz import fuzz
from hypothesis import given
from hypothesis import strategies as st

from vllm_dejavu.predictor_training.collect import Collector, Request
from vllm_dejavu.predictor_training.hf_model import HfModel
from vllm_dejavu.predictor_training.labels import Labels, active_neurons, head_grams, neuron_energy, top_heads
from vllm_dejavu.predictor_training.samples import (
    Rows,
    SampleStore,
    pack_bits,
    row_bytes,
    stride_within,
    unpack_bits,
)

HIDDEN, FFN, HEADS = 64, 256, 2  # of tiny.make_opt
REQUEST = {"mlp": ("self",), "attention": ("previous",)}


# Labels


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9, 0.99, 1.0])
def test_energy_label_is_the_smallest_set_that_holds_the_share(share):
    """Against all subsets of six neurons: none with fewer members holds as much, and the label does hold
    it.
    """
    g = torch.Generator().manual_seed(0)
    z = torch.randn(60, 6, generator=g).double()
    norms = torch.rand(6, generator=g).double() + 0.1
    label = Labels("energy", share).active(z, norms)
    energy = neuron_energy(z, norms) ** 2
    subsets = torch.tensor(list(itertools.product([False, True], repeat=6)))
    for row, chosen in zip(energy, label, strict=True):
        wanted = share * row.sum() * (1 - 1e-12)
        held = (subsets * row).sum(1) >= wanted
        assert (chosen * row).sum() >= wanted
        assert int(chosen.sum()) == min(subsets[held].sum(1).tolist())


@pytest.mark.parametrize(
    ("energies", "share", "expected"),
    [
        ([3.0, 4.0, 0.0], 0.64, [False, True, False]),  # 16 of 25 is just enough
        ([3.0, 4.0, 0.0], 0.65, [True, True, False]),
        ([-5.0, 1.0, -1.0], 0.9, [False, True, False]),  # ReLU lets no negative through
        ([0.0, 0.0, 0.0], 0.99, [False, False, False]),
        ([-1.0, -2.0, -3.0], 1.0, [False, False, False]),
        ([2.0, 0.0, 1.0], 1.0, [True, False, True]),  # those that hold nothing are not needed for all of it
    ],
    ids=["exactly", "one-more", "negative", "all-zero", "all-negative", "everything"],
)
def test_energy_label_by_hand(energies, share, expected):
    assert Labels("energy", share).active(torch.tensor([energies]), torch.ones(3)).tolist() == [expected]


@pytest.mark.parametrize(
    ("share", "count"), [(0.2, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.8, 4), (1.0, 4)]
)
def test_energy_label_of_ties(share, count):
    """Any of equal neurons will do, but no more of them than are needed."""
    assert int(Labels("energy", share).active(torch.ones(1, 4), torch.ones(4)).sum()) == count


def test_energy_counts_fc2():
    """A small activation with a long fc2 row holds more than a large one with a short row."""
    z, norms = torch.tensor([[1.0, 10.0]]), torch.tensor([100.0, 1.0])
    assert Labels("energy", 0.9).active(z, norms).tolist() == [[True, False]]
    assert Labels().active(z, norms).tolist() == active_neurons(z).tolist() == [[True, True]]


def test_top_heads():
    norms = torch.tensor([[1.0, 5.0, 2.0, 4.0], [9.0, 1.0, 8.0, 7.0]])
    assert top_heads(norms, 0.5).tolist() == [[False, True, False, True], [True, False, True, False]]
    assert top_heads(norms, 0.01).sum(1).tolist() == [1, 1] and top_heads(norms, 1.0).all()
    assert top_heads(torch.ones(3, 4), 0.5).sum(1).tolist() == [2, 2, 2]


def test_output_norm_is_before_out_proj_and_contribution_behind_it():
    attn = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
    # head 0: (0, 2 * 3), head 1: (7, 0)
    out_proj = torch.tensor([[0.0, 0.0, 0.0, 7.0], [2.0, 0.0, 0.0, 0.0]])
    grams = head_grams(out_proj, 2)
    assert Labels(heads="output_norm").head_norms(attn, grams).tolist() == [[5.0, 1.0]]
    assert Labels(heads="contribution").head_norms(attn, grams).tolist() == [[6.0, 7.0]]
    assert torch.equal(Labels().head_targets(attn, grams), torch.tensor([[6.0, 7.0]]).log())
    assert Labels().head_targets(0 * attn, grams).tolist() == [[pytest.approx(math.log(1e-6))] * 2], (
        "of nothing, finite"
    )


# Shards


@fuzz(100)
@given(rows=st.integers(1, 9), units=st.integers(1, 70), seed=st.integers(0, 99))
def test_bits_round_trip(rows, units, seed):
    mask = torch.rand(rows, units, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, -(-units // 8))
    assert torch.equal(unpack_bits(packed, units), mask)


def some_rows(count, seed=0, hidden=5, ffn=13, heads=3, positive=0.4):
    g = torch.Generator().manual_seed(seed)
    z = torch.where(
        torch.rand(count, ffn, generator=g) < positive, torch.rand(count, ffn, generator=g) + 0.1, -1.0
    )
    return Rows(
        torch.randn(count, hidden, generator=g),
        z > 0.3,
        z.clamp_min(0),
        torch.randn(count, hidden, generator=g),
        torch.rand(count, heads, generator=g),
    )


@pytest.mark.parametrize("with_energy", [True, False], ids=["energies", "labels-only"])
def test_rows_round_trip_in_order(tmp_path, with_energy):
    """In fp16; energies, whose squares would not fit that, in bf16, at their places, 0 elsewhere; another
    layer's and empty shards apart.
    """
    store = SampleStore(tmp_path / "samples", 13, with_energy, True)
    parts = [some_rows(n, n) for n in (4, 1, 7)]
    for part, rows in zip((0, 4, 100), parts, strict=True):
        store.write(2, part, rows)
    store.write(2, 50, some_rows(0))
    store.write(1, 0, some_rows(3, 9))
    found = list(store.read(2))
    assert [len(r) for r in found] == [4, 1, 7] and len(list(store.read(1))) == 1 and not list(store.read(0))
    for rows, truth in zip(found, parts, strict=True):
        for name in ("mlp_x", "attn_x", "head_norms"):
            assert torch.equal(getattr(rows, name), getattr(truth, name).half())
        assert torch.equal(rows.active, truth.active)
        assert torch.equal(rows.energy, truth.energy.bfloat16()) if with_energy else rows.energy is None


def test_shards_behind_a_checkpoint_are_forgotten(tmp_path):
    store = SampleStore(tmp_path / "samples", 13, False, True)
    for layer, part in itertools.product((0, 1), (0, 8, 64, 72)):
        store.write(layer, part, some_rows(2, part))
    store.discard_from(64)
    assert [len(list(store.read(layer))) for layer in (0, 1)] == [2, 2]
    assert torch.equal(list(store.read(0))[1].mlp_x, some_rows(2, 8).mlp_x.half())


def test_clearing_leaves_what_is_not_ours(tmp_path):
    store = SampleStore(tmp_path / "samples", 13, False, True)
    store.write(0, 0, some_rows(2))
    (tmp_path / "samples" / "mine.txt").write_text("kept")
    store.clear()
    assert [p.name for p in (tmp_path / "samples").iterdir()] == ["mine.txt"]
    (tmp_path / "samples" / "mine.txt").unlink()
    store.clear()
    assert not (tmp_path / "samples").exists()
    store.clear()


# How many tokens are kept


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    return HfModel(str(tiny.make_opt(tmp_path_factory.mktemp("opt"))))


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, tiny.VOCAB, (16, 24), generator=torch.Generator().manual_seed(1))


def sample(opt, tokens, directory, batch=3, with_energy=True, stride=1, layers=range(3)):
    store = SampleStore(directory, FFN, with_energy, True)
    Collector(opt, Request(REQUEST, layers, sample_stride=stride), samples=store).run(
        tokens, batch, progress=lambda n: None
    )
    return store


@pytest.mark.parametrize("with_energy", [True, False], ids=["energies", "labels-only"])
@pytest.mark.parametrize("limit", [5_000, 20_000, 100_000, 1_000_000])
def test_what_is_written_stays_below_the_limit(opt, tokens, tmp_path, limit, with_energy):
    """Really written and counted.

    Bug: neither shards' headers nor the places of energies were counted, so small limits were passed.
    """
    stride = stride_within(limit, tokens.numel(), 3, row_bytes(HIDDEN, FFN, HEADS, with_energy, True))
    store = sample(opt, tokens, tmp_path / "s", with_energy=with_energy, stride=stride)
    kept = sum(len(r) for r in store.read(1))
    assert kept == -(-tokens.numel() // stride) >= 1
    assert 0 < store.num_bytes() <= limit
    if stride > 1:
        assert store.num_bytes() > limit / 8, "far fewer tokens were kept than fit"


def test_even_if_every_neuron_is_positive(tmp_path):
    """The worst case: each token in a shard of its own, and every energy stored."""
    store = SampleStore(tmp_path / "s", 1000, True, True)
    for part in range(20):
        store.write(100, 10**5 + part, some_rows(1, part, hidden=48, ffn=1000, heads=12, positive=1.0))
    assert (
        0.8 * 20 * row_bytes(48, 1000, 12, True, True)
        < store.num_bytes()
        <= 20 * row_bytes(48, 1000, 12, True, True)
    )


@fuzz(200)
@given(
    limit=st.integers(1, 10**7),
    tokens=st.integers(1, 10**5),
    layers=st.integers(1, 96),
    row=st.integers(1, 10**4),
)
def test_stride_is_the_smallest_that_fits(limit, tokens, layers, row):
    if limit < layers * row:
        with pytest.raises(
            ValueError, match=f"--max-disk {limit} bytes cannot hold the activations of one token"
        ):
            stride_within(limit, tokens, layers, row)
        return

    def bytes_at(stride):
        return -(-tokens // stride) * layers * row

    stride = stride_within(limit, tokens, layers, row)
    assert bytes_at(stride) <= limit and (stride == 1 or bytes_at(stride - 1) > limit)


def test_without_a_limit_all_are_kept():
    assert stride_within(None, 10**9, 64, 10**5) == 1


@pytest.mark.parametrize("stride", [1, 5, 7, 100])
def test_the_kept_tokens_do_not_depend_on_the_batch(opt, tokens, tmp_path, stride):
    """Every stride-th of the whole text, inputs and labels of the same token."""
    seen = {"x": [], "z": []}

    def on_mlp(layer, states, z):
        if layer == 1:
            seen["x"].append(states.mlp_input.clone())
            seen["z"].append(z.clone())

    with opt.observed(on_mlp=on_mlp):
        opt.decoder(tokens)
    x, z = (torch.cat(v)[::stride] for v in (seen["x"], seen["z"]))
    for batch in (1, 3, 16):
        rows = list(sample(opt, tokens, tmp_path / str(batch), batch, stride=stride).read(1))
        assert torch.allclose(torch.cat([r.mlp_x for r in rows]).float(), x, atol=2e-3, rtol=1e-3)
        sure = z.abs() > 1e-4
        assert torch.equal(torch.cat([r.active for r in rows])[sure], (z > 0)[sure])
        energy = neuron_energy(z, opt.weight(1, "fc2").norm(dim=0))
        assert torch.allclose(torch.cat([r.energy for r in rows]).float(), energy, atol=2e-3, rtol=2e-3)
