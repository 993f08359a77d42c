"""The launch-and-bytes model: bytes by hand, what must rise and fall, the design note's figures."""

from dataclasses import replace

import pytest

from vllm_dejavu.published import DEVICES, GEOMETRIES, full_name, opt_geometry, preset_densities
from vllm_dejavu.roofline import (
    DENSE_LAUNCHES,
    SPARSE_LAUNCHES,
    Device,
    Workload,
    account,
    linear_weights,
    num_weights,
    quantized,
)

H200 = DEVICES["h200"]
TINY = opt_geometry(8, num_heads=2, num_layers=3, vocab_size=10, max_positions=4)
# 1 GB/s reads 1e3 bytes in a microsecond.
SLOW = Device("slow", bandwidth_gbs=1, memory_gb=1, link_gbs=1, launch_us=2, all_reduce_us=5)
TINY_WORK = Workload(batch=2, context=3, mlp_density=0.25, head_density=0.5, survivors=0.5, predictor_rank=1)
DESIGN = {
    "6.7b": Workload(batch=1, context=1, mlp_density=0.10, head_density=0.5),
    "30b": Workload(batch=1, context=1, mlp_density=0.08, head_density=0.4),
}


def parts(result):
    return {name: (part.dense_bytes, part.sparse_bytes) for name, part in result.parts.items()}


def test_bytes_by_hand():
    """hidden 8, 2 heads, ffn 32, 2 sequences of 3 tokens, 16 bits; heads 0.5 each, union 1 - 0.5^2 = 0.75."""
    result = account(TINY, SLOW, TINY_WORK)
    assert parts(result) == {
        "qkv": (384, 352),  # 3 x 128; K, V and 0.75 of Q
        "KV write": (64, 64),  # 2 sequences x K and V of 8 x 2 bytes
        "KV read": (192, 96),
        "out_proj": (128, 96),
        "fc1": (512, 128),
        "fc2": (512, 64),  # half of the quarter
        "predictor": (0, 112),  # 2 x (1 x 8 down + 32 x 1 up + 2 x 8 heads)
    }
    assert (result.dense_bytes, result.sparse_bytes) == (1792, 912)
    assert result.dense_us == pytest.approx(1.792 + 20) and result.sparse_us == pytest.approx(0.912 + 20)
    assert result.outer_bytes == 10 * 8 * 2 + 2 * 2 * 8 * 2  # lm_head; two rows of each embedding table
    assert result.outer_us == pytest.approx(0.224 + 5 * 2)
    assert result.sparse_step_us == pytest.approx(3 * 20.912 + 10.224)
    assert result.step_speedup == pytest.approx((3 * 21.792 + 10.224) / (3 * 20.912 + 10.224))
    assert result.need_gb * 1e9 == pytest.approx(3 * 12 * 64 * 2 + 16 * 8 * 2 + 3 * 192) and result.fits
    assert result.dominant == "launches"
    assert account(TINY, replace(SLOW, launch_us=0), TINY_WORK).dominant == "qkv"


def test_an_mlp_of_another_width():
    """ffn 24 instead of 32: three quarters of what follows from it, the rest as it was."""
    plain, narrow = account(TINY, SLOW, TINY_WORK), account(replace(TINY, ffn_dim=24), SLOW, TINY_WORK)
    for name in ("fc1", "fc2"):
        assert parts(narrow)[name] == tuple(b * 3 / 4 for b in parts(plain)[name])
    assert parts(narrow)["predictor"] == (0, 2 * (8 + 24 + 2 * 8))
    assert {n for n in plain.parts if parts(plain)[n] != parts(narrow)[n]} == {"fc1", "fc2", "predictor"}
    assert (plain.need_gb - narrow.need_gb) * 1e9 == pytest.approx(3 * 2 * 8 * 8 * 2)
    assert num_weights(narrow.geometry) == 3 * (4 * 64 + 2 * 8 * 24) + (10 + 6) * 8


def test_heads_divide_the_hidden_size():
    with pytest.raises(ValueError, match="hidden_size 10 is not a multiple of num_heads 4"):
        opt_geometry(10, 4, 1)


INT4 = {"dense_weight_bits": 4, "sparse_weight_bits": 4, "quantization_group": 4}


