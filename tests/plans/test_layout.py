"""Every element of every parameter is held once, and every microbatch dealt once."""

from hypothesis import given
from hypothesis import strategies as st

from sheaf.plans.layout import Flat, Held, apportion, buckets, flats

held = st.lists(
    st.tuples(st.integers(1, 50), st.sampled_from(["float32", "float64"]), st.booleans()), min_size=1, max_size=12
).map(lambda rows: [Held(f"p{i}", size, dtype, trained) for i, (size, dtype, trained) in enumerate(rows)])


@given(held, st.lists(st.integers(0, 5), min_size=1, max_size=7).filter(any), st.booleans())
def test_pieces_of_all_workers_cover_every_parameter_once(parameters, weights, weighted):
    workers = len(weights)
    for flat in flats([("unit", parameters)], workers, tuple(weights) if weighted else ()):
        seen = {parameter.name: [] for parameter in flat.parameters}
        for worker in range(workers):
            offsets = []
            for piece in flat.pieces(worker):
                seen[piece.name] += range(piece.start, piece.stop)
                offsets += range(piece.offset, piece.offset + piece.num_elements)
                assert piece.offset + piece.num_elements <= flat.sizes[worker]
            assert len(offsets) == len(set(offsets))
        assert seen == {parameter.name: list(range(parameter.num_elements)) for parameter in flat.parameters}


@given(held, st.integers(1, 7))
def test_a_flat_is_of_one_kind_and_all_are_in_one(parameters, workers):
    made = flats([("unit", parameters)], workers)
    assert sorted(one.name for flat in made for one in flat.parameters) == sorted(one.name for one in parameters)
    assert all(len({(one.dtype, one.trained) for one in flat.parameters}) == 1 for flat in made)


@given(held, st.integers(1, 400))
def test_buckets_hold_the_trained_in_reverse_and_keep_to_their_size(parameters, bucket_bytes):
    sizes = {"float32": 4, "float64": 8}
    made = buckets(parameters, sizes, bucket_bytes)
    assert [one for bucket in made for one in bucket] == [one for one in reversed(parameters) if one.trained]
    for bucket in made:
        assert len({one.dtype for one in bucket}) == 1
        assert len(bucket) == 1 or sum(one.num_elements * sizes[one.dtype] for one in bucket) <= bucket_bytes


@given(st.integers(0, 500), st.lists(st.integers(0, 20), min_size=1, max_size=9).filter(any))
def test_shares_add_up_and_keep_to_their_weights(count, weights):
    shares = apportion(count, weights)
    assert sum(shares) == count
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - count * weight / sum(weights)) < 1


def test_padding_is_less_than_one_element_per_worker():
    flat = Flat("unit", (Held("a", 10, "float32"),), workers=4)
    assert (flat.sizes, flat.padded_elements, flat.num_elements) == ((3, 3, 3, 3), 12, 10)
