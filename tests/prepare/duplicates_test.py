"""Signatures and groups of near duplicates, against sets of shingles that are counted one by one."""

import hashlib
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from etils import epath
from fake_bucket import FakeBucket

from codellm_jax.mixture.ngrams import words
from codellm_jax.prepare import duplicates, joining, keys, meeting, ranged
from codellm_jax.prepare.job import BAND, EDGE
from codellm_jax.prepare.prepare import Preparation, prepare
from tasks.corpora.inputs import Inputs

COUNT = 112


def exact(one: str, other: str, n: int) -> float:
    """The Jaccard similarity of two texts' n-grams of words."""
    first, second = ({tuple(found[at : at + n]) for at in range(max(1, len(found) - n + 1))}
                     for found in (words(one), words(other)))
    return len(first & second) / len(first | second)


def signature(text: str) -> np.ndarray:
    return duplicates.signature(duplicates.shingles(text, 5), COUNT)


def changed(text: list[str], share: float, dice: random.Random) -> list[str]:
    return [word if dice.random() >= share else f"new{dice.randrange(10**6)}" for word in text]


def test_normalised_texts():
    assert duplicates.normalised("Ａ  b\n\tC ") == "a b c"
    assert duplicates.text_hash("One  TWO\n") == duplicates.text_hash("one two")
    assert duplicates.text_hash("one two") != duplicates.text_hash("onetwo")


def test_shingles_are_those_of_words_and_of_chinese_characters():
    assert len(duplicates.shingles("a b c d e f", 5)) == 2
    assert len(duplicates.shingles("人工智能改变世界", 5)) == 4
    assert len(duplicates.shingles("a b", 5)) == 1
    assert not len(duplicates.shingles("... !", 5))
    assert np.array_equal(duplicates.shingles("A, b; c d e", 5), duplicates.shingles("a b c d e", 5))
    a, b = duplicates.shingles("a b c d e a b c d e", 5)[[0, 5]]
    assert a == b
    assert len(set(duplicates.shingles("a b c d e d c b a", 5).tolist())) == 5  # their order counts


def test_what_signatures_estimate():
    dice = random.Random(0)
    texts = [[f"w{dice.randrange(5000)}" for _ in range(300)] for _ in range(120)]
    deviations = []
    for text in texts:
        other = changed(text, dice.random() * 0.1, dice)
        truth = exact(" ".join(text), " ".join(other), 5)
        found = (signature(" ".join(text)) == signature(" ".join(other))).mean()
        deviations.append((found - truth) / max(np.sqrt(truth * (1 - truth) / COUNT), 1e-3))
    assert abs(np.mean(deviations)) < 0.3 and 0.7 < np.std(deviations) < 1.3


def test_long_texts_are_hashed_in_blocks():
    dice = random.Random(1)
    hashes = duplicates.shingles(" ".join(f"w{dice.randrange(9**9)}" for _ in range(5000)), 5)
    whole = duplicates.signature(hashes, COUNT)
    parts = [duplicates.signature(hashes[at : at + 1000], COUNT) for at in range(0, len(hashes), 1000)]
    assert np.array_equal(whole, np.min(parts, axis=0))


def test_bands_differ_by_their_number():
    keys = duplicates.band_keys(np.zeros((1, 8), np.uint32), 4, 2)
    assert len(set(keys.ravel().tolist())) == 4
    one, other = np.arange(8, dtype=np.uint32), np.arange(8, dtype=np.uint32)
    other[5] = 99
    same = duplicates.band_keys(np.stack([one, other]), 4, 2)
    assert (same[0] == same[1]).tolist() == [True, True, False, True]


def test_how_often_pairs_meet_in_a_band():
    """1 - (1 - s^8)^14, of signatures of random numbers that agree with the chance s in each."""
    dice = np.random.default_rng(0)
    for similarity in (0.6, 0.75, 0.9):
        first = dice.integers(0, 1 << 32, (4000, COUNT), np.uint32)
        second = np.where(dice.random(first.shape) < similarity, first, first + np.uint32(1))
        met = (duplicates.band_keys(first, 14, 8) == duplicates.band_keys(second, 14, 8)).any(axis=1).mean()
        assert met == pytest.approx(1 - (1 - similarity**8) ** 14, abs=0.03)