def test_int4_bytes_by_hand():
    """As above in 4 bits with a scale for 4 inputs: 1/2 byte a value and 2/4 for its scale. A group of fc2
    belongs to 4 neurons, of which fc1 leaves 1 in 8: 1 - (7/8)^4 of the groups are read; a group of out_proj
    is a head."""
    result = account(TINY, SLOW, replace(TINY_WORK, **INT4))
    assert parts(result) == {
        "qkv": (192, 176),  # 3 x 64 weights; 2.75 x 64
        "KV write": (64, 64),
        "KV read": (192, 96),
        "out_proj": (64, 64 * 0.75),
        "fc1": (256, 64),
        "fc2": (256, pytest.approx(256 * (0.125 * 0.5 + (1 - 0.875**4) * 0.5))),
        "predictor": (0, 112),  # stays as it is
    }
    assert result.outer_bytes == account(TINY, SLOW, TINY_WORK).outer_bytes
    assert result.need_gb * 1e9 == pytest.approx(3 * 12 * 64 * 1 + 16 * 8 * 2 + 3 * 192)
    assert result.dense_us == pytest.approx((192 + 64 + 192 + 64 + 256 + 256) / 1e3 + 20)


def test_a_group_of_several_heads_is_read_for_any_of_them():
    """2 heads of 4 in a group of 8: values for 0.75 of the heads, scales for 1 - 0.25^2 of the groups."""
    result = account(TINY, SLOW, replace(TINY_WORK, **INT4 | {"quantization_group": 8}))
    assert result.parts["out_proj"].sparse_bytes == 64 * (0.75 * 0.5 + 0.9375 * 0.25)


def test_each_side_has_its_own_bits():
    plain, small = account(TINY, SLOW, TINY_WORK), account(TINY, SLOW, replace(TINY_WORK, **INT4))
    mixed = account(TINY, SLOW, replace(TINY_WORK, **INT4 | {"sparse_weight_bits": 16}))
    assert (mixed.dense_us, mixed.sparse_us, mixed.need_gb) == (
        small.dense_us,
        plain.sparse_us,
        plain.need_gb,
    )
    assert small.dense_us < plain.dense_us and small.sparse_us < plain.sparse_us
    int8 = account(TINY, SLOW, replace(TINY_WORK, **INT4 | {"dense_weight_bits": 8}))
    assert int8.parts["fc1"].dense_bytes == 256 * 1.5


def test_int4_weights_of_a_real_size():
    """OPT-30B's layers: 4.125 bits a weight with groups of 128, 16-bit embeddings."""
    geometry = GEOMETRIES["30b"]
    dense = account(geometry, H200, Workload(context=1, dense_weight_bits=4, sparse_weight_bits=4))
    kv_bytes = 2 * 2 * geometry.hidden_size * 2  # one token read, one written
    assert dense.dense_bytes == pytest.approx(12 * geometry.hidden_size**2 * 4.125 / 8 + kv_bytes)
    # At the paper's density nearly every group of fc2 holds a selected neuron.
    fc2 = account(geometry, H200, Workload(mlp_density=0.1, sparse_weight_bits=4)).parts["fc2"].sparse_bytes
    assert fc2 == pytest.approx(4 * geometry.hidden_size**2 * (0.1 * 0.5 + 2 / 128), rel=1e-3)


def test_what_quantization_and_sparsity_give_together():
    work = Workload(batch=1, context=256, mlp_density=0.08, head_density=0.3)
    pair = quantized(GEOMETRIES["66b"], H200, work)
    dense, dense4, sparse, sparse4 = pair.times_ms.values()
    assert dense == pytest.approx(account(GEOMETRIES["66b"], H200, work).dense_step_us / 1e3)
    assert sparse4 < min(dense4, sparse) < max(dense4, sparse) < dense
    assert (pair.small.workload.dense_weight_bits, pair.plain.workload.dense_weight_bits) == (4, 16)
    even = account(GEOMETRIES["66b"], H200, replace(work, mlp_density=pair.break_even_mlp_density))
    assert even.sparse_step_us / 1e3 == pytest.approx(dense4) and 0 < pair.break_even_mlp_density < 0.08
    assert dense4 < sparse, "what the break-even says: at 0.08 quantization alone is faster"


