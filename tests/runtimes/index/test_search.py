"""What an index finds, against a plain scan in numpy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgelm.errors import BinaryIndexError, InputError
from edgelm.runtimes.codes import asymmetric_scores
from edgelm.runtimes.index import BinaryIndex, EncoderInfo, scan
from edgelm.runtimes.index.keys import KeyMap
from edgelm.runtimes.rescoring import pack_vectors, rescore

Codes = NDArray[np.uint8]


def random_codes(n: int, bits: int, seed: int = 0) -> Codes:
    return np.random.default_rng(seed).integers(0, 256, (n, bits // 8), np.uint8)


def clustered_codes(n: int, bits: int, clusters: int, seed: int = 0) -> Codes:
    random = np.random.default_rng(seed)
    centres = random.integers(0, 2, (clusters, bits), np.uint8)
    flips = random.random((n, bits)) < 0.05
    return np.packbits(centres[random.integers(0, clusters, n)] ^ flips, axis=1)


def reference(queries: Codes, codes: Codes, k: int) -> tuple[Any, Any]:
    """Sorted by distance, then row, one bit at a time."""
    bits = np.unpackbits(queries, axis=1)[:, None] != np.unpackbits(codes, axis=1)
    distances = bits.sum(axis=2)
    rows = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, rows, 1), rows


def filled(path: Path, codes: Codes, **options: Any) -> BinaryIndex:
    index = BinaryIndex.create(path, codes.shape[1] * 8, **options)
    index.add([f"d{i}" for i in range(len(codes))], codes)
    return index


KERNELS = [scan._faiss_nearest, scan._numpy_nearest]


@pytest.mark.parametrize("kernel", KERNELS, ids=["faiss", "numpy"])
@pytest.mark.parametrize(
    ("n", "bits", "k"),
    [(1, 8, 1), (17, 40, 5), (300, 256, 300), (40_000, 64, 10), (70_000, 32, 3)],
)
def test_the_kernels_find_the_nearest(kernel: Any, n: int, bits: int, k: int) -> None:
    codes, queries = random_codes(n, bits), random_codes(3, bits, seed=1)
    distances, rows = scan.in_order(*kernel(queries, codes, k), k)
    expected, expected_rows = reference(queries, codes, k)
    assert (distances == expected).all()
    assert (rows == expected_rows).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads: int) -> None:
    codes = np.repeat(random_codes(500, 64), 300, axis=0)  # ties everywhere
    queries = codes[[0, -1, 77_777]]
    distances, rows = scan.nearest(queries, codes, 400, threads)
    expected, _ = scan.nearest(queries, codes, 400, 1)
    assert (distances == expected).all()
    assert (rows[0, :300] == np.arange(300)).all()


def test_faiss_keeps_the_threads_that_the_user_set() -> None:
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(2)
    scan.nearest(random_codes(1, 64), random_codes(100, 64), 3, 1)
    assert faiss.omp_get_max_threads() == 2
    faiss.omp_set_num_threads(before)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 9)),
        st.tuples(st.just("replace"), st.integers(1, 9)),
        st.tuples(st.just("delete"), st.integers(1, 20)),
        st.tuples(st.just("compact"), st.sampled_from(["always", "never"])),
    ),
    max_size=8,
)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(operations=OPERATIONS, seed=st.integers(0, 99))
def test_any_history_leaves_what_a_dictionary_would_hold(
    in_memory: Path, operations: list[Any], seed: int
) -> None:
    random = np.random.default_rng(seed)
    path = in_memory / "index"
    index = BinaryIndex.create(path, 16, vectors="int8", dimension=3, force=True)
    held: dict[str, tuple[Codes, str, Any]] = {}
    names = (f"n{i}" for i in range(1000))
    for what, how in operations:
        if what == "compact":
            index.compact(how)
            continue
        some = list(random.permutation(sorted(held))[: how if what != "add" else 0])
        if what == "delete":
            index.delete(some)
            for name in some:
                del held[name]
            continue
        ids = [str(name) for name in some] + [next(names) for _ in range(how)]
        codes = random.integers(0, 256, (len(ids), 2), np.uint8)
        vectors = random.standard_normal((len(ids), 3)).astype(np.float32)
        texts = [f"text of {name} ü" for name in ids]
        index.add(ids, codes, texts=texts, vectors=vectors, replace=what == "replace")
        for name, code, text, vector in zip(ids, codes, texts, vectors, strict=True):
            held.pop(name, None)  # a replaced row is the newest
            held[name] = (code, text, vector)
    for opened in (index, BinaryIndex(path)):
        assert len(opened) == len(held)
        opened.verify()
        query = random.integers(0, 256, (2, 2), np.uint8)
        found = opened.search(query, 7, exact=True)
        if not held:
            assert found == [[], []]
            continue
        ids, rows = list(held), np.stack([code for code, _, _ in held.values()])
        distances, nearest = reference(query, rows, 7)
        assert [[h.id for h in hits] for hits in found] == [
            [ids[i] for i in line] for line in nearest
        ]
        assert [[16 - h.score for h in hits] for hits in found] == distances.tolist()
        assert all(h.text == held[h.id][1] for hits in found for h in hits)
        vector = random.standard_normal((2, 3)).astype(np.float32)
        best = opened.search(query, 1, vectors=vector, oversample=1000, exact=True)
        exact = np.stack([v for _, _, v in held.values()]) @ vector.T
        for i, hits in enumerate(best):
            scale = float(np.abs(exact).max()) + 1
            assert hits[0].score == pytest.approx(
                float(exact[:, i].max()), abs=0.05 * scale
            )


def test_deleted_rows_never_hide_living_ones(tmp_path: Path) -> None:
    """All but one of the 3,000 nearest are deleted, in one batch and in many."""
    codes = np.zeros((3001, 4), np.uint8)
    codes[3000] = 255
    index = filled(tmp_path / "index", codes)
    index.delete([f"d{i}" for i in range(2999)])
    found = index.search(np.zeros((1, 4), np.uint8), 5)
    assert [hit.id for hit in found[0]] == ["d2999", "d3000"]


def test_a_float_query_is_compared_with_signs(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    codes = random_codes(500, 64)
    query = random.standard_normal((1, 64)).astype(np.float32)
    expected = (np.unpackbits(codes, axis=1) * 2.0 - 1) @ query[0]
    assert asymmetric_scores(query, codes)[0] == pytest.approx(expected, abs=1e-4)
    index = filled(tmp_path / "index", codes)
    rows, scores = index.search_rows(query, 10, candidates=50)
    assert rows[0].tolist() == np.argsort(-expected, kind="stable")[:10].tolist()
    assert scores[0] == pytest.approx(np.sort(expected)[::-1][:10], abs=1e-4)
    farthest = np.packbits(query < 0, axis=1)
    rows, _ = index.search_rows(query, 10, shortlist=farthest, candidates=1)
    distances, _ = reference(farthest, codes, 10)
    assert (reference(farthest, codes[rows[0]], 10)[0] == distances).all()


def test_factors_multiply_the_asymmetric_score(tmp_path: Path) -> None:
    codes = random_codes(100, 64)
    factors = np.linspace(0.5, 2, 100).astype(np.float16)
    query = np.random.default_rng(1).standard_normal((1, 64)).astype(np.float32)
    index = BinaryIndex.create(tmp_path / "index", 64, factors=True)
    index.add([str(i) for i in range(100)], codes, factors=factors)
    index.delete(["0"])
    index.compact()
    rows, _ = index.search_rows(query, 5, candidates=100)
    signs = (np.unpackbits(codes, axis=1) * 2.0 - 1) @ query[0] * factors
    assert rows[0].tolist() == np.argsort(-signs[1:])[:5].tolist()


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.02), ("float16", 2e-3)])
def test_stored_vectors_keep_dot_products(kind: Any, bound: float) -> None:
    random = np.random.default_rng(0)
    vectors = random.standard_normal((50, 33)).astype(np.float32)
    vectors[3] = 0
    query = random.standard_normal(33).astype(np.float32)
    scores = rescore(query, pack_vectors(vectors, kind), np.arange(len(vectors)))
    error = np.abs(scores - vectors @ query)
    assert scores[3] == 0
    assert error.max() < bound * np.linalg.norm(query) * np.sqrt(33)


def test_lists_find_what_a_scan_finds(tmp_path: Path) -> None:
    codes = clustered_codes(20_000, 64, 100)
    index = filled(tmp_path / "index", codes)
    index.compact("always")
    about = index.manifest.approximate
    assert about is not None
    assert about.recall >= 0.99
    assert about.probes < about.lists
    late = clustered_codes(500, 64, 100, seed=5)
    index.add([f"late{i}" for i in range(500)], late)
    index.delete([f"d{i}" for i in range(0, 20_000, 3)])
    queries = np.concatenate([codes[:40], late[:40]])
    exact, _ = index.search_rows(queries, 10, exact=True)
    _, exact_scores = index.search_rows(queries, 10, exact=True)
    rows, scores = index.search_rows(queries, 10)
    assert (scores >= exact_scores[:, -1:]).mean() >= 0.97
    assert not index._snapshot.is_deleted(rows).any()
    assert set(exact[:, 0]) - set(range(20_000))  # rows behind the lists are found


def test_random_codes_get_no_lists(tmp_path: Path) -> None:
    """They have no neighbourhoods: lists would lose rows and gain nothing."""
    index = filled(tmp_path / "index", random_codes(20_000, 64))
    index.compact("always")
    assert index.manifest.approximate is None
    assert not list((tmp_path / "index").glob("*.new"))


def test_lists_are_given_up_while_another_process_compacts(tmp_path: Path) -> None:
    codes = clustered_codes(20_000, 64, 100)
    index = filled(tmp_path / "index", codes)
    index.compact("always")
    old, new = BinaryIndex(tmp_path / "index"), BinaryIndex(tmp_path / "index")
    new.delete(["d0"])
    new.compact("never")
    query = codes[:1]
    assert old.search(query, 3)[0][0].id == "d0"
    old.refresh()
    assert old.search(query, 3)[0][0].id != "d0"


def test_fewer_rows_than_the_lists_are_asked_for(tmp_path: Path) -> None:
    index = filled(tmp_path / "index", clustered_codes(5000, 64, 50))
    index.compact("always")
    rows, _ = index.search_rows(random_codes(2, 64), 5000)
    assert [len(set(line)) for line in rows] == [5000, 5000]


def test_two_ids_with_one_key_are_two_rows() -> None:
    keys = KeyMap(np.array([7, 7, 3], np.uint64), np.array([0, 1, 2]))
    keys.add(np.array([7], np.uint64), np.array([3]))
    assert sorted(keys.find(np.array([7], np.uint64))) == [(0, 0), (0, 1), (0, 3)]
    keys.remove(np.array([7], np.uint64), np.array([1]))
    assert sorted(keys.find(np.array([3, 7], np.uint64))) == [(0, 2), (1, 0), (1, 3)]


CODE = random_codes(2, 64)
VECTOR = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("ids", "arguments", "sentence"),
    [
        (["a", "b"], {"codes": random_codes(2, 128)}, "codes of 64 bits. Got codes of"),
        (["a", "b"], {"codes": CODE.astype(np.int8)}, "Codes are uint8"),
        (["a", "b"], {"codes": CODE[0]}, "2 ids but codes of shape"),
        (["a"], {"codes": CODE}, "1 ids but codes of shape"),
        (["a", "a"], {"codes": CODE}, "'a' is given twice"),
        (["a", "known"], {"codes": CODE}, "holds the id 'known' already"),
        (["a", ""], {"codes": CODE}, "An id is a string"),
        (["a", 1], {"codes": CODE}, "An id is a string"),
        (["a", "\ud800"], {"codes": CODE}, "not valid Unicode"),
        (["a", "b"], {"codes": CODE, "texts": ["x"]}, "2 ids but 1 texts"),
        (["a", "b"], {"codes": CODE, "texts": ["x", "\ud800"]}, "The text of 'b'"),
        (["a", "b"], {"codes": CODE, "vectors": None}, "needs vectors"),
        (["a", "b"], {"codes": CODE, "vectors": VECTOR[:, :2]}, "float32 [n, 3]"),
        (["a", "b"], {"codes": CODE, "vectors": VECTOR * np.nan}, "not finite"),
    ],
)
def test_what_does_not_fit_is_refused_whole(
    tmp_path: Path, ids: Any, arguments: Any, sentence: str
) -> None:
    index = BinaryIndex.create(tmp_path / "i", 64, vectors="int8", dimension=3)
    index.add(["known"], CODE[:1], vectors=VECTOR[:1])
    before = index.manifest
    with pytest.raises(InputError) as caught:
        index.add(ids, **{"vectors": VECTOR, **arguments})
    assert sentence in str(caught.value)
    assert BinaryIndex(tmp_path / "i").manifest == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"queries": random_codes(1, 128)}, "codes of 64 bits"),
        ({"queries": CODE, "k": 0}, "'k' of a search must be at least 1"),
        ({"queries": np.ones((1, 63), np.float32)}, "float32 [n, 64]"),
        ({"queries": np.full((1, 64), np.inf, np.float32)}, "not finite"),
        ({"queries": CODE, "vectors": VECTOR}, "stores no vectors"),
    ],
)
def test_queries_that_do_not_fit_are_refused(
    tmp_path: Path, arguments: Any, sentence: str
) -> None:
    index = filled(tmp_path / "index", random_codes(3, 64))
    with pytest.raises(InputError) as caught:
        index.search(**arguments)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("bits", [0, 7, 100, 8200])
def test_widths_that_no_byte_holds_are_refused(tmp_path: Path, bits: int) -> None:
    with pytest.raises(InputError, match="multiple of 8"):
        BinaryIndex.create(tmp_path / "index", bits)


def test_ids_that_are_not_there_are_not_deleted(tmp_path: Path) -> None:
    index = filled(tmp_path / "index", random_codes(3, 64))
    with pytest.raises(InputError, match="holds no id 'x'; nothing was deleted"):
        index.delete(["d0", "x"])
    assert len(BinaryIndex(tmp_path / "index")) == 3


def test_another_encoder_is_refused(tmp_path: Path) -> None:
    ours, other = EncoderInfo("minilm", "a" * 64), EncoderInfo("other", "b" * 64)
    index = BinaryIndex.create(tmp_path / "index", 64, encoder=ours)
    index.check_encoder(EncoderInfo("a copy", "a" * 64))
    with pytest.raises(BinaryIndexError, match=r"made by minilm .* not by other"):
        index.check_encoder(other)
    unknown = BinaryIndex.create(tmp_path / "unknown", 64)
    with pytest.raises(BinaryIndexError, match="does not say which encoder"):
        unknown.check_encoder(ours)


def test_opening_reads_nothing_and_a_search_copies_nothing(tmp_path: Path) -> None:
    """32 MiB of codes, in a process that counts its own memory."""
    index = BinaryIndex.create(tmp_path / "index", 1024)
    n = 1 << 18
    index.add([str(i) for i in range(n)], random_codes(n, 1024))
    script = """
import sys, numpy as np, faiss
from edgelm.runtimes.codes import asymmetric_scores
from edgelm.runtimes.index import BinaryIndex
def memory(what):
    for line in open("/proc/self/status"):
        if line.startswith(what): return int(line.split()[1]) / 1024
file = memory("RssFile")
index = BinaryIndex(sys.argv[1])
opened, own = memory("RssFile") - file, memory("RssAnon")
index.search(np.zeros((1, 128), np.uint8), 10, threads=1)
print(opened, memory("RssFile") - file, memory("RssAnon") - own)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "index")],
        capture_output=True,
        text=True,
        check=True,
    )
    opened, mapped, copied = map(float, done.stdout.split())
    assert opened < 1
    assert mapped > 30  # all codes were scanned, where they lie
    assert copied < 8