def test_pairs_join_what_is_similar():
    base = np.zeros(10, np.uint32)
    close, far = base.copy(), np.arange(10, dtype=np.uint32) + 5
    close[:2] = 7
    signatures, asked = np.stack([base, far, close, far]), []
    exact = {(0, 2): 0.75, (1, 3): 1.0}

    def similarity(first: int, second: int) -> float:
        asked.append((first, second))
        return exact[first, second]

    assert duplicates.similar_pairs(signatures, 0.7, similarity) == [(0, 2, 0.75), (1, 3, 1.0)]
    assert asked == [(0, 2), (1, 3)]  # of others the signatures say enough
    assert duplicates.similar_pairs(signatures, 0.76, similarity) == [(1, 3, 1.0)]
    assert len(duplicates.similar_pairs(signatures[:3], 0, similarity)) == 2
    copies = np.zeros((1000, 10), np.uint32)
    assert len(duplicates.similar_pairs(copies, 0.7, lambda first, second: 1.0)) == 999
    # A chain: each is similar to the next one alone.
    assert len(duplicates.similar_pairs(copies[:5], 0.7, lambda one, other: 1.0 * (other - one == 1))) == 4


def test_jaccard_similarity_of_sets():
    assert duplicates.jaccard(np.array([1, 2, 3, 4]), np.array([2, 3, 4, 9, 10])) == 3 / 6


def test_groups_of_a_bucket():
    """Of keys that several documents have: who has them, by document; groups of the same documents have equal sets."""
    pairs = [(9, 4), (9, 7), (9, 7), (2, 5), (3, 7), (3, 4), (1, 5), (1, 4), (1, 7), (8, 1), (8, 1)]
    met = meeting.groups(np.array(pairs, BAND))
    assert [(row["document"], row["group"]) for row in met] == [(4, 0), (4, 1), (4, 2), (5, 0), (7, 0), (7, 1), (7, 2)]
    assert len({int(row["set"]) for row in met if row["group"] in (1, 2)}) == 1
    assert len(set(met["set"].tolist())) == 2
    assert not len(meeting.groups(np.zeros(0, BAND)))


def test_components():
    numbers, label = duplicates.components(np.array([9, 3, 7], np.uint64), np.array([3, 5, 8], np.uint64))
    assert numbers.tolist() == [3, 5, 7, 8, 9]
    assert label[0] == label[1] == label[4] != label[2] == label[3]


def random_edges(dice: np.random.Generator, documents: int, count: int) -> np.ndarray:
    """Pairs of different documents, each with a length of few values and a rank."""
    size, rank = dice.integers(5, 9, documents), dice.integers(0, 3, documents)
    ends = dice.integers(0, documents, (2, count))
    ends = ends[:, ends[0] != ends[1]]
    edges = np.zeros(ends.shape[1], EDGE)
    for side, name in zip(ends, ("first", "second"), strict=True):
        edges[name], edges[f"{name}_bytes"], edges[f"{name}_rank"] = side, size[side], rank[side]
    edges["similarity"] = dice.random(len(edges))
    return edges


def joined_in_rounds(edges: np.ndarray, buckets: int) -> np.ndarray:
    """As workers do it, each with the documents of its bucket alone."""
    first = now = joining.both_ways(edges)
    number = quiet = 0
    while quiet < 2:
        number += 1
        found = [joining.star(now[now["first"] % buckets == bucket], number % 2 == 1) for bucket in range(buckets)]
        now = joining.both_ways(np.concatenate([edges for edges, _ in found]))
        quiet = 0 if any(changed for _, changed in found) else quiet + 1
    return np.concatenate([joining.dropped_by_stars(
        now[now["first"] % buckets == bucket], first[first["first"] % buckets == bucket]) for bucket in range(buckets)])


