"""Rows of a table by index, with gradients summed in a fixed order.

The gradient of a look-up sums, for each row of the table, the gradients of the tokens that used it. XLA scatters them,
and on a GPU adds in the order in which threads arrive, so the same run would give different losses each time. These two
functions use a fixed order. Shape suffixes are explained at the top of `decoder.py`.
"""

import functools

import jax
import jax.numpy as jnp

from codellm_jax.model.attention import platform


def look_up_few(table_PD: jax.Array, ids_BL: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of a table about as long as a row of the batch, in its own dtype [B, L, D].

    Args:
      dtype: the dtype to which the rows are rounded later; their gradient needs no more precision.
    """
    return _few(table_PD, ids_BL, len(table_PD), dtype) if platform() == "gpu" else table_PD[ids_BL]


def look_up_many(table_VD: jax.Array, ids_BL: jax.Array) -> jax.Array:
    """Rows of a table far longer than a row of the batch, in its own dtype [B, L, D]."""
    return _many(table_VD, ids_BL, len(table_VD)) if platform() == "gpu" else table_VD[ids_BL]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _few(table_PD: jax.Array, ids_BL: jax.Array, rows: int, dtype: jnp.dtype) -> jax.Array:
    return table_PD[ids_BL]


def _few_backward(
    rows: int, dtype: jnp.dtype, ids_BL: jax.Array, gradient_BLD: jax.Array
) -> tuple[jax.Array, None]:
    """A matmul with the ids as one-hot rows; exact products, sums in the gradient's dtype."""
    return jnp.einsum("BLP,BLD->PD", jax.nn.one_hot(ids_BL, rows, dtype=dtype), gradient_BLD.astype(dtype),
                      preferred_element_type=gradient_BLD.dtype, precision=jax.lax.Precision.HIGHEST), None


_few.defvjp(lambda table_PD, ids_BL, rows, dtype: (table_PD[ids_BL], ids_BL), _few_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _many(table_VD: jax.Array, ids_BL: jax.Array, rows: int) -> jax.Array:
    return table_VD[ids_BL]


def _many_backward(rows: int, ids_BL: jax.Array, gradient_BLD: jax.Array) -> tuple[jax.Array, None]:
    return sum_of_equal(ids_BL.reshape(-1), gradient_BLD.reshape(-1, gradient_BLD.shape[-1]), rows), None


_many.defvjp(lambda table_VD, ids_BL, rows: (table_VD[ids_BL], ids_BL), _many_backward)


def sum_of_equal(ids_N: jax.Array, values_ND: jax.Array, rows: int) -> jax.Array:
    """Sums of the values of equal ids, [rows, D]; only whole sums are scattered, each to its own place.

    The values are sorted by id. Each value adds the three before it, then those 4, 8 and 12 before it, then 16, 32 and
    48, if their ids are equal: after log4 N passes the last of a run holds the whole sum.
    """
    tokens = len(ids_N)
    order_N = jnp.argsort(ids_N, stable=True)
    ids_N, values_ND = ids_N[order_N], values_ND[order_N]
    distance = 1
    while distance < tokens:
        sums_ND = values_ND
        for back in range(distance, min(4 * distance, tokens), distance):
            equal_N = jnp.pad(ids_N[back:] == ids_N[:-back], (back, 0))
            before_ND = jnp.pad(values_ND[:-back], ((back, 0), (0, 0)))
            sums_ND = sums_ND + jnp.where(equal_N[:, None], before_ND, 0)
        values_ND = jax.lax.optimization_barrier(sums_ND)
        distance *= 4
    is_last_N = jnp.pad(ids_N[1:] != ids_N[:-1], (0, 1), constant_values=True)
    place_N = jnp.where(is_last_N, ids_N, rows + jnp.arange(tokens))  # beyond the table: dropped
    return jnp.zeros((rows, values_ND.shape[1]), values_ND.dtype).at[place_N].set(
        values_ND, mode="drop", unique_indices=True)