@pytest.mark.parametrize("bits", [5, 0, 32])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match="sparse_weight_bits"):
        Workload(sparse_weight_bits=bits)


def test_tensor_parallel_by_hand():
    """Weights, heads, neurons and cache halve; the predictor's down-projection does not; two all-reduces come
    on top.
    """
    one, two = account(TINY, SLOW, TINY_WORK), account(TINY, SLOW, replace(TINY_WORK, tp=2))
    for name in one.parts:
        if name != "predictor":
            assert parts(two)[name] == tuple(b / 2 for b in parts(one)[name]), name
    assert two.parts["predictor"].sparse_bytes == 2 * (8 + (32 + 2 * 8) / 2)
    # 2 rows x 8 x 2 bytes; a ring of two sends 2 x 1/2 of them at 1 GB/s.
    assert one.all_reduce_us == 0 and two.all_reduce_us == pytest.approx(2 * (5 + 0.032))
    assert two.dense_us == pytest.approx(one.dense_us - 0.896 + 2 * 5.032)
    with pytest.raises(ValueError, match="tp=3 does not divide"):
        account(TINY, SLOW, replace(TINY_WORK, tp=3))


def test_a_mesh_of_two_has_one_link():
    assert [DEVICES["mi300x"].group_gbs(tp) for tp in (2, 4, 8)] == [64, 192, 448]
    assert H200.group_gbs(2) == H200.group_gbs(8) == 450


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("tp", [1, 4])
def test_nothing_skipped_and_no_predictor_is_dense(name, tp):
    result = account(
        GEOMETRIES[name], H200, Workload(batch=8, mlp_density=1, head_density=1, predictor_rank=0, tp=tp)
    )
    assert all(part.dense_bytes == part.sparse_bytes for part in result.parts.values())
    assert (result.speedup, result.step_speedup) == pytest.approx((1, 1))


def test_ten_launches_each():
    assert (
        len(DENSE_LAUNCHES)
        == len(SPARSE_LAUNCHES)
        == Workload().dense_launches
        == Workload().sparse_launches
        == 10
    )


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("mlp_density", (0.01, 0.1, 0.5, 1.0)),
        ("head_density", (0.01, 0.1, 0.5, 0.99)),  # at 1 the head predictor goes
        ("survivors", (0.0, 0.3, 1.0)),
        ("predictor_rank", (0, 16, 1000)),
        ("predictor_dtype_bytes", (0.5, 1, 2)),
        ("sparse_launches", (5, 10, 16)),
        ("batch", (1, 8, 64)),
        ("context", (1, 256, 1920)),
    ],
)
def test_more_work_takes_the_sparse_layer_longer(field, values):
    times = [
        account(GEOMETRIES["6.7b"], H200, Workload(**{"batch": 4, field: value})).sparse_us
        for value in values
    ]
    assert times == sorted(set(times))


def test_union_only_matters_where_weights_are_shared():
    """One cache per sequence, one Q matrix for all: a wider union costs qkv and out_proj, not the KV read."""
    low, high = (
        account(GEOMETRIES["6.7b"], H200, Workload(batch=8, head_union_density=union)) for union in (0.5, 1.0)
    )
    grown = {name for name in low.parts if high.parts[name].sparse_bytes > low.parts[name].sparse_bytes}
    assert grown == {"qkv", "out_proj"}
    independent = Workload(batch=8, head_density=0.5).union_heads
    assert Workload(batch=1, head_density=0.5).union_heads == 0.5 < independent == 1 - 0.5**8
    everything = account(GEOMETRIES["6.7b"], H200, Workload(skip_projections=False))
    assert everything.parts["out_proj"].sparse_bytes == everything.parts["out_proj"].dense_bytes
    assert everything.parts["qkv"].sparse_bytes == everything.parts["qkv"].dense_bytes


@pytest.mark.parametrize("head_density", [1e-6, 0.1, 0.5, 1.0])
def test_k_and_v_are_always_paid(head_density):
    result = account(GEOMETRIES["30b"], H200, Workload(head_density=head_density))
    qkv, write = result.parts["qkv"], result.parts["KV write"]
    assert qkv.sparse_bytes >= 2 / 3 * qkv.dense_bytes and write.sparse_bytes == write.dense_bytes


