"""Flax linen: a `GroupedQueryAttention` module, and `attention_fn` for Flax's own modules."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen
from flax.linen.dtypes import promote_dtype
from flax.linen.linear import default_kernel_init
from flax.typing import Dtype, Initializer, PrecisionLike
from jax.typing import ArrayLike

from jax_flash2 import _cache, _checks, _module
from jax_flash2._attention import attention


class GroupedQueryAttention(linen.Module):
    """Multi-head attention by `jax_flash2.attention`, in memory linear in the length.

    Fields, call and parameters are those of `flax.linen.MultiHeadDotProductAttention`: each loads
    the other's parameters. Heads are an axis of the kernels, [features, heads, head dim], so that
    sharding by heads splits no head, and the attention of a shard is that of its own heads.

    Letters: *B any number of batch axes, T tokens of the queries, S of the keys.

    Fields that are not told here are as in `flax.linen.MultiHeadDotProductAttention`:
      num_heads: query heads.
      dropout_rate, broadcast_dropout, deterministic: for the sake of Flax's signature. Attention
        weights are never dropped: a call that would raises.
      decode: the tokens follow those of the cache, collection "cache", and are appended to it. Each
        sees those before it and itself, within local_window_size, whatever is_causal. `init` with
        inputs of the greatest length makes it: `cached_key`, `cached_value`, `cache_index` (int32
        [*B]); a layer with a local window that is shorter keeps a ring of left + 1 tokens, which no
        sequence is too long for. Any number of tokens a call; their keys and values are written in
        place where the cache is donated. Tokens that the cache has no slot for raise where
        the cached lengths are known; where they are traced, such tokens are padding. Forward only.
      normalize_qk: LayerNorm without bias on each head of queries and keys, as in Flax.
      num_kv_heads: key/value heads, a divisor of num_heads; None is num_heads. Query head n reads
        key/value head n // (num_heads // num_kv_heads).
      head_dim: channels of a head; None is qkv_features // num_heads. Given, it spares
        qkv_features, which is num_heads * head_dim.
      rope_theta: the base of rotary position embedding on queries and keys; None is none.
      local_window_size: as in `jax_flash2.attention`: each query sees that many keys to its left
        and right. In decode also the size of the cache.
      backward: as in `jax_flash2.attention`.
      attend: what attends, outside of decode. Called as `jax_flash2.attention` would be, with
        is_causal, the lengths, local_window_size, precision and backward as keywords; such as
        `context_parallel_attention` inside a `jax.shard_map`.
      kv_kernel_init, kv_bias_init: of key and value, where they differ from kernel_init and
        bias_init: under `linen.with_partitioning`, fewer heads than the mesh axis has devices
        cannot be sharded over it.
    """

    num_heads: int
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    qkv_features: int | None = None
    out_features: int | None = None
    broadcast_dropout: bool = True
    dropout_rate: float = 0.0
    deterministic: bool | None = None
    precision: PrecisionLike = None
    kernel_init: Initializer = default_kernel_init
    out_kernel_init: Initializer | None = None
    bias_init: Initializer = linen.initializers.zeros_init()
    out_bias_init: Initializer | None = None
    use_bias: bool = True
    decode: bool = False
    normalize_qk: bool = False
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float | None = None
    local_window_size: int | tuple[int, int] | None = None
    backward: str = "auto"
    attend: Callable[..., jax.Array] = attention
    kv_kernel_init: Initializer | None = None
    kv_bias_init: Initializer | None = None

    @linen.compact
    @_checks.speaks_as("GroupedQueryAttention")
    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_k: jax.Array | None = None,
        inputs_v: jax.Array | None = None,
        *,
        mask: ArrayLike | None = None,
        deterministic: bool | None = None,
        dropout_rng: jax.Array | None = None,
        sow_weights: bool = False,
        is_causal: bool = False,
        input_positions: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
        query_seq_lengths: ArrayLike | None = None,
        key_value_seq_lengths: ArrayLike | None = None,
    ) -> jax.Array:
        """[*B, T, out_features]; what is not told here is as in Flax.

        Args:
          inputs_q: [*B, T, features].
          inputs_k, inputs_v: [*B, S, features]; None is inputs_q and inputs_k.
          mask: None. See is_causal, local_window_size and the lengths.
          deterministic, dropout_rng, sow_weights: for the sake of Flax's signature: a call that
            would drop or capture attention weights raises.
          is_causal: query i sees key j only if j <= i.
          input_positions: int [*B, T] or [T], for rope_theta: the tokens' positions, or a pair, the
            queries' and the keys'. None counts from 0, in decode from the cached length. Masks know
            nothing of them.
          query_seq_lengths: int32 [*B]; queries at or past the length are padding: the attention
            gives 0 for them. In decode, the number of new tokens.
          key_value_seq_lengths: int32 [*B]; keys at or past the length are padding.

        Raises:
          ValueError: sizes or shapes do not fit; decode without a cache or with more tokens than it
            has.
          TypeError: a dtype is wrong.
          NotImplementedError: no kernel can do it.
        """
        drops = self.dropout_rate > 0 and not linen.merge_param(
            "deterministic", self.deterministic, deterministic
        )
        _module.refuse(
            mask=mask,
            weights=sow_weights,
            dropout=self.dropout_rate if drops else None,
        )
        inputs_k, inputs_v = _module.keys_and_values(inputs_q, inputs_k, inputs_v)
        features = inputs_q.shape[-1]
        kv_heads, head_dim = _module.sizes(
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.qkv_features,
            features,
            self.rope_theta,
        )
        dense = functools.partial(
            linen.DenseGeneral,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
        )
        key_value = functools.partial(
            dense,
            (kv_heads, head_dim),
            kernel_init=self.kv_kernel_init or self.kernel_init,
            bias_init=self.kv_bias_init or self.bias_init,
        )
        query = dense(
            (self.num_heads, head_dim),
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            name="query",
        )(inputs_q)
        key = key_value(name="key")(inputs_k)
        value = key_value(name="value")(inputs_v)
        if self.normalize_qk:
            norm = functools.partial(
                linen.LayerNorm, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype
            )
            query, key = norm(name="query_ln")(query), norm(name="key_ln")(key)
        query, key, value = promote_dtype(query, key, value, dtype=self.dtype)

        window = _checks.window(self.local_window_size)
        variables = self._cache(key, window) if self.decode else None
        decode = variables is not None and not self.is_initializing()
        out, cache = _module.rotate_and_attend(
            query,
            key,
            value,
            _cache.Cache(*(x.value for x in variables)) if decode else None,
            attend=self.attend,
            is_causal=is_causal,
            rope_theta=self.rope_theta,
            input_positions=input_positions,
            query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths,
            local_window_size=window,
            precision=self.precision,
            backward=self.backward,
        )
        if decode:
            for variable, x in zip(variables, cache, strict=True):
                variable.value = x
        return dense(
            self.out_features or features,
            axis=(-2, -1),
            kernel_init=self.out_kernel_init or self.kernel_init,
            bias_init=self.out_bias_init or self.bias_init,
            name="out",
        )(out)

    def _cache(self, key, window):
        """The variables; `init` makes them for as many tokens as it gets."""
        if not self.is_initializing() and not self.has_variable("cache", "cached_key"):
            raise _module.no_cache("Pass what init made of inputs of the greatest length.")
        *batch, max_length, kv_heads, head_dim = key.shape
        shape = (*batch, _cache.slots(max_length, window), kv_heads, head_dim)
        return (
            self.variable("cache", "cached_key", jnp.zeros, shape, key.dtype),
            self.variable("cache", "cached_value", jnp.zeros, shape, key.dtype),
            self.variable("cache", "cache_index", jnp.zeros, batch, jnp.int32),
        )


@_checks.speaks_as("linen.attention_fn")
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
    module: linen.Module | None = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general=None,
    qk_attn_weights_einsum=None,
    attn_weights_value_einsum=None,
    **options,
) -> jax.Array:
    """`jax_flash2.attention` as the attention_fn of `flax.linen.MultiHeadDotProductAttention`.

    The signature is that of `flax.linen.dot_product_attention`: linen passes what it finds the
    name of there, and drops the rest in silence. dtype and precision are honoured, and the softmax
    is in float32 always; a mask, a bias, dropout that is not deterministic, the capture of weights
    (module) and einsums of one's own raise. Options are those of `jax_flash2.attention`; linen has
    no is_causal, hence `functools.partial(attention_fn, is_causal=True)` instead of a causal mask.

    Raises:
      NotImplementedError: no kernel can do it.
      ValueError, TypeError: as `jax_flash2.attention`.
    """
    _module.refuse(
        mask=mask,
        bias=bias,
        weights=module is not None,
        dropout=dropout_rate if dropout_rate > 0 and not deterministic else None,
        einsum_dot_general=einsum_dot_general,
        qk_attn_weights_einsum=qk_attn_weights_einsum,
        attn_weights_value_einsum=attn_weights_value_einsum,
    )
    query, key, value = promote_dtype(query, key, value, dtype=dtype)
    return attention(query, key, value, precision=precision, **options)
