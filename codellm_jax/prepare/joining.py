"""Joins pairs of near duplicates into components, each of which keeps one document: the best.

A longer document is better; among equally long ones the lower hash, then the lower number.

A few pairs are joined at once. Many are joined in rounds of stars, with documents hashed to buckets that each hold only
their own pairs (Kiveris et al., 2014, "Connected Components in MapReduce and Beyond", section 4). A large star links
the worse neighbours of a document to the best of it and all its neighbours; a small star links it and its better
neighbours to the best of these. Once neither changes anything, every document of a component is linked to its best one.
"""

import numpy as np

from codellm_jax.prepare.duplicates import components
from codellm_jax.prepare.job import DROPPED, EDGE

_SIDES = ("first", "second")


def both_ways(edges: np.ndarray) -> np.ndarray:
    """Each pair in both directions: EDGE [2 N]."""
    swapped = edges.copy()
    for one, other in (_SIDES, _SIDES[::-1]):
        for name in ("", "_bytes", "_rank"):
            swapped[f"{one}{name}"] = edges[f"{other}{name}"]
    return np.concatenate([edges, swapped])


def hashed(edges: np.ndarray) -> np.ndarray:
    """A hash of the first document of each pair: uint64 [N]."""
    mixed = (edges["first"] ^ (edges["first"] >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    return mixed ^ (mixed >> np.uint64(29))


def star(edges: np.ndarray, large: bool) -> tuple[np.ndarray, bool]:
    """Applies one round of stars.

    Args:
      edges: EDGE [N], all pairs whose first document is in the bucket.
      large: whether the round is a large star, else a small one.

    Returns:
      The new pairs, the worse document first, and whether the star changed anything.
    """
    vertices, place = _vertices(edges)
    pairs = np.unique(np.stack(place, axis=1), axis=0)  # sorted by quality, like `vertices`
    if not large:
        pairs = pairs[pairs[:, 1] < pairs[:, 0]]
    if not len(pairs):
        return edges[:0], False
    starts = np.flatnonzero(np.concatenate([[True], np.diff(pairs[:, 0]) != 0]))
    counts = np.diff(np.append(starts, len(pairs)))
    own = pairs[starts, 0]
    best = np.minimum(own, pairs[starts, 1])
    of_each = np.repeat(best, counts)
    if large:
        worse = pairs[:, 1] > pairs[:, 0]
        changed = bool((of_each != pairs[:, 0])[worse].any())
        new = np.stack([pairs[:, 1], of_each], axis=1)[worse]
    else:
        changed = bool((counts > 1).any())
        new = np.concatenate([np.stack([pairs[:, 1], of_each], axis=1), np.stack([own, best], axis=1)])
        new = new[new[:, 0] != new[:, 1]]
    new = np.unique(new, axis=0)
    found = np.zeros(len(new), EDGE)
    for side, name in enumerate(_SIDES):
        for field in ("", "_bytes", "_rank"):
            found[f"{name}{field}"] = vertices[f"first{field}"][new[:, side]]
    return found, changed


def _vertices(edges: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The documents of pairs, best first, as the first sides of pairs; and the index there of each pair's two sides."""
    twice = both_ways(edges)
    order = np.lexsort((twice["first"], twice["first_rank"], ~twice["first_bytes"]))
    of_order = twice["first"][order]
    new = np.concatenate([[True], of_order[1:] != of_order[:-1]])[: len(order)]
    place = np.empty(len(order), np.int64)
    place[order] = np.cumsum(new) - 1
    return twice[order[new]], [place[: len(edges)], place[len(edges) :]]


def dropped_by_stars(stars: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The documents to remove.

    Args:
      stars: the pairs after the last round whose first document is in the bucket.
      edges: all pairs found whose first document is in the bucket, for their similarities.

    Returns:
      DROPPED [N].
    """
    _, (first, second) = _vertices(stars)
    stars = stars[first > second]
    stars = stars[np.argsort(stars["first"])]
    dropped = np.zeros(len(stars), DROPPED)
    dropped["document"], dropped["copy"], dropped["rank"] = stars["first"], stars["second"], stars["second_rank"]
    here = edges[np.isin(edges["first"], stars["first"])]
    np.maximum.at(dropped["similarity"], np.searchsorted(stars["first"], here["first"]), here["similarity"])
    return dropped


def joined(edges: np.ndarray) -> np.ndarray:
    """The documents to remove, given all pairs."""
    if not len(edges):
        return np.zeros(0, DROPPED)
    numbers, label = components(edges["first"], edges["second"])
    size, rank = np.zeros(len(numbers), np.uint64), np.zeros(len(numbers), np.uint64)
    similarity = np.zeros(len(numbers), np.float32)
    for name in ("first", "second"):
        at = np.searchsorted(numbers, edges[name])
        size[at], rank[at] = edges[f"{name}_bytes"], edges[f"{name}_rank"]
        np.maximum.at(similarity, at, edges["similarity"])
    order = np.lexsort((numbers, rank, ~size, label))  # the best of each component first
    leads = np.concatenate([[True], np.diff(label[order]) != 0])
    kept = order[np.maximum.accumulate(np.where(leads, np.arange(len(order)), 0))]
    gone = order[~leads]
    dropped = np.zeros(len(gone), DROPPED)
    dropped["document"], dropped["copy"] = numbers[gone], numbers[kept[~leads]]
    dropped["rank"], dropped["similarity"] = rank[kept[~leads]], similarity[gone]
    return dropped
