"""Flax nnx: a `GroupedQueryAttention` module, and `attention_fn` for Flax's own modules."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.module import first_from
from flax.nnx.nn import dtypes
from flax.nnx.nn.linear import default_bias_init, default_kernel_init
from flax.typing import Dtype, Initializer, PrecisionLike, PromoteDtypeFn, Shape
from jax.typing import ArrayLike

from jax_flash2 import _cache, _checks, _module
from jax_flash2._attention import attention


class GroupedQueryAttention(nnx.Module):
    """Multi-head attention by `jax_flash2.attention`, in memory linear in the length.

    Constructor, call and parameters are those of `flax.nnx.MultiHeadAttention`: each loads the
    other's state. Heads are an axis of the kernels, [features, heads, head dim], so that sharding
    by heads splits no head, and the attention of a shard is that of its own heads.

    Letters: *B any number of batch axes, T tokens of the queries, S of the keys.
    """

    @_checks.speaks_as("GroupedQueryAttention")
    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        *,
        head_dim: int | None = None,
        rope_theta: float | None = None,
        local_window_size: int | tuple[int, int] | None = None,
        backward: str = "auto",
        attend: Callable[..., jax.Array] = attention,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        broadcast_dropout: bool = True,
        dropout_rate: float = 0.0,
        deterministic: bool | None = None,
        precision: PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        out_kernel_init: Initializer | None = None,
        bias_init: Initializer = default_bias_init,
        out_bias_init: Initializer | None = None,
        use_bias: bool = True,
        decode: bool | None = None,
        normalize_qk: bool = False,
        qkv_promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        out_promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        ln_promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        keep_rngs: bool = True,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        kv_kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        out_kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        kv_bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        out_bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        query_ln_scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        key_ln_scale_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        """Makes the parameters. What is not told here is as in `flax.nnx.MultiHeadAttention`.

        Args:
          num_heads: query heads.
          num_kv_heads: key/value heads, a divisor of num_heads; None is num_heads. Query head n
            reads key/value head n // (num_heads // num_kv_heads).
          head_dim: channels of a head; None is qkv_features // num_heads. Given, it spares
            qkv_features, which is num_heads * head_dim.
          rope_theta: the base of rotary position embedding on queries and keys; None is none.
          local_window_size: as in `jax_flash2.attention`: each query sees that many keys to its
            left and right. In decode also the size of the cache.
          backward: as in `jax_flash2.attention`.
          attend: what attends, outside of decode. Called as `jax_flash2.attention` would be, with
            is_causal, the lengths, local_window_size, precision and backward as keywords; such as
            `context_parallel_attention` inside a `jax.shard_map`.
          dtype: of the computation; None infers it from inputs and parameters.
          dropout_rate, broadcast_dropout, deterministic, keep_rngs: for the sake of Flax's
            signature. Attention weights are never dropped: a call that would raises.
          normalize_qk: LayerNorm without bias on each head of queries and keys, as in Flax.
          kernel_metadata, bias_metadata: of the query, key and value projections, such as
            {"out_sharding": (None, "model", None)}.
          kv_kernel_metadata, kv_bias_metadata: of key and value, where they differ: fewer heads
            than the mesh axis has devices cannot be sharded over it.

        Raises:
          ValueError: sizes that do not fit together.
        """
        self.num_kv_heads, self.head_dim = _module.sizes(
            num_heads, num_kv_heads, head_dim, qkv_features, in_features, rope_theta
        )
        self.num_heads = num_heads
        self.in_features = in_features
        self.qkv_features = num_heads * self.head_dim
        self.out_features = in_features if out_features is None else out_features
        self.in_kv_features = in_features if in_kv_features is None else in_kv_features
        self.rope_theta = rope_theta
        self.local_window_size = _checks.window(local_window_size)
        self.backward = backward
        self.attend = attend
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.dropout_rate = dropout_rate
        self.deterministic = deterministic
        self.precision = precision
        self.decode = decode
        self.promote_dtype = qkv_promote_dtype

        linear = functools.partial(
            nnx.LinearGeneral,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            rngs=rngs,
        )
        project = functools.partial(
            linear,
            kernel_init=kernel_init,
            bias_init=bias_init,
            promote_dtype=qkv_promote_dtype,
        )
        kv_kernel_metadata = kv_kernel_metadata or kernel_metadata
        kv_bias_metadata = kv_bias_metadata or bias_metadata
        self.query = project(
            in_features,
            (num_heads, self.head_dim),
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
        )
        self.key, self.value = (
            project(
                self.in_kv_features,
                (self.num_kv_heads, self.head_dim),
                kernel_metadata=kv_kernel_metadata,
                bias_metadata=kv_bias_metadata,
            )
            for _ in range(2)
        )
        self.query_ln, self.key_ln = (
            nnx.LayerNorm(
                self.head_dim,
                use_bias=False,
                dtype=dtype,
                param_dtype=param_dtype,
                promote_dtype=ln_promote_dtype,
                rngs=rngs,
                scale_metadata=metadata,
            )
            if normalize_qk
            else nnx.data(None)
            for metadata in (query_ln_scale_metadata, key_ln_scale_metadata)
        )
        self.out = linear(
            (num_heads, self.head_dim),
            self.out_features,
            axis=(-2, -1),
            kernel_init=out_kernel_init or kernel_init,
            bias_init=out_bias_init or bias_init,
            promote_dtype=out_promote_dtype,
            kernel_metadata=out_kernel_metadata or kernel_metadata,
            bias_metadata=out_bias_metadata or bias_metadata,
        )
        self.cached_key: nnx.Cache | None = nnx.data(None)
        self.cached_value: nnx.Cache | None = nnx.data(None)
        self.cache_index: nnx.Cache | None = nnx.data(None)

    @_checks.speaks_as("GroupedQueryAttention")
    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_k: jax.Array | None = None,
        inputs_v: jax.Array | None = None,
        *,
        mask: ArrayLike | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        sow_weights: bool = False,
        decode: bool | None = None,
        is_causal: bool = False,
        out_sharding=None,
        qkv_sharding=None,
        kv_sharding=None,
        input_positions: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
        query_seq_lengths: ArrayLike | None = None,
        key_value_seq_lengths: ArrayLike | None = None,
    ) -> jax.Array:
        """[*B, T, out_features]; what is not told here is as in `flax.nnx.MultiHeadAttention`.

        Args:
          inputs_q: [*B, T, in_features].
          inputs_k, inputs_v: [*B, S, in_kv_features]; None is inputs_q and inputs_k.
          mask: None. See is_causal, local_window_size and the lengths.
          deterministic, rngs, sow_weights: for the sake of Flax's signature: a call that would drop
            or capture attention weights raises.
          decode: the tokens follow those of the cache that `init_cache` made, and are appended to
            it. Each sees those before it and itself, within local_window_size, whatever is_causal.
            Any number of tokens a call; their keys and values are written in place where the
            module's state is donated. Tokens that the cache has no slot for raise where the cached
            lengths are known; where they are traced, such tokens are padding. Forward only.
          is_causal: query i sees key j only if j <= i.
          out_sharding, qkv_sharding: of the result and of the heads, over explicit mesh axes;
            kv_sharding of the heads of key and value, where it differs.
          input_positions: int [*B, T] or [T], for rope_theta: the tokens' positions, or a pair, the
            queries' and the keys'. None counts from 0, in decode from the cached length. Masks know
            nothing of them.
          query_seq_lengths: int32 [*B]; queries at or past the length are padding: the attention
            gives 0 for them. In decode, the number of new tokens.
          key_value_seq_lengths: int32 [*B]; keys at or past the length are padding.

        Raises:
          ValueError: shapes do not fit; decode without a cache or with more tokens than it has.
          TypeError: a dtype is wrong.
          NotImplementedError: no kernel can do it.
        """
        drops = self.dropout_rate > 0 and not first_from(
            deterministic,
            self.deterministic,
            error_msg="dropout_rate is not 0, and neither call nor constructor says deterministic.",
        )
        _module.refuse(
            mask=mask,
            weights=sow_weights,
            dropout=self.dropout_rate if drops else None,
        )
        inputs_k, inputs_v = _module.keys_and_values(inputs_q, inputs_k, inputs_v)
        kv_sharding = qkv_sharding if kv_sharding is None else kv_sharding
        query = self.query(inputs_q, out_sharding=qkv_sharding)
        key = self.key(inputs_k, out_sharding=kv_sharding)
        value = self.value(inputs_v, out_sharding=kv_sharding)
        if self.query_ln is not None:
            query, key = self.query_ln(query), self.key_ln(key)
        query, key, value = self.promote_dtype((query, key, value), dtype=self.dtype)

        decode = self.decode if decode is None else decode
        variables = (self.cached_key, self.cached_value, self.cache_index)
        if decode and any(x is None for x in variables):
            raise _module.no_cache("Call init_cache first.")
        out, cache = _module.rotate_and_attend(
            query,
            key,
            value,
            _cache.Cache(*(x[...] for x in variables)) if decode else None,
            attend=self.attend,
            is_causal=is_causal,
            rope_theta=self.rope_theta,
            input_positions=input_positions,
            query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths,
            local_window_size=self.local_window_size,
            precision=self.precision,
            backward=self.backward,
        )
        if decode:
            for variable, x in zip(variables, cache, strict=True):
                variable[...] = x
        return self.out(out, out_sharding=out_sharding)

    def init_cache(
        self,
        input_shape: Shape,
        dtype: Dtype | None = None,
        *,
        metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        """Makes an empty cache: `cached_key`, `cached_value`, and `cache_index` (int32 [*B]).

        Args:
          input_shape: (*B, max_length, features). A layer with a local window that is shorter keeps
            a ring of left + 1 tokens, which no sequence is too long for.
          dtype: of the cached keys and values; None is the module's dtype, or else param_dtype.
          metadata: of the keys' and values' variables, such as {"out_sharding": ("data", None,
            "model", None)}; the index gets the entries of *B.
        """
        *batch, max_length, _ = input_shape
        slots = _cache.slots(max_length, self.local_window_size)
        shape = (*batch, slots, self.num_kv_heads, self.head_dim)
        dtype = dtype or self.dtype or self.param_dtype
        self.cached_key = nnx.Cache(jnp.zeros(shape, dtype), **metadata)
        self.cached_value = nnx.Cache(jnp.zeros(shape, dtype), **metadata)
        if "out_sharding" in metadata:
            metadata = {**metadata, "out_sharding": tuple(metadata["out_sharding"])[: len(batch)]}
        self.cache_index = nnx.Cache(jnp.zeros(batch, jnp.int32), **metadata)

    def set_view(
        self,
        deterministic: bool | None = None,
        decode: bool | None = None,
        batch_size: int | Shape | None = None,
        max_length: int | None = None,
    ):
        """For `nnx.view`: sets what is given; batch_size and max_length make a new cache."""
        if deterministic is not None:
            self.deterministic = deterministic
        if decode is not None:
            self.decode = decode
        if (batch_size is None) != (max_length is None):
            raise TypeError("batch_size and max_length are given together, or neither of them.")
        if max_length is not None:
            batch = (batch_size,) if isinstance(batch_size, int) else tuple(batch_size)
            self.init_cache((*batch, max_length, self.in_features))


@_checks.speaks_as("nnx.attention_fn")
def attention_fn(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Dtype | None = None,
    precision: PrecisionLike = None,
    module: nnx.Module | None = None,
    promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
    is_causal: bool = False,
    **options,
) -> jax.Array:
    """`jax_flash2.attention` as the attention_fn of `flax.nnx.MultiHeadAttention`.

    The signature is that of `flax.nnx.dot_product_attention`. Grouped heads, is_causal, dtype,
    precision and promote_dtype are honoured; a mask, a bias, dropout that is not deterministic and
    the capture of weights (module) raise. Options are those of `jax_flash2.attention`:
    `functools.partial(attention_fn, local_window_size=(1023, 0))`.

    Raises:
      NotImplementedError: no kernel can do it.
      ValueError, TypeError: as `jax_flash2.attention`.
    """
    _module.refuse(
        mask=mask,
        bias=bias,
        weights=module is not None,
        dropout=dropout_rate if dropout_rate > 0 and not deterministic else None,
    )
    query, key, value = promote_dtype((query, key, value), dtype=dtype)
    return attention(query, key, value, is_causal=is_causal, precision=precision, **options)
