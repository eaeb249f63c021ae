"""Selection: hand-worked cases, ties, bounds, rounding, retain modes."""

import pytest
import torch

from prunesearch.methods.select import (
    SELECTION_RULES,
    num_kept,
    select_cumulative,
    select_global,
    select_ratio,
    select_retain,
)

SCORES = torch.tensor([1.0, 8.0, 0.0, 4.0, 3.0])  # ranking 1, 3, 4, 0, 2; total 16


@pytest.mark.parametrize(
    ("channels", "keep", "round_to", "expected"),
    [
        (10, 0.35, 1, 4),
        (10, 0.7, 1, 7),
        (100, 0.07, 1, 7),  # 0.07 * 100 > 7 in binary
        (100, 0.29, 1, 29),
        (10, 1e-6, 1, 1),
        (1, 0.1, 1, 1),
        (16, 0.5, 8, 8),
        (16, 0.75, 8, 16),  # 12 is half way: up
        (16, 0.68, 8, 8),  # 11 is nearer to 8
        (16, 0.01, 8, 8),
        (4, 0.25, 8, 4),  # fewer channels than the multiple: all
        (17, 1.0, 8, 17),  # all stay all
        (17, 0.9, 8, 16),
        (20, 0.95, 8, 16),
        (23, 0.95, 8, 23),  # 22 is nearest to 24, of which there are 23
    ],
)
def test_num_kept_by_hand(channels, keep, round_to, expected):
    assert num_kept(channels, keep, round_to=round_to) == expected


@pytest.mark.parametrize("round_to", [1, 2, 4, 8, 16])
def test_num_kept_never_falls_and_is_a_multiple(round_to):
    for channels in (1, 3, 8, 16, 20, 23, 64):
        counts = [num_kept(channels, i / 200, round_to=round_to) for i in range(1, 201)]
        assert counts == sorted(counts)
        assert counts[0] == min(round_to, channels) and counts[-1] == channels
        assert all(count % round_to == 0 or count == channels for count in counts)


@pytest.mark.parametrize(
    ("keep", "expected"), [(0.2, [1]), (0.21, [1, 3]), (0.6, [1, 3, 4]), (1.0, [0, 1, 2, 3, 4])]
)
def test_ratio_by_hand(keep, expected):
    kept = select_ratio(SCORES, keep)
    assert kept.tolist() == expected and kept.dtype == torch.int64


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (0.01, [1]),
        (0.5, [1]),  # 8 of 16: exactly reached
        (0.51, [1, 3]),
        (0.75, [1, 3]),
        (0.9375, [1, 3, 4]),
        (0.94, [0, 1, 3, 4]),
        (1.0, [0, 1, 3, 4]),  # the channel of score zero adds nothing
    ],
)
def test_cumulative_by_hand(k, expected):
    kept = select_cumulative(SCORES, k)
    assert kept.tolist() == expected and kept.dtype == torch.int64


def test_cumulative_is_exact_where_binary_fractions_are_not():
    for channels in range(1, 65):
        for kept in range(1, channels + 1):
            assert len(select_cumulative(torch.full((channels,), 0.1), kept / channels)) == kept


def test_equal_scores_keep_the_lower_indices():
    scores = torch.tensor([2.0, 5.0, 2.0, 5.0, 2.0, 2.0])
    assert select_ratio(scores, 0.5).tolist() == [0, 1, 3]
    assert select_cumulative(scores, 0.7).tolist() == [0, 1, 2, 3]
    assert select_ratio(torch.ones(64), 0.25).tolist() == list(range(16))


@pytest.mark.parametrize("k", [0.1, 0.4, 1.0])
def test_all_zero_scores_fall_back_to_the_ratio(k):
    scores = torch.zeros(10)
    assert torch.equal(select_cumulative(scores, k), select_ratio(scores, k))


def test_tiny_and_huge_scores_have_the_same_shares():
    for scale in (2.0**-120, 2.0**120):
        assert select_cumulative(SCORES * scale, 0.75).tolist() == [1, 3]


@pytest.mark.parametrize("rule", SELECTION_RULES)
def test_rules_keep_more_as_the_fraction_grows(rule):
    scores = torch.rand(23, generator=torch.Generator().manual_seed(0))
    for round_to in (1, 4, 8):
        kept: set[int] = set()
        for i in range(1, 101):
            indices = SELECTION_RULES[rule](scores, i / 100, round_to=round_to)
            assert torch.equal(indices, indices.unique()), "sorted, no index twice"
            assert kept <= set(indices.tolist()), "what was kept stays kept"
            assert len(indices) >= min(round_to, 23)
            kept = set(indices.tolist())
        assert len(kept) == 23


