"""The arrays of a cache: rows, their digests, and numbers not yet cut into rows."""

import numpy as np
import tensorstore

from codellm_jax.mixture.places import Place

# A shard is one file; a chunk is the unit of a random read. Chunks of 16 rows measured as fast as single rows, with
# fewer index entries.
ROWS_A_SHARD = 4096
ROWS_A_CHUNK = 16
DIGESTS_A_CHUNK = 16 * ROWS_A_SHARD
REQUESTS_AT_ONCE = 256
BYTES_KEPT = 64 << 20  # cached for each source, mainly the indices of its files
BYTES_KEPT_IN_ALL = 1 << 30  # approximate total for many sources
_LITTLE_ENDIAN = {"name": "bytes", "configuration": {"endian": "little"}}


def _kvstore(path: str) -> str | dict[str, str]:
    return path if "://" in path else {"driver": "file", "path": path}


def create_store(
    path: str, width: int, data_type: np.dtype, compressed: bool = False, rows: int | None = None
) -> tensorstore.TensorStore:
    """An array of rows, [rows, width]. With `rows` an existing one is opened; without, it is replaced by an empty one.
    """
    compression = [{"name": "zstd", "configuration": {"level": 1}}] if compressed else []
    sharding = {
        "chunk_shape": [ROWS_A_CHUNK, width],
        "codecs": [_LITTLE_ENDIAN, *compression, {"name": "crc32c"}],
        "index_codecs": [_LITTLE_ENDIAN, {"name": "crc32c"}],
    }
    return tensorstore.open({
        "driver": "zarr3", "kvstore": _kvstore(path), "create": True,
        **({"delete_existing": True} if rows is None else {"open": True}),
        "store_data_equal_to_fill_value": True,
        "metadata": {
            "shape": [rows or 0, width], "data_type": data_type.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [ROWS_A_SHARD, width]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        },
    }).result()


def salt_of(place: Place, split: str) -> str:
    """The salt of the digests of a split's rows."""
    return f"{place.directory.name} {split} "


def digests_path(path: str) -> str:
    """The path of the digests of an array of rows."""
    return f"{path}.digests"


def create_digests(path: str, count: int) -> tensorstore.TensorStore:
    """The array of the digests of an array of `count` rows at `path`; an existing one is opened."""
    return create_numbers(digests_path(path), np.dtype(np.uint32), count, DIGESTS_A_CHUNK)


def create_numbers(path: str, data_type: np.dtype, count: int = 0, chunk: int = 1 << 20) -> tensorstore.TensorStore:
    """An array of numbers, [count], to be written and extended by whole chunks; an existing one is opened."""
    return tensorstore.open({
        "driver": "zarr3", "kvstore": _kvstore(path), "create": True, "open": True,
        "store_data_equal_to_fill_value": True,
        "metadata": {
            "shape": [count], "data_type": data_type.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [chunk]}},
            "codecs": [_LITTLE_ENDIAN, {"name": "zstd", "configuration": {"level": 1}}, {"name": "crc32c"}],
        },
    }).result()


def open_store(path: str, write: bool = False, kept: int = BYTES_KEPT) -> tensorstore.TensorStore:
    """Opens an existing array for reading or writing; caches up to `kept` bytes of what is read."""
    return tensorstore.open(
        # When reading, a missing shard is an error, not rows of zeros; when writing, it does not exist yet.
        {"driver": "zarr3", "kvstore": _kvstore(path), "fill_missing_data_reads": write,
         "store_data_equal_to_fill_value": True,
         # The data never changes; revalidation would double the time of a remote read.
         "recheck_cached_metadata": "open", "recheck_cached_data": write},
        read=not write, write=write, context=tensorstore.Context({
            "cache_pool": {"total_bytes_limit": kept},
            # A batch makes one request per row.
            "gcs_request_concurrency": {"limit": REQUESTS_AT_ONCE},
            "http_request_concurrency": {"limit": REQUESTS_AT_ONCE},
        })).result()