def test_pairs_joined_in_rounds_are_those_joined_at_once():
    dice = np.random.default_rng(3)
    for documents, count in ((1000, 400), (1000, 900), (300, 2000), (5, 30)):
        edges = random_edges(dice, documents, count)
        for buckets in (1, 7):
            assert np.array_equal(np.sort(joined_in_rounds(edges, buckets)), np.sort(joining.joined(edges)))
    chain = np.resize(np.zeros(1, EDGE), 1999)
    chain["first"], chain["second"] = np.arange(1999), np.arange(1, 2000)
    assert np.array_equal(np.sort(joined_in_rounds(chain, 4)), np.sort(joining.joined(chain)))
    assert not len(joining.joined(chain[:0])) and not len(joined_in_rounds(chain[:0], 2))


@pytest.mark.parametrize(("similarity", "bands", "shares"), [
    (0.85, 14, (0.002, 0.035)), pytest.param(0.8, 24, (0.002, 0.05), marks=pytest.mark.slow),
    pytest.param(0, 14, (0.01, 0.02), marks=pytest.mark.slow)])
def test_planted_near_duplicates_are_found(tmp_path: Path, similarity: float, bands: int, shares: tuple[float, float]):
    """Of pairs from the stated similarity on 98%, above all of those just above it, and no pair below it."""
    dice = random.Random(11)
    bases = [[f"w{dice.randrange(20_000)}" for _ in range(dice.randrange(100, 300))] for _ in range(800)]
    pairs = [(" ".join(base), " ".join(changed(base, dice.uniform(*shares), dice))) for base in bases]
    similar = [exact(one, other, 5) for one, other in pairs]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for pair in pairs for text in pair))
    inputs = Inputs({"text.a": {"json_lines": str(tmp_path / "a.jsonl")}})
    step = {"name": "near_duplicates", "similarity": similarity, "bands": bands}
    prepare(Preparation(inputs, [step], str(tmp_path / "out")), 1, report=lambda line: None)
    removed = pq.read_table(tmp_path / "out" / "removed" / "stage1-00000.parquet").to_pylist()
    gone = {(row["row"] - 1) // 2 for row in removed}
    above = [number for number, value in enumerate(similar) if value >= (similarity or 0.85)]
    assert len(above) > 300
    assert sum(number in gone for number in above) / len(above) >= 0.98
    if similarity:
        assert 0 < len(gone) <= len(above) and gone <= set(above)
        assert all(row["similarity"] == pytest.approx(similar[(row["row"] - 1) // 2], abs=1e-4) for row in removed)


def test_texts_without_words_lie_between(tmp_path: Path, monkeypatch):
    """Such texts have no shingles; pairs on either side of them, and of chunks of nothing else, are found."""
    monkeypatch.setattr(keys, "DOCUMENTS_AT_ONCE", 3)
    monkeypatch.setattr(keys, "BYTES_A_FILE", 16 * 14 * 3)
    dice = random.Random(5)
    own = [" ".join(f"w{dice.randrange(9**9)}" for _ in range(60)) for _ in range(4)]
    texts = ["...", own[0], "!", "?", "; ;", ". .", ", ,", "- -", own[1], own[0] + " more", "* *", own[2], own[3],
             own[1] + " more"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    inputs = Inputs({"text.a": {"json_lines": str(tmp_path / "a.jsonl")}})
    prepare(Preparation(inputs, ["near_duplicates"], str(tmp_path / "out")), 1, report=lambda line: None)
    removed = pq.read_table(tmp_path / "out" / "removed" / "stage1-00000.parquet").to_pylist()
    assert [row["row"] for row in removed] == [2, 9]  # the longer of each pair stays


def clusters(count: int, copies: int, dice: random.Random) -> list[str]:
    """Texts, each with copies of it and of its copies, and half a text that all of them share."""
    found, common = [], [f"w{dice.randrange(900)}" for _ in range(70)]
    for _ in range(count):
        text = common + [f"w{dice.randrange(900)}" for _ in range(90)]
        found.append(text)
        for _ in range(dice.randrange(copies + 1)):
            found.append(changed(dice.choice([text, found[-1]]), 0.004, dice))
    dice.shuffle(found)
    return [" ".join(text) for text in found]


def slowly_kept(texts: list[str], similarity: float) -> set[str]:
    """Of texts that pairs join the longest, of equally long ones that with the lowest hash; every pair is compared."""
    group = list(range(len(texts)))
    ngrams = [{tuple(found[at : at + 5]) for at in range(len(found) - 4)} for found in map(words, texts)]
    for one, mine in enumerate(ngrams):
        for other, theirs in enumerate(ngrams[:one]):
            if group[one] != group[other] and len(mine & theirs) >= similarity * len(mine | theirs):
                group = [group[one] if each == group[other] else each for each in group]
    best: dict[int, str] = {}
    for label, text in zip(group, texts, strict=True):
        best[label] = min(best.get(label, text), text, key=lambda each: (
            -len(each.encode()), hashlib.sha256(each.encode()).hexdigest()))
    return set(best.values())


def test_reads_are_counted_in_pieces_and_not_in_pairs(tmp_path: Path, monkeypatch):
    """What stays is what a comparison of all pairs leaves; more copies cost no more reads."""
    real, reads = ranged.pieces, []

    def counted(wanted):
        asked = list(wanted)
        reads.extend(asked)
        return real(asked)

    monkeypatch.setattr(ranged, "pieces", counted)
    dice, files, found = random.Random(2), 4, []
    for copies in (1, 8):
        texts = clusters(40 if copies == 1 else 24, copies, dice)
        folder = tmp_path / str(copies)
        folder.mkdir()
        for number in range(files):
            (folder / f"{number}.jsonl").write_text("".join(
                json.dumps({"text": text}) + "\n" for text in texts[number::files]))
        reads.clear()
        prepare(Preparation(Inputs({"text.a": {"json_lines": str(folder / "*.jsonl")}}), ["near_duplicates"],
                            str(folder / "out"), part_bytes=1), 1, report=lambda line: None)
        left = [row["text"] for path in (folder / "out").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
        assert set(left) == slowly_kept(texts, 0.85) and len(left) == len(set(left)) < len(texts)
        found.append(Counter(Path(path).name.split("-")[0] for path, _, _ in reads))
    buckets = files
    for kinds in found:
        # Of each file where the range is and the range, by each bucket; of what was found by the end and by each part.
        assert kinds == {"keys": 2 * files * buckets, "met": 2 * buckets * files, "brought": 2 * files * buckets,
                         "edges": 2 * buckets, "found": 2 * files}


def test_ranges_in_a_bucket_are_read_alone(monkeypatch):
    """Exactly the bytes that are wanted, and none where a range is empty."""
    records = np.array([5, 6, 7, 8, 9], "<u4")
    head = np.array([0, 2, 2, 5], "<u8").tobytes()
    with FakeBucket() as bucket:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", bucket.url)
        monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        ranged._bucket.cache_clear()
        bucket.objects = {f"a folder/{name}": (1, head + records.tobytes()) for name in "ab"}
        paths = [epath.Path(f"gs://parts/a folder/{name}") for name in "ab"]
        assert ranged.read(paths, np.dtype("<u4"), 3, 2, 3).tolist() == [7, 8, 9, 7, 8, 9]
        assert sorted(bucket.asked) == sorted((f"a folder/{name}", asked) for name in "ab"
                                              for asked in ("bytes=16-31", "bytes=40-51"))
        bucket.asked.clear()
        assert not len(ranged.read(paths[:1], np.dtype("<u4"), 3, 1, 2))
        assert bucket.asked == [("a folder/a", "bytes=8-23")]
        bucket.objects["a folder/b"] = (1, head + records.tobytes()[:-4])
        with pytest.raises(OSError, match="gs://parts/a folder/b cannot be read"):
            ranged.read(paths, np.dtype("<u4"), 3, 2, 3)
        del bucket.objects["a folder/b"]
        with pytest.raises(FileNotFoundError, match="gs://parts/a folder/b is gone"):
            ranged.read(paths, np.dtype("<u4"), 3, 2, 3)
