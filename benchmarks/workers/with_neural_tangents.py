"""neural-tangents: jitted products, dense kernels by any of its three implementations, and scipy on top."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
from jax import lax
from measure import main
from scipy.sparse.linalg import eigsh


def _linear(p, name, x):
    return x @ p[f"{name}.weight"] + p[f"{name}.bias"]


def _norm(p, name, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def mlp(p, x):
    for layer in range(0, 10, 2):
        x = jax.nn.leaky_relu(_linear(p, str(layer), x), 0.01)
    return _linear(p, "10", x)


def cnn(p, x):
    for layer, stride in zip(range(0, 8, 2), (1, 2, 2, 2), strict=True):
        x = lax.conv_general_dilated(
            x, p[f"{layer}.weight"], (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NCHW", "OIHW", "NCHW")
        )
        x = jax.nn.relu(x + p[f"{layer}.bias"][:, None, None])
    return _linear(p, "9", x.reshape(len(x), -1))


def transformer(p, x):
    x = _linear(p, "embed", x)
    b, tokens, width = x.shape
    for block in ("blocks.0", "blocks.1"):
        h = _linear(p, f"{block}.qkv", _norm(p, f"{block}.norms.0", x))
        q, k, v = h.reshape(b, tokens, 3, 4, -1).transpose(2, 0, 3, 1, 4)
        attended = jax.nn.softmax(q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5) @ v
        x = x + _linear(p, f"{block}.out", attended.transpose(0, 2, 1, 3).reshape(b, tokens, width))
        h = jax.nn.gelu(_linear(p, f"{block}.mlp.0", _norm(p, f"{block}.norms.1", x)), approximate=False)
        x = x + _linear(p, f"{block}.mlp.2", h)
    return _linear(p, "head", x.mean(1))


def _case(job, data):
    params = {name[2:]: jnp.asarray(data[name]) for name in data.files if name.startswith("p/")}
    # Inputs first, as JAX writes it: its structured derivatives know a product, and not a product with a transpose.
    params = {name: p.T if name.endswith("weight") and p.ndim == 2 else p for name, p in params.items()}
    return (
        {"mlp": mlp, "cnn": cnn, "transformer": transformer}[job["case"].split(",")[0]],
        params,
        jnp.asarray(data["x"]),
    )


def product(job, data):
    f, params, x = _case(job, data)
    rows = len(data["V"]) // len(x)
    V = jnp.asarray(data["V"]).reshape(len(x), rows, -1)
    multiply = jax.jit(jax.vmap(nt.empirical_ntk_vp_fn(f, x, None, params), in_axes=-1, out_axes=-1))
    return lambda: multiply(V).block_until_ready(), lambda Y: {"product": np.asarray(Y).reshape(len(data["V"]), -1)}


def _dense(job, data):
    f, params, x = _case(job, data)
    how = {"trace_axes": (), "vmap_axes": 0, "implementation": job["implementation"]}
    kernel = jax.jit(nt.empirical_ntk_fn(f, **how))

    def run():
        K = kernel(x, None, params).block_until_ready()
        return K.transpose(0, 2, 1, 3).reshape(K.shape[0] * K.shape[2], -1)

    return run


def dense(job, data):
    return _dense(job, data), lambda K: {"product": np.asarray(K, np.float64) @ data["checked"]}


def eigen(job, data):
    def run():
        return eigsh(np.asarray(_dense(job, data)()), k=job["k"], tol=1e-3)

    return run, lambda pairs: {"values": pairs[0][::-1], "vectors": pairs[1][:, ::-1]}


def rate(job, data):
    A = jnp.ones((2048, 2048))
    multiply = jax.jit(jnp.dot)
    return lambda: multiply(A, A).block_until_ready(), lambda _: {}


if __name__ == "__main__":
    main({"product": product, "dense": dense, "eigen": eigen, "rate": rate})