def test_efficiency_slows_both_sides_alike():
    """The ratio of bytes stands; with launches that do not scale, the speed-up moves towards it."""
    for launch_us in (0, 3):
        full, half = (
            account(GEOMETRIES["6.7b"], replace(H200, efficiency=e, launch_us=launch_us), Workload())
            for e in (1, 0.5)
        )
        assert half.speedup == pytest.approx(full.speedup) if launch_us == 0 else half.speedup > full.speedup


@pytest.mark.parametrize("name", GEOMETRIES)
def test_predictor_stays_in_its_budget(name):
    geometry = GEOMETRIES[name]
    for width in (1, 2):
        rank = Workload(predictor_dtype_bytes=width).rank(geometry)
        share = (
            rank
            * (geometry.hidden_size + geometry.ffn_dim)
            * width
            / (2 * geometry.hidden_size * geometry.ffn_dim * 2)
        )
        assert 0.028 < share <= 0.03


# The design note: dense layers of 84 us (6.7B) and 290 us (30B), and a speed-up for 10, 13 and 16 sparse
# launches. It does not give its inputs beyond densities, 3 us and the predictor's 3%. What this model makes
# of it:
#   84 us is 12 * 4096^2 weights of 2 bytes at 4.8 TB/s, without launches. 290 us is not: 30B's weights read
#   in 257, and
#   come to 287 with ten launches of 3 us. The two figures seem to be of two kinds.
#   Speed-ups lie 1% below to 8% above the note's. At 3 us a launch these terms alone cannot give all six,
#   whatever the
#   bandwidth: the fall from 10 to 16 launches puts the note's dense layer at 147-156 us (6.7B) and 358-386 us
#   (30B),
#   while bytes and ten launches make 114 and 287. All six are met within 0.3% at 80% of the bandwidth with a
#   further 17 us (6.7B) and
#   25 us (30B) a layer on both sides. The note names no such term, so it is not built in; a measurement may
#   show it.
DESIGN_SPEEDUPS = [
    # geometry, launches, the note's, this model's
    ("6.7b", 10, 1.84, 1.954),
    ("6.7b", 13, 1.66, 1.692),
    ("6.7b", 16, 1.51, 1.493),
    ("30b", 10, 2.45, 2.633),
    ("30b", 13, 2.31, 2.432),
    ("30b", 16, 2.19, 2.260),
]


@pytest.mark.parametrize(("name", "launches", "note", "model"), DESIGN_SPEEDUPS)
def test_design_speedups(name, launches, note, model):
    result = account(GEOMETRIES[name], H200, replace(DESIGN[name], sparse_launches=launches))
    assert result.speedup == pytest.approx(model, abs=0.002)
    assert -0.02 < result.speedup / note - 1 < 0.08


def test_design_dense_layers():
    small, large = (account(GEOMETRIES[name], H200, work) for name, work in DESIGN.items())
    assert H200.read_us(small.dense_bytes) == pytest.approx(84, rel=0.01)
    assert H200.read_us(large.dense_bytes) == pytest.approx(257, rel=0.01)
    assert large.dense_us == pytest.approx(290, rel=0.015)


@pytest.mark.parametrize(("launches", "model"), [(10, 2.129), (13, 1.996), (16, 1.878)])
def test_projections_are_what_lifts_30b_over_two(launches, model):
    """The note: under 2x without skipping Q and out_proj. Here that holds from 13 launches; with 10 it is
    2.13x.
    """
    work = replace(DESIGN["30b"], sparse_launches=launches)
    result = account(GEOMETRIES["30b"], H200, replace(work, skip_projections=False))
    assert result.speedup == pytest.approx(model, abs=0.002)
    assert account(GEOMETRIES["30b"], H200, work).speedup > 1.18 * result.speedup