@pytest.mark.parametrize("rule", SELECTION_RULES)
@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan")])
def test_a_fraction_out_of_range_is_an_error(rule, fraction):
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
        SELECTION_RULES[rule](SCORES, fraction)


@pytest.mark.parametrize("rule", SELECTION_RULES)
def test_unusable_scores_are_an_error(rule):
    select = SELECTION_RULES[rule]
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`scores` .* must be finite"):
            select(torch.tensor([1.0, value]), 0.5)
    for scores in (torch.zeros(0), torch.zeros(2, 2), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="must be one number a channel"):
            select(scores, 0.5)
    with pytest.raises(ValueError, match=r"`round_to` \(=0\)"):
        select(SCORES, 0.5, round_to=0)


def test_cumulative_refuses_negative_scores():
    with pytest.raises(ValueError, match="must not be negative"):
        select_cumulative(torch.tensor([2.0, -1.0]), 0.5)


def test_retain_modes():
    scores = torch.arange(20.0)  # best 19, worst 0
    better, worse = set(range(10, 20)), set(range(10))

    def retain(mode, seed=0, **options):
        return select_retain(scores, mode, torch.Generator().manual_seed(seed), **options).tolist()

    assert retain("peak30") == [14, 15, 16, 17, 18, 19]
    for mode, pool in (
        ("peak50_rand30", better),
        ("bot50_rand30", worse),
        ("rand30", better | worse),
    ):
        kept = retain(mode)
        assert len(set(kept)) == 6 and kept == sorted(kept)
        assert kept == retain(mode) and len({tuple(retain(mode, s)) for s in range(5)}) > 1
        drawn = {index for seed in range(60) for index in retain(mode, seed)}
        assert drawn == pool, "every channel of the pool, and no other, can be drawn"
    with pytest.raises(ValueError, match="`retain` .* must be a known name: there are peak30"):
        retain("peak")


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("mode", ["peak30", "peak50_rand30", "bot50_rand30", "rand30"])
def test_retain_keeps_a_channel_of_very_narrow_layers(mode, channels):
    assert len(select_retain(torch.ones(channels), mode, torch.Generator())) >= 1


@pytest.mark.parametrize("mode", ["peak30", "peak50_rand30", "bot50_rand30", "rand30"])
def test_retain_modes_keep_alike_many_when_widths_are_rounded(mode):
    for channels, width in ((8, 8), (32, 8)):
        kept = select_retain(torch.rand(channels), mode, torch.Generator(), round_to=8)
        assert len(set(kept.tolist())) == width


# --- all groups together ---------------------------------------------------------------------


def test_global_ranks_all_channels_together_and_keeps_one_a_group():
    scores = {
        "a": torch.tensor([5.0, 1.0, 4.0, 3.0]),
        "b": torch.tensor([0.1, 0.3, 0.2]),
        "c": torch.tensor([9.0, 8.0, 0.5]),
    }
    kept = select_global(scores, 0.5, normalize=False)  # 5 of 10 channels
    assert {name: indices.tolist() for name, indices in kept.items()} == {
        "a": [0, 2, 3],
        "b": [1],  # none of the best five: its best channel stays
        "c": [0, 1],
    }


def test_global_divides_by_the_mean_of_a_group_where_layers_cannot_be_compared():
    scores = {"small": torch.tensor([0.1, 0.9]), "large": torch.tensor([100.0, 120.0])}
    raw = select_global(scores, 0.5, normalize=False)
    assert (raw["small"].tolist(), raw["large"].tolist()) == ([1], [0, 1])  # one a group stays
    scaled = select_global(scores, 0.5)  # 0.2, 1.8, 0.91, 1.09
    assert (scaled["small"].tolist(), scaled["large"].tolist()) == ([1], [1])


def test_global_breaks_ties_by_group_and_index_and_rounds_each_width():
    scores = {"a": torch.ones(6), "b": torch.ones(6)}
    kept = select_global(scores, 0.75)
    assert (kept["a"].tolist(), kept["b"].tolist()) == ([0, 1, 2, 3, 4, 5], [0, 1, 2])
    kept = select_global(scores, 0.75, round_to=4)
    assert (len(kept["a"]), len(kept["b"])) == (6, 4)
    assert select_global({"a": torch.zeros(3)}, 1.0)["a"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="must be finite"):
        select_global({"a": torch.tensor([1.0, float("nan")])}, 0.5)