@pytest.mark.parametrize(
    ("name", "ceilings"),
    [("6.7b", (1.94, 1.56, 1.17)), ("30b", (2.23, 1.86, 1.34)), ("66b", (2.31, 2.00, 1.41))],
    ids=["6.7b", "30b", "66b"],
)
def test_byte_ceilings_worked_out_elsewhere(name, ceilings):
    """Our survey of peers, independent of this script: bytes of a step, MLP only, rank-1000 predictor, batch
    1, 8, 64.
    """
    for batch, ceiling in zip((1, 8, 64), ceilings, strict=True):
        work = Workload(
            batch=batch,
            context=1,
            mlp_density=preset_densities(name, batch)[0],
            head_density=1,
            predictor_rank=1000,
        )
        assert account(GEOMETRIES[name], replace(H200, launch_us=0), work).step_speedup == pytest.approx(
            ceiling, rel=0.015
        )


def test_presets_say_where_they_come_from():
    assert preset_densities("6.7b", 8) == (0.29, 0.5, "MLP Polar's table, heads assumed")
    assert [preset_densities("30b", batch)[0] for batch in (1, 8, 64)] == [0.08, 0.21, 0.53]
    assert preset_densities("13b", 8) == (0.29, 0.5, "assumed: 6.7b stands in")
    between, _, source = preset_densities("30b", 4)
    assert between == pytest.approx(0.08 + 2 / 3 * 0.13) and "interpolated" in source
    assert preset_densities("66b", 1000)[0] == 0.64 and "batch 256" in preset_densities("66b", 1000)[2]
    assert {name for name in GEOMETRIES if "stands in" in preset_densities(name, 1)[2]} == {
        "125m",
        "1.3b",
        "2.7b",
        "13b",
        "175b",
    }


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("125m", 125e6),
        ("1.3b", 1.3e9),
        ("2.7b", 2.7e9),
        ("6.7b", 6.7e9),
        ("13b", 13e9),
        ("30b", 30e9),
        ("66b", 66e9),
        ("175b", 175e9),
    ],
)
def test_geometries_have_the_parameters_of_their_name(name, parameters):
    assert num_weights(GEOMETRIES[name]) == pytest.approx(parameters, rel=0.03)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"mlp_density": 0}, "mlp_density"),
        ({"head_density": 1.5}, "head_density"),
        ({"batch": 0}, "batch"),
        ({"survivors": -0.1}, "survivors"),
        ({"sparse_launches": -1}, "sparse_launches"),
        ({"batch": 8, "head_density": 0.5, "head_union_density": 0.4}, "head_union_density"),
        ({"batch": 2, "head_density": 0.1, "head_union_density": 0.3}, "head_union_density"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_refuses(wrong, said):
    with pytest.raises(ValueError, match=said):
        Workload(**wrong)


def test_summary_is_one_line_and_says_model():
    line = account(GEOMETRIES["6.7b"], H200, Workload()).summary(full_name("6.7b"))
    assert (
        line.startswith("model: OPT-6.7B on H200")
        and "\n" not in line
        and "1.95x" in line
        and "launches" in line
    )


def test_queries_that_share_keys():
    """Fewer keys and values are projected, written and read; of the cache what any of a group selected."""
    plain = replace(TINY, num_heads=8, num_kv_heads=8, head_size=4)
    grouped = replace(plain, num_kv_heads=2)
    work = Workload(batch=1, context=10, head_density=0.5, mlp_density=1, predictor_rank=0)
    alone, shared = (account(g, H200, work).parts for g in (plain, grouped))
    queries, keys = 2 * TINY.hidden_size * 8 * 4, 2 * TINY.hidden_size * 2 * 4  # bytes
    assert shared["qkv"].dense_bytes == queries + 2 * keys
    assert shared["qkv"].sparse_bytes == 0.5 * queries + 2 * keys
    assert shared["out_proj"].dense_bytes == alone["out_proj"].dense_bytes == queries
    for name in ("KV read", "KV write"):
        assert shared[name].dense_bytes == alone[name].dense_bytes / 4
    assert alone["KV read"].sparse_bytes == 0.5 * alone["KV read"].dense_bytes
    assert shared["KV read"].sparse_bytes == (1 - 0.5**4) * shared["KV read"].dense_bytes
    assert linear_weights(plain) - linear_weights(grouped) == 2 * TINY.hidden_size * 6 * 4
